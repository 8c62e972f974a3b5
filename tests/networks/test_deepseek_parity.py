"""Multi-head latent attention against DeepseekV2 of transformers, without experts, on the same weights.

It rotates neighbouring channels as a pair, here channel i goes with i + R/2: rows of two matrices change places.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.latent_attention import LatentAttention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from tests.parity import VOCAB, Named, assert_same_network, randomised, values

deepseek = pytest.importorskip("transformers.models.deepseek_v2")


def pair(
    dim: int, heads: int, latent: int, head_dim: int, rotary_dim: int, hidden: int, depth: int
) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    mixer = partial(
        LatentAttention, heads=heads, latent=latent, head_dim=head_dim, rotary_dim=rotary_dim, rotary_base=500.0
    )
    block = partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=hidden), norm=norm)
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm))
    theirs = deepseek.DeepseekV2ForCausalLM(
        deepseek.DeepseekV2Config(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            first_k_dense_replace=depth,
            num_attention_heads=heads,
            q_lora_rank=None,
            kv_lora_rank=latent,
            qk_nope_head_dim=head_dim,
            v_head_dim=head_dim,
            qk_rope_head_dim=rotary_dim,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_deepseek(ours, values(ours)))
    return ours, theirs


def interleaved(rows: Tensor) -> Tensor:
    """(..., R, D) with halves one after the other -> with pairs side by side"""
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def as_deepseek(network: Decoder, tensors: Named) -> Named:
    named: dict[str, Tensor] = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }
    for layer, block in enumerate(network.layers):
        mixer, ours, theirs = block.mixer, f"blocks.{layer}", f"model.layers.{layer}"
        query = tensors[f"{ours}.mixer.query.weight"].unflatten(0, (mixer.heads, -1))
        query, rotated = query.split((mixer.head_dim, mixer.rotary_dim), 1)
        latent, shared = tensors[f"{ours}.mixer.down.weight"].split((mixer.latent, mixer.rotary_dim))
        gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"{theirs}.self_attn.q_proj.weight": torch.cat((query, interleaved(rotated)), 1).flatten(0, 1),
            f"{theirs}.self_attn.kv_a_proj_with_mqa.weight": torch.cat((latent, interleaved(shared))),
            f"{theirs}.self_attn.kv_a_layernorm.weight": tensors[f"{ours}.mixer.norm.weight"],
            f"{theirs}.self_attn.kv_b_proj.weight": tensors[f"{ours}.mixer.up.weight"],
            f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.mixer.out.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.mixer_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": tensors[f"{ours}.feed_forward_norm.weight"],
        }
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "latent", "head_dim", "rotary_dim", "hidden", "depth", "batch", "time"),
    [
        (32, 4, 12, 8, 4, 24, 2, 2, 7),
        (32, 4, 10, 6, 8, 24, 2, 1, 11),  # heads that do not make up the width
        (24, 1, 24, 24, 2, 31, 3, 1, 13),
        (12, 3, 4, 4, 2, 5, 1, 3, 1),
    ],
)
def test_logits_steps_and_gradients_are_those_of_deepseek(
    dim, heads, latent, head_dim, rotary_dim, hidden, depth, batch, time
):
    ours, theirs = pair(dim, heads, latent, head_dim, rotary_dim, hidden, depth)
    assert_same_network(ours, theirs, as_deepseek, batch, time)
