"""DeltaProduct: the paper's equation step by step, DeltaNet for one step, and rotations for two."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.deltanet import DeltaNet
from llmx.mixers.deltaproduct import DeltaProduct
from llmx.protocol import Site
from tests.delta import assert_is_the_paper, convolved, naive, normed, unit
from tests.parity import context, randomised

DIM, TIME = 12, 37


def paper(mixer: DeltaProduct, x: Tensor) -> tuple[Tensor, Tensor]:
    """As many tokens as there are steps, of which the last of each n is read."""
    steps, heads = mixer.steps, mixer.heads
    u, rate = mixer.project(x).split(mixer.widths, -1)
    query, key, value = convolved(u, mixer.convolution.taps).split(mixer.convolved, -1)
    key, value, rate = (
        torch.stack(y.chunk(steps, -1), 2).flatten(1, 2).unflatten(-1, (heads, -1)) for y in (key, value, rate)
    )
    query = (unit(query.unflatten(-1, (heads, -1))) / mixer.head_dim**0.5).repeat_interleave(steps, 1)
    beta = mixer.beta_max * torch.sigmoid(rate[..., 0])
    memory = x.new_zeros(len(x), heads, mixer.head_dim, mixer.head_dim)
    outputs, memory = naive(query, unit(key), value, beta, torch.zeros_like(key), memory)
    return mixer.out(normed(outputs[:, steps - 1 :: steps], mixer.norm).flatten(2)), memory


@pytest.mark.parametrize(("heads", "steps", "beta_max"), [(3, 2, 2.0), (2, 3, 1.0)])
def test_outputs_memory_and_gradients_are_those_of_the_paper(heads: int, steps: int, beta_max: float):
    assert_is_the_paper(DeltaProduct(Site(DIM), heads, steps, beta_max=beta_max), paper, DIM, TIME)


@torch.no_grad()
def test_one_step_a_token_is_deltanet():
    ours = randomised(DeltaProduct(Site(DIM), 3, steps=1))
    theirs = DeltaNet(Site(DIM), 3, beta_max=2.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, TIME, DIM)
    assert torch.equal(ours(x, context(x)), theirs(x, context(x)))


@torch.no_grad()
@pytest.mark.parametrize(("steps", "follows"), [(2, True), (1, False)])
def test_two_reflections_are_a_rotation_that_counts_and_one_cannot_turn(steps: int, follows: bool):
    """Every token turns the memory by a fifth of a circle: what it holds comes back after 5 and not before."""
    mixer = DeltaProduct(Site(4), heads=1, steps=steps, convolution=1).double()
    mixer.project.weight.zero_()
    mixer.convolution.taps.fill_(1.0)
    keys = mixer.project.weight[4 : 4 + 4 * steps].view(steps, 4, 4)
    for j in range(steps):  # reflections in two lines, an angle of a tenth of a circle between them
        angle = 0.3 + j * math.pi / 5
        keys[j, :2, 0] = 1e4 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    mixer.project.weight[-steps:, 0] = 100.0  # the highest rate
    x = torch.zeros(1, 5, 4, dtype=torch.float64)
    x[..., 0] = 1
    held = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    held[..., 0, 0] = 1
    state, seen = mixer.init_state(1, 5)._replace(memory=held), []
    for t in range(5):
        state = mixer.step(x[:, t], state, context(x).at(t))[1]
        seen.append(state.memory)
    turns = torch.stack([memory[0, 0, 0, 0] for memory in seen])  # the cosine of the angle so far
    expected = torch.cos(2 * math.pi * torch.arange(1, 6, dtype=torch.float64) / 5)
    if follows:
        assert_close(turns, expected, rtol=1e-6, atol=1e-6)
    else:
        assert_close(seen[1], held, rtol=1e-6, atol=1e-6)  # two of the same reflection are none
    assert_close(mixer.prefill(x, mixer.init_state(1, 5)._replace(memory=held), context(x))[1].memory, seen[-1])


@pytest.mark.parametrize(
    ("name", "arguments"), [("heads", {"heads": 5}), ("steps", {"steps": 0}), ("beta_max", {"beta_max": 2.5})]
)
def test_arguments_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DeltaProduct(Site(DIM), **arguments)
