"""Titans' memory: the paper's equations with gradients by autograd, a token at a time."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.titans import Titans
from llmx.protocol import Site
from tests.delta import convolved, normed, unit
from tests.forms import assert_same_outputs_and_gradients, perturbed
from tests.mini_batches import assert_a_token_reads_up_to_its_own, assert_rows_stand_where_they_like
from tests.parity import context, randomised

DIM, TIME, BATCH = 12, 37, 2


def paper(mixer: Titans, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, T, D), and the memory where the last mini-batch began, the memory and its momentum."""
    u, gate, rates = mixer.project(x).split(mixer.widths, -1)
    heads = (y.unflatten(-1, (mixer.heads, -1)) for y in convolved(u, mixer.convolution.taps).chunk(3, -1))
    query, key, value = heads
    alpha, eta, theta = torch.sigmoid(rates + mixer.rates)[..., None, None].chunk(3, 2)  # (B, T, H, 1, 1)
    theta = (1 - eta) * theta / mixer.mini_batch
    start = memory = mixer.memory.expand(len(x), -1, -1, -1) * 1
    momentum = torch.zeros_like(memory)
    outputs = []
    for t in range(x.shape[1]):
        if t % mixer.mini_batch == 0:
            start = memory
        error = (unit(key[:, t])[..., None, :] @ start)[..., 0, :] - value[:, t]
        (gradient,) = torch.autograd.grad(error.square().sum() / 2, start, create_graph=True)
        momentum = eta[:, t] * momentum - theta[:, t] * gradient
        memory = (1 - alpha[:, t]) * memory + momentum
        outputs.append((unit(query[:, t])[..., None, :] @ memory)[..., 0, :])
    read = normed(torch.stack(outputs, 1), mixer.norm).flatten(2)
    return mixer.out(read * torch.nn.functional.silu(gate)), start, memory, momentum


@pytest.mark.parametrize(("heads", "mini_batch", "time"), [(3, 8, TIME), (2, 5, TIME), (1, 1, 9), (3, 16, 7)])
def test_outputs_state_and_gradients_are_those_of_the_paper(heads: int, mini_batch: int, time: int):
    mixer = perturbed(Titans(Site(DIM), heads, mini_batch))
    x = torch.randn(BATCH, time, DIM, dtype=torch.float64, requires_grad=True)

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], 1)

    def prefilled() -> Tensor:
        outputs, state = mixer.prefill(x, mixer.init_state(BATCH, time), context(x))
        return joined(outputs, *state[1:])

    assert_same_outputs_and_gradients(mixer, [x], lambda: joined(*paper(mixer, x)), prefilled)
    assert_same_outputs_and_gradients(mixer, [x], lambda: paper(mixer, x)[0], lambda: mixer(x, context(x)))


@torch.no_grad()
def test_a_token_reads_the_gradients_of_its_mini_batch_up_to_its_own_and_no_later_ones():
    mixer = perturbed(Titans(Site(DIM), heads=3, convolution=1))
    assert_a_token_reads_up_to_its_own(mixer, DIM, 8, (1, 4, 7))


@torch.no_grad()
def test_rows_may_stand_at_different_places_of_their_mini_batches():
    mixer = perturbed(Titans(Site(DIM), heads=3))
    assert_rows_stand_where_they_like(mixer, DIM, (3, 8, 13), 12)


@torch.no_grad()
@pytest.mark.parametrize("mini_batch", [8, 32])
@pytest.mark.parametrize("momentum", [0.01, 0.9, 0.99])
def test_a_fact_that_is_told_again_and_again_is_learned_and_not_overshot(mini_batch: int, momentum: float):
    """All keys agree, nothing fades, and the rate is the highest: where gradients add up the most."""
    mixer = Titans(Site(4), heads=1, mini_batch=mini_batch, convolution=1).double()
    torch.nn.init.normal_(mixer.project.weight)
    mixer.project.weight[-3:] = 0.0
    mixer.rates.copy_(torch.tensor([-30.0, math.log(momentum / (1 - momentum)), 30.0]))
    x = torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 2000, 4)
    memory = mixer.prefill(x, mixer.init_state(1, 0), context(x))[1].memory[0, 0]
    _, key, value = convolved(mixer.project(x)[..., :12], mixer.convolution.taps)[0, -1].chunk(3)
    assert_close(unit(key) @ memory, value, rtol=0, atol=0.05 * value.abs().max().item())


@torch.no_grad()
def test_a_long_text_in_float32_stays_finite_and_close_to_float64():
    mixer = randomised(Titans(Site(32), heads=2), 0.5)
    x = torch.randn(1, 4096, 32)
    outputs, state = mixer.prefill(x, mixer.init_state(1, 4096), context(x))
    assert all(tensor.isfinite().all() for tensor in (outputs, *state))
    exact = mixer.double()(x.double(), context(x.double()))
    assert_close(outputs.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_closed_and_open_gates_leave_outputs_and_gradients_finite_under_autocast(logit: float):
    mixer = Titans(Site(DIM), heads=3)
    torch.nn.init.constant_(mixer.rates, logit)
    x = torch.randn(2, 40, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = mixer.prefill(x, mixer.init_state(2, 40), context(x))
    assert {part.dtype for part in state[1:]} == {torch.float32}
    gradients = torch.autograd.grad(outputs.float().sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (outputs, *state, *gradients))


@pytest.mark.parametrize(("name", "arguments"), [("heads", {"heads": 5}), ("mini_batch", {"mini_batch": 0})])
def test_arguments_that_do_not_work_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Titans(Site(DIM), **arguments)
