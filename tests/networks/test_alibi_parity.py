"""ALiBi against MPT, as a whole model, and against the attention of Bloom, which has biases, on the same weights.

Bloom keeps query, key and value of a head side by side, and its bias is the slope times the key's position, which
differs from ours by a number a query, of which the softmax knows nothing.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.mlp import MLP
from llmx.mixers.alibi import ALiBiAttention, alibi_slopes
from llmx.networks.decoder import Decoder
from llmx.parts.norm import LayerNorm
from llmx.protocol import Site
from tests.parity import (
    VOCAB,
    Named,
    assert_same_mixer,
    assert_same_network,
    hidden_future,
    randomised,
    values,
)

bloom = pytest.importorskip("transformers.models.bloom")
mpt = pytest.importorskip("transformers.models.mpt")
bloom_modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")


def mpt_pair(dim: int, heads: int, depth: int) -> tuple[Decoder, nn.Module]:
    norm = partial(LayerNorm, bias=False)
    block = partial(
        PreNormBlock, mixer=partial(ALiBiAttention, heads=heads), feed_forward=partial(MLP, hidden=4 * dim), norm=norm
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm, tied=True))
    theirs = mpt.MptForCausalLM(
        mpt.MptConfig(vocab_size=VOCAB, d_model=dim, n_heads=heads, n_layers=depth, max_seq_len=16)
    ).eval()
    theirs.load_state_dict(as_mpt(ours, values(ours)))
    return ours, theirs


def as_mpt(network: Decoder, tensors: Named) -> Named:
    named = {
        "transformer.wte.weight": tensors["embedding.table.weight"],
        "transformer.norm_f.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["embedding.table.weight"],
    }
    for layer in range(len(network.layers)):
        ours, theirs = f"blocks.{layer}", f"transformer.blocks.{layer}"
        named |= {
            f"{theirs}.norm_1.weight": tensors[f"{ours}.mixer_norm.weight"],
            f"{theirs}.norm_2.weight": tensors[f"{ours}.feed_forward_norm.weight"],
            f"{theirs}.attn.Wqkv.weight": tensors[f"{ours}.mixer.qkv.weight"],
            f"{theirs}.attn.out_proj.weight": tensors[f"{ours}.mixer.out.weight"],
            f"{theirs}.ffn.up_proj.weight": tensors[f"{ours}.feed_forward.up.weight"],
            f"{theirs}.ffn.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
        }
    return named


def as_bloom(mixer: ALiBiAttention, tensors: Named) -> Named:
    named = {}
    for kind in ("weight", "bias"):
        thirds = tensors[f"qkv.{kind}"].unflatten(0, (3, mixer.heads, mixer.head_dim))
        named |= {
            f"query_key_value.{kind}": thirds.transpose(0, 1).flatten(0, 2),
            f"dense.{kind}": tensors[f"out.{kind}"],
        }
    return named


@pytest.mark.parametrize(
    ("dim", "heads", "depth", "batch", "time"),
    [(32, 8, 2, 2, 7), (24, 4, 1, 1, 13), (32, 1, 1, 3, 1), (36, 6, 2, 2, 9)],
)
def test_logits_steps_and_gradients_are_those_of_mpt(dim, heads, depth, batch, time):
    ours, theirs = mpt_pair(dim, heads, depth)
    assert_same_network(ours, theirs, as_mpt, batch, time)


@pytest.mark.parametrize(("dim", "heads", "batch", "time"), [(32, 8, 2, 11), (36, 6, 2, 7), (36, 3, 1, 5)])
def test_outputs_steps_and_gradients_are_those_of_bloom(dim, heads, batch, time):
    ours = randomised(ALiBiAttention(Site(dim=dim), heads=heads, bias=True))
    theirs = bloom_modeling.BloomAttention(bloom.BloomConfig(hidden_size=dim, n_head=heads), layer_idx=0).eval()
    theirs.load_state_dict(as_bloom(ours, values(ours)))
    alibi = bloom_modeling.build_alibi_tensor(torch.ones(batch, time), heads, torch.float32)

    def run(x):
        return theirs(x, torch.zeros_like(x), alibi, hidden_future(time))[0]

    assert_same_mixer(ours, theirs, run, as_bloom, batch, time, dim)


@pytest.mark.parametrize("heads", range(1, 20))
def test_slopes_are_those_of_bloom_for_any_number_of_heads(heads):
    theirs = bloom_modeling.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert_close(torch.tensor(alibi_slopes(heads)), theirs)
