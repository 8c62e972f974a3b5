"""KDA, and a stack of it with latent attention without positions, against Kimi Linear without experts.

There the full layers keep a shared key beside the latent, which is not rotated; here it has no width.
"""

from functools import partial
from typing import Any

import pytest

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.kda import KDA
from llmx.mixers.latent_attention import LatentAttention
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
    norms,
    randomised,
    values,
)

kimi_linear = pytest.importorskip("transformers.models.kimi_linear")
modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")


def config(dim: int, heads: int, convolution: int, **others: Any) -> Any:
    return kimi_linear.KimiLinearConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        linear_num_heads=heads,
        linear_head_dim=dim // heads,
        linear_conv_kernel_dim=convolution,
        num_local_experts=2,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **others,
    )


def as_kda(mixer: KDA, tensors: Named, prefix: str = "") -> Named:
    u, decay, gate, rate = tensors[f"{prefix}project.weight"].split(mixer.widths)
    query, key, value = u.chunk(3)
    return {
        "q_proj.weight": query,
        "k_proj.weight": key,
        "v_proj.weight": value,
        "conv1d.weight": tensors[f"{prefix}convolution.taps"].t()[:, None],
        "forget_gate.f_a_proj.weight": decay,
        "forget_gate.f_b_proj.weight": tensors[f"{prefix}decay_up.weight"],
        "forget_gate.dt_bias": tensors[f"{prefix}decay_bias"],
        "forget_gate.A_log": tensors[f"{prefix}decay_log"].view(1, 1, -1, 1),
        "b_proj.weight": rate,
        "g_a_proj.weight": gate,
        "g_b_proj.weight": tensors[f"{prefix}gate_up.weight"],
        "o_norm.weight": tensors[f"{prefix}norm.weight"],
        "o_proj.weight": tensors[f"{prefix}out.weight"],
    }


def as_latent_attention(mixer: LatentAttention, tensors: Named, prefix: str) -> Named:
    return {
        "q_proj.weight": tensors[f"{prefix}query.weight"],
        "kv_a_proj_with_mqa.weight": tensors[f"{prefix}down.weight"],
        "kv_a_layernorm.weight": tensors[f"{prefix}norm.weight"],
        "kv_b_proj.weight": tensors[f"{prefix}up.weight"],
        "o_proj.weight": tensors[f"{prefix}out.weight"],
    }


def as_kimi_linear(network: Decoder, tensors: Named) -> Named:
    named = ends(tensors)
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}.block", f"model.layers.{layer}"
        mixer = as_kda if isinstance(block.mixer, KDA) else as_latent_attention
        named |= {
            f"{theirs}.self_attn.{name}": tensor
            for name, tensor in mixer(block.mixer, tensors, f"{ours}.mixer.").items()
        }
        named |= feed_forward(tensors, ours, theirs) | norms(tensors, ours, theirs)
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "convolution", "batch", "time"), [(16, 4, 4, 2, 7), (12, 2, 3, 1, 70), (16, 2, 4, 3, 1)]
)
def test_outputs_steps_and_gradients_of_kda_are_those_of_kimi_linear(dim, heads, convolution, batch, time):
    ours = randomised(KDA(Site(dim), heads, convolution=convolution))
    theirs = modeling.KimiLinearDeltaAttention(config(dim, heads, convolution), layer_idx=0).eval()
    theirs.load_state_dict(as_kda(ours, values(ours)))
    assert_same_mixer(ours, theirs, theirs, as_kda, batch, time, dim)


@pytest.mark.parametrize(("batch", "time"), [(2, 11), (1, 1)])
def test_logits_and_gradients_are_those_of_kimi_linear(batch: int, time: int):
    dim, heads, latent, hidden = 16, 2, 6, 20
    norm = partial(RMSNorm, eps=1e-6)
    kda, attention = (
        partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=hidden), norm=norm)
        for mixer in (
            partial(KDA, heads=heads),
            partial(LatentAttention, heads=heads, latent=latent, rotary_dim=0),
        )
    )
    block = partial(Cycle, blocks=[kda, kda, kda, attention])
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=4, norm=norm))
    theirs = kimi_linear.KimiLinearForCausalLM(
        config(
            dim,
            heads,
            4,
            intermediate_size=hidden,
            num_hidden_layers=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            mlp_layer_types=["dense"] * 4,
            kv_lora_rank=latent,
            qk_rope_head_dim=0,
            qk_nope_head_dim=dim // heads,
            v_head_dim=dim // heads,
        )
    ).eval()
    theirs.load_state_dict(as_kimi_linear(ours, values(ours)))
    assert_same_network(ours, theirs, as_kimi_linear, batch, time)
