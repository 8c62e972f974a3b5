"""Attention with a sink, over the past and over a window, against the attention of GPT-OSS, on the same weights."""

import pytest
import torch

from llmx.mixers.sinks import SinkAttention, SinkWindowAttention
from llmx.protocol import Site
from tests.parity import Named, assert_same_mixer, hidden_future, randomised, values

gpt_oss = pytest.importorskip("transformers.models.gpt_oss")
modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")


def as_gpt_oss(mixer: SinkAttention | SinkWindowAttention, tensors: Named) -> Named:
    widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    named = {"sinks": tensors["sink"]}
    for kind in ("weight", "bias"):
        query, key, value = tensors[f"qkv.{kind}"].split(widths)
        named |= {
            f"q_proj.{kind}": query,
            f"k_proj.{kind}": key,
            f"v_proj.{kind}": value,
            f"o_proj.{kind}": tensors[f"out.{kind}"],
        }
    return named


@pytest.mark.parametrize("window", [None, 1, 3, 4, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "batch", "time"), [(8, 8, 2, 7), (8, 2, 2, 11), (4, 1, 1, 1)])
def test_outputs_steps_and_gradients_are_those_of_gpt_oss(window, heads, kv_heads, batch, time):
    shape = {"heads": heads, "kv_heads": kv_heads, "bias": True, "rotary_base": 500.0}
    if window is None:
        ours = randomised(SinkAttention(Site(dim=32), **shape))
    else:
        ours = randomised(SinkWindowAttention(Site(dim=32), **shape, window=window))
    config = gpt_oss.GptOssConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32 // heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    theirs = modeling.GptOssAttention(config, layer_idx=0).eval()
    theirs.load_state_dict(as_gpt_oss(ours, values(ours)))
    rotary = modeling.GptOssRotaryEmbedding(config)

    def run(x):
        return theirs(x, rotary(x, torch.arange(time)[None]), hidden_future(time, window))[0]

    assert_same_mixer(ours, theirs, run, as_gpt_oss, batch, time, 32)
