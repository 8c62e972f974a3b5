"""Differential attention against the paper's equation, head by head, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.differential import DifferentialAttention
from llmx.parts.rotary import rotary_table, rotate
from llmx.protocol import Site
from tests.parity import context, randomised

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64
DIM, TIME = 48, 9


@pytest.mark.parametrize(("heads", "kv_heads", "layer"), [(3, 3, 0), (4, 2, 1), (6, 1, 3)])
def test_outputs_are_the_difference_of_two_maps_normed_and_scaled(heads, kv_heads, layer):
    made = randomised(DifferentialAttention(Site(dim=DIM, layer=layer, depth=4), heads, kv_heads)).double()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    width = DIM // (2 * heads)
    query, key, value = made.qkv(x).split([2 * n * width for n in (heads, kv_heads, kv_heads)], -1)
    table = rotary_table(torch.arange(TIME), width, 10000.0, x.dtype)
    ahead = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)

    def attention_map(which: int, head: int, group: int) -> Tensor:
        one = rotate(query.unflatten(-1, (2, heads, width))[:, :, which, head], table)
        two = rotate(key.unflatten(-1, (2, kv_heads, width))[:, :, which, group], table)
        return (one @ two.transpose(-1, -2) / math.sqrt(width)).masked_fill(ahead, float("-inf")).softmax(-1)

    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    query1, key1, query2, key2 = made.lambdas
    scale = torch.exp(query1 @ key1) - torch.exp(query2 @ key2) + start
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        weights = attention_map(0, head, group) - scale * attention_map(1, head, group)
        mixed = weights @ value.unflatten(-1, (kv_heads, 2 * width))[:, :, group]
        normed = mixed / (mixed.square().mean(-1, keepdim=True) + made.norm.eps).sqrt() * made.norm.weight
        outputs.append((1 - start) * normed)
    expected = made.out(torch.cat(outputs, -1))
    assert_close(made(x, context(x)), expected, **EXACT)
    prefilled, _ = made.prefill(x, made.init_state(2, TIME), context(x))
    assert_close(prefilled, expected, **EXACT)


def test_the_norm_of_a_head_never_sees_time():
    made = randomised(DifferentialAttention(Site(dim=DIM), 3)).double()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    louder = x.clone()
    louder[:, -1] *= 100
    assert_close(made(x, context(x))[:, :-1], made(louder, context(x))[:, :-1], **EXACT)


def test_a_head_needs_four_parts_of_the_width():
    with pytest.raises(ValueError, match="heads: dim 48 must divide into 4 parts for each of 8 heads"):
        DifferentialAttention(Site(dim=DIM), heads=8)
    with pytest.raises(ValueError, match="kv_heads: 2 must divide heads 3"):
        DifferentialAttention(Site(dim=DIM), heads=3, kv_heads=2)
