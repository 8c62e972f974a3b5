"""Latent attention: what it keeps, and decoding from it."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from llmx.mixers.attention import Attention
from llmx.mixers.latent_attention import LatentAttention
from llmx.protocol import Site
from tests.parity import context, randomised

DIM, TIME = 64, 9


def numbers_a_token(mixer) -> int:
    one, two = (sum(leaf.numel() for leaf in tree_leaves(mixer.init_state(1, length))) for length in (8, 9))
    return two - one


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_a_token_leaves_its_latent_and_one_rotated_key_however_many_heads_there_are(heads):
    site = Site(dim=DIM)
    assert numbers_a_token(LatentAttention(site, heads, latent=16, rotary_dim=4)) == 16 + 4
    assert numbers_a_token(Attention(site, heads)) == 2 * DIM
    made = LatentAttention(site, heads, latent=16, rotary_dim=4)
    assert sum(leaf.numel() for leaf in tree_leaves(made.init_state(3, TIME))) == 3 * TIME * (16 + 4)  # nothing else


def test_decoding_makes_no_keys_and_values_of_the_past():
    """The latent is turned into keys and values by the matrix `up`, which a step uses as a matrix alone."""
    made = randomised(LatentAttention(Site(dim=DIM)))
    x = torch.randn(2, TIME, DIM)
    expected = made(x, context(x))
    called = []
    made.up.register_forward_hook(lambda *_: called.append(1))
    state, outputs = made.init_state(2, TIME), []
    for t in range(TIME):
        output, state = made.step(x[:, t], state, context(x).at(t))
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), expected, rtol=1e-5, atol=1e-5)
    assert not called


def test_only_the_slice_that_is_rotated_knows_positions():
    made = randomised(LatentAttention(Site(dim=DIM))).double()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    here, later = context(x), context(x)
    later.positions = later.positions * 7
    assert not torch.allclose(made(x, here), made(x, later))
    shifted = context(x)
    shifted.positions = shifted.positions + 1000
    assert_close(made(x, shifted), made(x, context(x)))  # only distances matter
    with torch.no_grad():
        made.down.weight[made.latent :] = 0
    assert torch.equal(made(x, context(x)), made(x, later))


def test_with_no_rotated_slice_no_position_matters_and_the_latent_is_all_that_is_kept():
    made = randomised(LatentAttention(Site(dim=DIM), latent=16, rotary_dim=0)).double()
    assert numbers_a_token(made) == 16
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    shuffled = torch.cat((x[:, torch.randperm(TIME - 1)], x[:, -1:]), 1)
    expected = made(x, context(x))
    assert_close(made(shuffled, context(x))[:, -1], expected[:, -1])
    state, outputs = made.init_state(2, TIME), []
    for t in range(TIME):
        output, state = made.step(x[:, t], state, context(x).at(t))
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), expected)


def test_widths_have_to_fit():
    with pytest.raises(ValueError, match="heads: 5 heads must divide dim 64"):
        LatentAttention(Site(dim=DIM), heads=5)
    with pytest.raises(ValueError, match="latent: 0 is below 1"):
        LatentAttention(Site(dim=DIM), latent=0)
    with pytest.raises(ValueError, match="head_dim: 0 is below 1"):
        LatentAttention(Site(dim=DIM), head_dim=0)
    with pytest.raises(ValueError, match="rotary_dim: 5"):
        LatentAttention(Site(dim=DIM), rotary_dim=5)
