"""Differential attention against DiffLlama of transformers, on the same weights.

It has no gain in the norm of a head, and keeps a head's value as two of its heads, the halves of all heads in turn.
"""

from functools import partial

import pytest
from torch import Tensor, nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.differential import DifferentialAttention
from llmx.networks.decoder import Decoder
from tests.parity import VOCAB, Named, assert_same_network, randomised, values

diffllama = pytest.importorskip("transformers.models.diffllama")


def pair(dim: int, heads: int, kv_heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    block = partial(
        PreNormBlock,
        mixer=partial(DifferentialAttention, heads=heads, kv_heads=kv_heads, rotary_base=500.0),
        feed_forward=partial(SwiGLU, hidden=hidden),
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth))
    for layer in ours.layers:
        nn.init.ones_(layer.mixer.norm.weight)
    theirs = diffllama.DiffLlamaForCausalLM(
        diffllama.DiffLlamaConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=2 * heads,
            num_key_value_heads=2 * kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_diffllama(ours, values(ours)))
    return ours, theirs


def as_diffllama(network: Decoder, tensors: Named) -> Named:
    named: dict[str, Tensor] = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }
    for layer, block in enumerate(network.layers):
        mixer, ours, theirs = block.mixer, f"blocks.{layer}", f"model.layers.{layer}"
        widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
        query, key, value = tensors[f"{ours}.mixer.qkv.weight"].split(widths)
        value = value.unflatten(0, (mixer.kv_heads, 2, -1)).transpose(0, 1).flatten(0, 2)
        gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.mixer.out.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.mixer_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": tensors[f"{ours}.feed_forward_norm.weight"],
        }
        lambdas = zip(("q1", "k1", "q2", "k2"), tensors[f"{ours}.mixer.lambdas"], strict=True)
        named |= {f"{theirs}.self_attn.lambda_{name}": vector for name, vector in lambdas}
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "hidden", "depth", "batch", "time"),
    [(32, 4, 4, 24, 2, 2, 7), (32, 4, 2, 24, 2, 2, 11), (48, 4, 1, 31, 3, 1, 13), (12, 3, 3, 5, 1, 3, 1)],
)
def test_logits_steps_and_gradients_are_those_of_diffllama(dim, heads, kv_heads, hidden, depth, batch, time):
    assert_same_network(*pair(dim, heads, kv_heads, hidden, depth), as_diffllama, batch, time)
