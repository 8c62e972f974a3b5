"""Linear attention as its weights say it, all pairs at once, and the normaliser that a state has to carry."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from llmx.mixers.linear_attention import LinearAttention
from llmx.protocol import Site
from tests.parity import context, randomised

SAME = {"rtol": 1e-10, "atol": 1e-10}


def mixer() -> LinearAttention:
    """Its output is the heads as they are."""
    made = randomised(LinearAttention(Site(dim=12), heads=3)).double()
    nn.init.eye_(made.out.weight)
    return made


def test_outputs_are_averages_of_the_values_by_the_products_of_features():
    made = mixer()
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    query, key, value = made.qkv(x).unflatten(-1, (3, 3, 4)).unbind(-3)
    scores = torch.einsum("bthk,bshk->bhts", F.elu(query) + 1, F.elu(key) + 1).tril()
    weights = scores / scores.sum(-1, keepdim=True)
    expected = torch.einsum("bhts,bshk->bthk", weights, value).flatten(2)
    assert_close(made(x, context(x)), expected, rtol=1e-6, atol=1e-6)  # the constant in the normaliser


def test_the_first_token_reads_its_own_value():
    made = mixer()
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    assert_close(made(x, context(x)), made.qkv(x)[..., 24:], rtol=1e-6, atol=1e-6)


def test_one_token_over_and_over_reads_one_value_however_the_text_is_cut():
    made = mixer()
    x = torch.randn(1, 1, 12, dtype=torch.float64).expand(2, 30, 12)
    value = made.qkv(x)[..., 24:]
    state = made.init_state(2, 30)
    outputs = []
    for piece in x.split([7, 1, 22], 1):
        output, state = made.prefill(piece, state, context(piece))
        outputs.append(output)
    output, _ = made.step(x[:, 0], state, context(x).at(0))
    assert_close(torch.cat((*outputs, output[:, None]), 1), value[:, :1].expand(-1, 31, -1), rtol=1e-6, atol=1e-6)


def test_the_state_does_not_grow_with_the_room_that_is_asked_for():
    made = mixer()
    assert [x.shape for x in made.init_state(2, 5)] == [x.shape for x in made.init_state(2, 50_000)]


def test_values_that_are_far_away_count_as_much_as_near_ones():
    made = mixer()
    x = torch.randn(1, 40, 12, dtype=torch.float64)
    swapped = torch.cat((x[:, :39].flip(1), x[:, 39:]), 1)
    assert_close(made(x, context(x))[:, -1], made(swapped, context(x))[:, -1], **SAME)
