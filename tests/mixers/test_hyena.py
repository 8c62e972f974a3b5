"""Hyena: its equation as sums, the filter, and the end of the text that must not wrap round to its beginning."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.hyena import Hyena
from llmx.parts.long_convolution import long_convolution
from llmx.protocol import Context, Site
from tests.forms import perturbed

DIM, LONGEST = 6, 20
SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def made() -> Hyena:
    torch.manual_seed(0)
    return perturbed(Hyena(Site(dim=DIM), max_length=LONGEST, filter_hidden=5, bands=3))


def tap(mixer: Hyena, lag: int) -> Tensor:
    """The filter at one lag, (D,)."""
    network, share = mixer.filter, lag / LONGEST
    turns = [2 * math.pi * share * band for band in (1, 2, 3)]
    hidden = torch.tensor([share, *map(math.cos, turns), *map(math.sin, turns)], dtype=torch.float64)
    for layer in network.layers:
        hidden = torch.sin(network.slopes * (layer.weight @ hidden + layer.bias))
    taps = []
    for channel in range(DIM):
        rate = math.log(100) * (1 / 1.5 + (1 / 0.3 - 1 / 1.5) * channel / (DIM - 1))
        taps.append((network.last.weight[channel] @ hidden) * (math.exp(-rate * share) + 0.05))
    return torch.stack(taps)


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 2, 13, LONGEST])
def test_outputs_are_the_equation(time: int):
    mixer = made()
    x = torch.randn(2, time, DIM, dtype=torch.float64)
    query, key, value = mixer.short(x @ mixer.project.weight.T).chunk(3, -1)
    u = key * value
    output = mixer(x, context(x))
    for t in range(time):
        mixed = sum(tap(mixer, t - s) * u[:, s] for s in range(t + 1)) + mixer.skip * u[:, t]
        assert_close(output[:, t], (query[:, t] * mixed) @ mixer.out.weight.T, **SAME)


def test_the_convolution_does_not_wrap_round():
    u = torch.zeros(1, 8, 2, dtype=torch.float64)
    u[0, 7] = 1.0  # only the last token
    mixed = long_convolution(u, torch.ones(8, 2, dtype=torch.float64))
    assert mixed[0, :7].abs().max() < 1e-12
    assert_close(mixed[0, 7], torch.ones(2, dtype=torch.float64))


@torch.no_grad()
def test_outputs_do_not_depend_on_later_tokens():
    mixer, x = made(), torch.randn(1, 16, DIM, dtype=torch.float64)
    before = mixer(x, context(x))
    for t in range(16):
        moved = x.clone()
        moved[:, t:] += 100.0
        assert_close(mixer(moved, context(moved))[:, :t], before[:, :t], rtol=0, atol=1e-7)


def test_the_filter_of_a_lag_is_the_same_in_a_text_of_any_length():
    mixer = made()
    assert_close(mixer.filter(5), mixer.filter(LONGEST)[:5], **SAME)


def test_a_text_longer_than_the_filter_is_refused():
    mixer, x = made(), torch.randn(1, LONGEST + 1, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^max_length: 21 tokens"):
        mixer(x, context(x))
    with pytest.raises(ValueError, match=r"^max_length: 21 tokens"):
        mixer.init_state(1, LONGEST + 1)


@pytest.mark.parametrize("name", ["max_length", "filter_hidden", "bands"])
def test_sizes_below_one_are_named(name: str):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Hyena(Site(dim=DIM), **{name: 0})


@torch.no_grad()
def test_prefill_writes_in_place_and_leaves_later_slots_alone():
    mixer, x = made(), torch.randn(2, 5, DIM, dtype=torch.float64)
    state = mixer.init_state(2, 9)
    _, after = mixer.prefill(x, state, context(x.expand(2, 5, DIM)))
    assert after.past.data_ptr() == state.past.data_ptr()
    assert after.past[:, :, :5].abs().min() > 0
    assert not after.past[:, :, 5:].any()
