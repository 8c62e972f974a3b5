"""A mixture of experts in every block against Mixtral of transformers, on the same weights, with its balance loss."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.moe import MixtureOfExperts
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.parts.norm import RMSNorm
from tests.parity import (
    CLOSE,
    VOCAB,
    Named,
    assert_same_gradients,
    assert_same_network,
    attention,
    ends,
    norms,
    randomised,
    values,
)

mixtral = pytest.importorskip("transformers.models.mixtral")


def as_mixtral(network: Decoder, tensors: Named) -> Named:
    named = ends(tensors)
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        named |= attention(block.mixer, tensors, ours, theirs) | norms(tensors, ours, theirs)
        named |= {
            f"{theirs}.mlp.gate.weight": tensors[f"{ours}.feed_forward.router.weight"],
            f"{theirs}.mlp.experts.gate_up_proj": tensors[f"{ours}.feed_forward.experts.gate_up"].transpose(1, 2),
            f"{theirs}.mlp.experts.down_proj": tensors[f"{ours}.feed_forward.experts.down"].transpose(1, 2),
        }
    return named


def pair(
    dim: int, heads: int, kv_heads: int, experts: int, top_k: int, hidden: int, depth: int
) -> tuple[Decoder, nn.Module]:
    norm = partial(RMSNorm, eps=1e-6)
    block = partial(
        PreNormBlock,
        mixer=partial(Attention, heads=heads, kv_heads=kv_heads, rotary_base=500.0),
        feed_forward=partial(MixtureOfExperts, experts=experts, top_k=top_k, hidden=hidden, balance=0.3),
        norm=norm,
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm))
    theirs = mixtral.MixtralForCausalLM(
        mixtral.MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            router_aux_loss_coef=0.3,
            output_router_logits=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
            experts_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_mixtral(ours, values(ours)))
    return ours, theirs


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "experts", "top_k", "hidden", "depth", "batch", "time"),
    [(32, 8, 8, 8, 2, 24, 2, 2, 7), (32, 8, 2, 4, 3, 24, 2, 2, 11), (48, 4, 1, 2, 2, 31, 1, 1, 13)],
)
def test_logits_steps_and_gradients_are_those_of_mixtral(
    dim, heads, kv_heads, experts, top_k, hidden, depth, batch, time
):
    ours, theirs = pair(dim, heads, kv_heads, experts, top_k, hidden, depth)
    assert_same_network(ours.eval(), theirs, as_mixtral, batch, time)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 3)])
def test_the_balance_loss_is_that_of_mixtral_where_there_is_one_layer(experts: int, top_k: int):
    """Theirs is k times ours in scale, and pools the layers where ours adds them up."""
    ours, theirs = pair(32, 4, 4, experts, top_k, 24, 1)
    tokens, targets = torch.randint(1, VOCAB, (2, 3, 9))
    auxiliary = ours.train().losses(tokens, targets)[1]
    expected = theirs(input_ids=tokens, labels=tokens).aux_loss * 0.3 / top_k
    assert_close(auxiliary, expected, **CLOSE)
    auxiliary.backward()
    expected.backward()
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert_same_gradients(ours, theirs, as_mixtral)
