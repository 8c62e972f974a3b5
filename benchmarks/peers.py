"""The competing networks: ours, and the same dimensions in other libraries; tokens (B, T) -> logits (B, T, V).

A peer's package is imported when its network is built. Each library uses its default attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from llmx.protocol import Logits, Network, Tokens


@dataclass(frozen=True)
class Shape:
    """The dimensions of a network and of its batch."""

    depth: int
    dim: int
    heads: int
    hidden: int
    window: int
    batch_size: int
    vocab_size: int = 65


SETTINGS = {
    "founding": Shape(depth=4, dim=128, heads=8, hidden=341, window=32, batch_size=64),
    "large": Shape(depth=6, dim=384, heads=6, hidden=1024, window=256, batch_size=16),
}


@dataclass(frozen=True)
class Peer:
    name: str
    attention: str
    build: Callable[[Shape], nn.Module]


def ours(shape: Shape) -> Network:
    """The network of configs/transformer.yaml with other dimensions."""
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=shape.heads),
        feed_forward=partial(SwiGLU, hidden=shape.hidden),
        norm=RMSNorm,
    )
    return Decoder(shape.vocab_size, block=block, dim=shape.dim, depth=shape.depth)


class _HuggingFace(nn.Module):
    """Returns logits only and uses no cache, as in training."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tokens) -> Logits:
        return self.model(input_ids=tokens, use_cache=False).logits


def hf_llama(shape: Shape) -> Any:
    """transformers' LlamaForCausalLM, with the same shapes as ours in every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.window,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def hf_gpt2(shape: Shape) -> Any:
    """transformers' GPT2LMHeadModel without dropout; its feed-forward is 4 dim wide, as published."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.dim,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_positions=shape.window,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return GPT2LMHeadModel(config)


def _llama(shape: Shape) -> nn.Module:
    return _HuggingFace(hf_llama(shape))


def _gpt2(shape: Shape) -> nn.Module:
    return _HuggingFace(hf_gpt2(shape))


def _litgpt(shape: Shape) -> nn.Module:
    config = import_module("litgpt.config").Config(
        block_size=shape.window,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_embd=shape.dim,
        intermediate_size=shape.hidden,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    return import_module("litgpt.model").GPT(config)


def _x_transformers(shape: Shape) -> nn.Module:
    library = import_module("x_transformers")
    layers = library.Decoder(
        dim=shape.dim,
        depth=shape.depth,
        heads=shape.heads,
        attn_dim_head=shape.dim // shape.heads,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=shape.hidden / shape.dim,
    )
    return library.TransformerWrapper(
        num_tokens=shape.vocab_size, max_seq_len=shape.window, attn_layers=layers, use_abs_pos_emb=False
    )


PEERS = {
    "llama": Peer("transformers Llama", "sdpa", _llama),
    "gpt2": Peer("transformers GPT-2", "sdpa", _gpt2),
    "litgpt": Peer("litgpt Llama", "sdpa", _litgpt),
    "x-transformers": Peer("x-transformers", "einsum", _x_transformers),
}


def _recurrent(kind: str, settings: dict[str, Any], shape: Shape, package: str = "transformers") -> nn.Module:
    """A recurrent model of another library; transformers uses CUDA kernels of other packages if they are installed."""
    library = import_module(package)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"vocab_size": shape.vocab_size, "hidden_size": shape.dim, "num_hidden_layers": shape.depth}
    config = getattr(library, f"{kind}Config")(**{**common, **special, **settings})
    return _HuggingFace(getattr(library, f"{kind}ForCausalLM")(config))


