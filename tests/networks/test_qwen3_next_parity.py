"""Gated attention, Gated DeltaNet, and a stack of both, against Qwen3-Next without experts, on the same weights.

There the query projection of attention holds the gate too, head by head; the projections of Gated DeltaNet lie key head
by key head; and the norms multiply by 1 + weight, but for the one inside Gated DeltaNet.
"""

from functools import partial

import pytest
import torch

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.gated_attention import GatedAttention
from llmx.mixers.gated_deltanet import GatedDeltaNet
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from llmx.protocol import Site
from tests.parity import (
    VOCAB,
    Named,
    assert_same_mixer,
    assert_same_network,
    ends,
    feed_forward,
    hidden_future,
    minus_one,
    norms,
    randomised,
    values,
)

qwen3_next = pytest.importorskip("transformers.models.qwen3_next")
modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def as_attention(mixer: GatedAttention, tensors: Named, prefix: str = "") -> Named:
    widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    query, key, value = tensors[f"{prefix}qkv.weight"].split(widths)
    both = [weight.unflatten(0, (mixer.heads, mixer.head_dim)) for weight in (query, tensors[f"{prefix}gate.weight"])]
    return {
        "q_proj.weight": torch.cat(both, 1).flatten(0, 1),
        "k_proj.weight": key,
        "v_proj.weight": value,
        "q_norm.weight": tensors[f"{prefix}query_norm.weight"],
        "k_norm.weight": tensors[f"{prefix}key_norm.weight"],
        "o_proj.weight": tensors[f"{prefix}out.weight"],
    }


def as_gated_deltanet(mixer: GatedDeltaNet, tensors: Named, prefix: str = "") -> Named:
    """A key head has its value heads with it, their gates, and their rates."""
    u, gate, rate, decay = tensors[f"{prefix}project.weight"].split(mixer.widths)
    parts = [part.unflatten(0, (mixer.key_heads, -1)) for part in (*u.split(mixer.convolved), gate, rate, decay)]
    return {
        "in_proj_qkvz.weight": torch.cat(parts[:4], 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(parts[4:], 1).flatten(0, 1),
        "conv1d.weight": tensors[f"{prefix}convolution.taps"].t()[:, None],
        "A_log": tensors[f"{prefix}decay_log"],
        "dt_bias": tensors[f"{prefix}decay_bias"],
        "norm.weight": tensors[f"{prefix}norm.weight"],
        "out_proj.weight": tensors[f"{prefix}out.weight"],
    }


def as_qwen3_next(network: Decoder, tensors: Named) -> Named:
    named = ends(tensors)
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}.block", f"model.layers.{layer}"
        if isinstance(block.mixer, GatedDeltaNet):
            slot, mixer = "linear_attn", as_gated_deltanet(block.mixer, tensors, f"{ours}.mixer.")
        else:
            slot, mixer = "self_attn", as_attention(block.mixer, tensors, f"{ours}.mixer.")
        named |= {f"{theirs}.{slot}.{name}": tensor for name, tensor in mixer.items()}
        named |= feed_forward(tensors, ours, theirs) | norms(tensors, ours, theirs)
    return named


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
def test_outputs_steps_and_gradients_of_attention_are_those_of_qwen3_next(dim, heads, kv_heads, fraction, batch, time):
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
    theirs.load_state_dict(minus_one(as_attention(ours, values(ours))))
    rotary = modeling.Qwen3NextRotaryEmbedding(config)

    def run(x):
        return theirs(x, rotary(x, torch.arange(time)[None]), hidden_future(time))[0]

    assert_same_mixer(ours, theirs, run, as_attention, batch, time, dim)


@pytest.mark.parametrize(
    ("dim", "heads", "key_heads", "key_dim", "value_dim", "convolution", "batch", "time"),
    [
        (16, 2, 2, 8, 8, 4, 2, 7),
        (16, 4, 2, 6, 8, 4, 2, 11),
        (24, 6, 2, 4, 5, 3, 1, 70),
        (16, 4, 1, 8, 8, 4, 3, 1),
    ],
)
def test_outputs_steps_and_gradients_of_gated_deltanet_are_those_of_qwen3_next(
    dim, heads, key_heads, key_dim, value_dim, convolution, batch, time
):
    ours = randomised(GatedDeltaNet(Site(dim), heads, key_heads, key_dim, value_dim, convolution))
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=dim,
        num_hidden_layers=4,
        linear_num_value_heads=heads,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=convolution,
        rms_norm_eps=ours.norm.eps,
    )
    theirs = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0).eval()
    theirs.load_state_dict(as_gated_deltanet(ours, values(ours)))
    assert_same_mixer(ours, theirs, theirs, as_gated_deltanet, batch, time, dim)


@pytest.mark.parametrize(("batch", "time"), [(2, 11), (1, 1)])
def test_logits_and_gradients_are_those_of_qwen3_next(batch: int, time: int):
    dim, heads, key_heads, hidden = 32, 4, 2, 20
    norm = partial(RMSNorm, eps=1e-6)
    deltanet, attention = (
        partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=hidden), norm=norm)
        for mixer in (
            partial(GatedDeltaNet, heads=heads, key_heads=key_heads),
            partial(GatedAttention, heads=heads, rotary_base=500.0),
        )
    )
    block = partial(Cycle, blocks=[deltanet, deltanet, deltanet, attention])
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=4, norm=norm))
    config = qwen3_next.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=4,
        mlp_only_layers=[0, 1, 2, 3],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim // heads,
        linear_num_value_heads=heads,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=dim // heads,
        linear_value_head_dim=dim // heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    theirs = qwen3_next.Qwen3NextForCausalLM(config).eval()
    named = as_qwen3_next(ours, values(ours))
    inner = {name: tensor for name, tensor in named.items() if "linear_attn" in name}
    theirs.load_state_dict(minus_one(named) | inner)
    assert_same_network(ours, theirs, as_qwen3_next, batch, time)
