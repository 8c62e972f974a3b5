"""HGRN2: key and gate are one, the memory is a running mean, the bounds belong to the stack."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.none import NoFeedForward
from llmx.mixers.hgrn2 import BOUNDS, HGRN2
from llmx.networks.decoder import Decoder
from llmx.protocol import Site
from tests.forms import SAME, perturbed
from tests.parity import VOCAB, context, randomised

DIM, HEADS, DEPTH = 12, 3, 4


def network(depth: int = DEPTH) -> Decoder:
    block = partial(PreNormBlock, mixer=partial(HGRN2, heads=HEADS), feed_forward=NoFeedForward)
    return perturbed(Decoder(VOCAB, block, dim=DIM, depth=depth))


def bounds(made: Decoder) -> torch.Tensor:
    _, passed = made.hidden(torch.zeros(1, 2, dtype=torch.int64))
    return passed.store[BOUNDS][0, 0]  # (L, D)


def test_the_bounds_rise_from_exactly_zero_in_the_first_layer():
    rising = bounds(network())
    assert torch.equal(rising[0], torch.zeros(DIM, dtype=torch.float64))
    assert (rising.diff(dim=0) > 0).all()
    assert (rising < 1).all()


def test_the_bounds_start_evenly_spaced():
    block = partial(PreNormBlock, mixer=partial(HGRN2, heads=HEADS), feed_forward=NoFeedForward)
    assert_close(bounds(Decoder(VOCAB, block, dim=DIM, depth=DEPTH))[:, 0], torch.tensor([0, 0.25, 0.5, 0.75]))


def test_one_layer_owns_the_bounds_of_all():
    names = [name for name, _ in network().named_parameters() if "bounds" in name]
    assert names == ["blocks.0.mixer.bounds"]
    assert not any("bounds" in name for name, _ in network(1).named_parameters())


def test_all_layers_above_shape_the_bounds():
    made = network()
    made(torch.arange(9)[None]).square().sum().backward()
    assert (made.blocks[0].mixer.bounds.grad.abs().amax(1) > 0).all()


def test_step_hands_on_the_bounds():
    made, tokens = network(), torch.arange(9)[None]
    state, logits = made.init_state(1, 9), []
    for t in range(9):
        one, state = made.step(tokens[:, t], state)
        logits.append(one)
    assert_close(torch.stack(logits, 1), made(tokens), **SAME)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_closed_gate_keeps_what_the_bound_says(layer):
    mixer = randomised(HGRN2(Site(dim=DIM, layer=layer, depth=DEPTH, occurrence=layer), heads=HEADS)).double()
    with torch.no_grad():
        mixer.project.weight[DIM : 2 * DIM] = -1e4  # the gate of a positive input is closed
    x = torch.rand(1, 1, DIM, dtype=torch.float64) + 0.1
    here = context(x)
    here.store[BOUNDS] = torch.linspace(0, 0.75, DEPTH, dtype=torch.float64)[:, None].expand(1, 1, DEPTH, DIM)
    start = torch.randn(1, HEADS, 4, 4, dtype=torch.float64)
    _, state = mixer.prefill(x, type(mixer.init_state(1, 1))(start), here)
    kept = [0.0, 0.25, 0.5, 0.75][layer]
    if layer == 0:  # it owns other bounds than those, and does not use them
        assert mixer.bounds is not None
    value = mixer.project(x)[0, 0, 2 * DIM :].view(HEADS, 1, 4)
    assert_close(state.memory[0], kept * start[0] + (1 - kept) * value.expand(-1, 4, -1))


def test_the_memory_never_leaves_the_range_of_the_values():
    mixer = randomised(HGRN2(Site(dim=DIM), heads=HEADS), std=1.0)
    x = torch.randn(1, 500, DIM) * 3
    _, state = mixer.prefill(x, mixer.init_state(1, 500), context(x))
    values = mixer.project(x)[..., 2 * DIM :].view(500, HEADS, 1, 4)
    assert (state.memory[0] <= values.amax(0).clamp(min=0) + 1e-4).all()
    assert (state.memory[0] >= values.amin(0).clamp(max=0) - 1e-4).all()