# depth, width and parameters are as near to our config of the same architecture as the settings allow
_MAMBA = {"num_hidden_layers": 7, "state_size": 16, "time_step_rank": 8}
_MAMBA2 = {"num_hidden_layers": 7, "state_size": 32, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
_RECURRENT_GEMMA = {"block_types": ["recurrent"], "lru_width": 128, "intermediate_size": 682, **_HEADS}
_QWEN3_NEXT = {
    "layer_types": ["linear_attention"] * 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "intermediate_size": 341,
    "mlp_only_layers": [0, 1, 2, 3],  # no experts
    "num_experts": 0,
    **_HEADS,
}
_XLSTM = {"num_heads": 4, "embedding_dim": 128, "num_blocks": 4, "mode": "train", "autocast_kernel_dtype": "float32"}
RECURRENT = {
    "hf_mamba": Peer("transformers Mamba", "none", partial(_recurrent, "Mamba", _MAMBA)),
    "hf_mamba2": Peer("transformers Mamba-2", "none", partial(_recurrent, "Mamba2", _MAMBA2)),
    "hf_rg_lru": Peer("transformers RG-LRU", "none", partial(_recurrent, "RecurrentGemma", _RECURRENT_GEMMA)),
    "hf_gated_deltanet": Peer("transformers Gated DeltaNet", "none", partial(_recurrent, "Qwen3Next", _QWEN3_NEXT)),
    "hf_mlstm": Peer("transformers mLSTM", "none", partial(_recurrent, "xLSTM", _XLSTM)),
}


def _fla(kind: str, settings: dict[str, Any], shape: Shape) -> nn.Module:
    """A model of flash-linear-attention; its kernels are written in Triton and need a CUDA device."""
    if not torch.cuda.is_available():
        raise ModuleNotFoundError(name="a CUDA device")
    # without fusion the model returns logits, and the loss is the same for all contenders
    return _recurrent(kind, {"fuse_cross_entropy": False, **settings}, shape, "fla.models")


# RetNet's feed-forward is gated, so it has two thirds of the width of ours
_FLA_LINEAR = {"num_heads": 4, "feature_map": "elu", "norm_feature_map": True, "intermediate_size": 341}
_FLA_RETNET = {"num_heads": 4, "intermediate_size": 171}
_FLA_GLA = {"num_heads": 4, "intermediate_size": 331}
_FLA_HGRN2 = {"num_heads": 4, "expand_ratio": None, "intermediate_size": 340}
_FLA_DELTANET = {"num_heads": 4, "intermediate_size": 336}
_FLA_GATED_DELTANET = {"num_heads": 4, "head_dim": 32, "expand_v": 1, "intermediate_size": 291}
_FLA_KDA = {"num_heads": 4, "head_dim": 32, "intermediate_size": 292}
_FLA_RANKS = {"decay_low_rank_dim": 16, "a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 32}
_FLA_RWKV7 = {"head_dim": 32, "intermediate_size": 427, "use_l2warp": False, **_FLA_RANKS}
RECURRENT |= {
    "fla_linear_attention": Peer("fla linear attention", "none", partial(_fla, "LinearAttention", _FLA_LINEAR)),
    "fla_retnet": Peer("fla RetNet", "none", partial(_fla, "RetNet", _FLA_RETNET)),
    "fla_gla": Peer("fla GLA", "none", partial(_fla, "GLA", _FLA_GLA)),
    "fla_hgrn2": Peer("fla HGRN2", "none", partial(_fla, "HGRN2", _FLA_HGRN2)),
    "fla_deltanet": Peer("fla DeltaNet", "none", partial(_fla, "DeltaNet", _FLA_DELTANET)),
    "fla_gated_deltanet": Peer("fla Gated DeltaNet", "none", partial(_fla, "GatedDeltaNet", _FLA_GATED_DELTANET)),
    "fla_kda": Peer("fla KDA", "none", partial(_fla, "KDA", _FLA_KDA)),
    "fla_rwkv7": Peer("fla RWKV-7", "none", partial(_fla, "RWKV7", _FLA_RWKV7)),
}


def mean_loss(network: nn.Module, tokens: Tokens, targets: Tokens) -> Tensor:
    """The training loss: the mean negative log-likelihood in nats, with the softmax in float32."""
    if isinstance(network, Network):
        losses, auxiliary = network.losses(tokens, targets)
        return losses.mean() + auxiliary
    return F.cross_entropy(network(tokens).flatten(0, 1).float(), targets.flatten())
