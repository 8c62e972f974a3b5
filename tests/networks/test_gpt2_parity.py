"""Learned positions, plain attention with biases and the GELU perceptron: GPT-2 of transformers, on the same weights.

Its `Conv1D` keeps matrices transposed.
"""

from functools import partial

import pytest
import torch
from torch import nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.mlp import MLP
from llmx.mixers.plain_attention import PlainAttention
from llmx.networks.decoder import Decoder
from llmx.networks.embeddings import LearnedPositionEmbedding
from llmx.parts.norm import LayerNorm
from tests.parity import VOCAB, Named, assert_same_network, randomised, values

gpt2 = pytest.importorskip("transformers.models.gpt2")

SHAPES = [  # dim, heads, hidden, depth, batch, time
    (32, 8, 24, 2, 2, 7),
    (48, 4, 31, 3, 1, 13),
    (15, 3, 5, 1, 3, 1),
]


def pair(dim: int, heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    block = partial(
        PreNormBlock,
        mixer=partial(PlainAttention, heads=heads, bias=True),
        feed_forward=partial(MLP, hidden=hidden, activation="gelu_tanh", bias=True),
        norm=LayerNorm,
    )
    embedding = partial(LearnedPositionEmbedding, max_length=16)
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, embedding=embedding, norm=LayerNorm, tied=True))
    theirs = gpt2.GPT2LMHeadModel(
        gpt2.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=dim,
            n_layer=depth,
            n_head=heads,
            n_inner=hidden,
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_gpt2(ours, values(ours)))
    return ours, theirs


def as_gpt2(network: Decoder, tensors: Named) -> Named:
    named = {
        "transformer.wte.weight": tensors["embedding.table.weight"],
        "transformer.wpe.weight": tensors["embedding.positions.weight"],
        "transformer.ln_f.weight": tensors["norm.weight"],
        "transformer.ln_f.bias": tensors["norm.bias"],
        "lm_head.weight": tensors["embedding.table.weight"],
    }
    for layer in range(len(network.layers)):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            named |= {
                f"{theirs}.ln_1.{kind}": tensors[f"{ours}.mixer_norm.{kind}"],
                f"{theirs}.ln_2.{kind}": tensors[f"{ours}.feed_forward_norm.{kind}"],
                f"{theirs}.attn.c_attn.{kind}": tensors[f"{ours}.mixer.qkv.{kind}"].t(),
                f"{theirs}.attn.c_proj.{kind}": tensors[f"{ours}.mixer.out.{kind}"].t(),
                f"{theirs}.mlp.c_fc.{kind}": tensors[f"{ours}.feed_forward.up.{kind}"].t(),
                f"{theirs}.mlp.c_proj.{kind}": tensors[f"{ours}.feed_forward.down.{kind}"].t(),
            }
    return named


@pytest.mark.parametrize(("dim", "heads", "hidden", "depth", "batch", "time"), SHAPES)
def test_logits_steps_and_gradients_are_those_of_gpt2(dim, heads, hidden, depth, batch, time):
    assert_same_network(*pair(dim, heads, hidden, depth), as_gpt2, batch, time)


def test_more_tokens_than_positions_are_refused():
    ours, _ = pair(15, 3, 5, 1)
    with pytest.raises(ValueError, match=r"^max_length: 17 tokens for 16 learned positions$"):
        ours(torch.zeros(1, 17, dtype=torch.int64))
