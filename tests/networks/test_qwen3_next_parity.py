"""Gated attention against the attention of Qwen3-Next, on the same weights.

There the query projection holds the gate too, head by head, and the norms multiply by 1 + weight.
"""

import pytest
import torch

from llmx.mixers.gated_attention import GatedAttention
from llmx.protocol import Site
from tests.parity import Named, assert_same_mixer, hidden_future, minus_one, randomised, values

qwen3_next = pytest.importorskip("transformers.models.qwen3_next")
modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def as_qwen3_next(mixer: GatedAttention, tensors: Named) -> Named:
    widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    query, key, value = tensors["qkv.weight"].split(widths)
    both = [weight.unflatten(0, (mixer.heads, mixer.head_dim)) for weight in (query, tensors["gate.weight"])]
    return {
        "q_proj.weight": torch.cat(both, 1).flatten(0, 1),
        "k_proj.weight": key,
        "v_proj.weight": value,
        "q_norm.weight": tensors["query_norm.weight"],
        "k_norm.weight": tensors["key_norm.weight"],
        "o_proj.weight": tensors["out.weight"],
    }


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "fraction", "batch", "time"),
    [
        (32, 4, 4, 0.25, 2, 7),
        (32, 4, 2, 0.25, 2, 11),
        (64, 4, 1, 0.25, 1, 13),
        (32, 4, 2, 1.0, 1, 5),
        (32, 4, 4, 0.5, 3, 1),
    ],
)
def test_outputs_steps_and_gradients_are_those_of_qwen3_next(dim, heads, kv_heads, fraction, batch, time):
    ours = randomised(
        GatedAttention(Site(dim=dim), heads=heads, kv_heads=kv_heads, rotary_base=500.0, rotary_fraction=fraction)
    )
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=dim,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": fraction},
        attn_implementation="eager",
    )
    theirs = modeling.Qwen3NextAttention(config, layer_idx=3).eval()
    theirs.load_state_dict(minus_one(as_qwen3_next(ours, values(ours))))
    rotary = modeling.Qwen3NextRotaryEmbedding(config)

    def run(x):
        return theirs(x, rotary(x, torch.arange(time)[None]), hidden_future(time))[0]

    assert_same_mixer(ours, theirs, run, as_qwen3_next, batch, time, dim)
