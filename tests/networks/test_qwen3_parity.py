"""Attention with normalised queries and keys against Qwen3 of transformers, on the same weights."""

from functools import partial

import pytest
from torch import nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.qk_norm import QKNormAttention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from tests.parity import VOCAB, Named, assert_same_network, named_as_llama, randomised, values

qwen3 = pytest.importorskip("transformers.models.qwen3")


def pair(dim: int, heads: int, kv_heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    block = partial(
        PreNormBlock,
        mixer=partial(QKNormAttention, heads=heads, kv_heads=kv_heads, rotary_base=500.0),
        feed_forward=partial(SwiGLU, hidden=hidden),
        norm=norm,
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm))
    theirs = qwen3.Qwen3ForCausalLM(
        qwen3.Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_qwen3(ours, values(ours)))
    return ours, theirs


def as_qwen3(network: Decoder, tensors: Named) -> Named:
    named = named_as_llama(network, tensors)
    for layer in range(len(network.layers)):
        for name in ("query", "key"):
            weight = tensors[f"blocks.{layer}.mixer.{name}_norm.weight"]
            named[f"model.layers.{layer}.self_attn.{name[0]}_norm.weight"] = weight
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "hidden", "depth", "batch", "time"),
    [(32, 8, 8, 24, 2, 2, 7), (32, 8, 2, 24, 2, 2, 11), (48, 4, 1, 31, 1, 1, 13), (12, 3, 3, 5, 1, 3, 1)],
)
def test_logits_steps_and_gradients_are_those_of_qwen3(dim, heads, kv_heads, hidden, depth, batch, time):
    assert_same_network(*pair(dim, heads, kv_heads, hidden, depth), as_qwen3, batch, time)
