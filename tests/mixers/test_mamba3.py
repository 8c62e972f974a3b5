"""Mamba-3: the paper's recurrence in complex numbers, a token at a time, what its rotations count, and its traps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.mamba3 import Mamba3
from llmx.parts.linear_attention import scalar_decay
from llmx.protocol import Site
from tests.delta import normed
from tests.forms import SAME, assert_same_outputs_and_gradients, perturbed
from tests.parity import context

DIM, HIDDEN, HEADS, STATE = 12, 8, 2, 10
LENGTHS = [1, 2, 63, 65, 131]  # the core's chunks have 64 tokens


def small(rotary_dim: int = 6) -> Mamba3:
    return perturbed(Mamba3(Site(dim=DIM), hidden=HIDDEN, heads=HEADS, state=STATE, rotary_dim=rotary_dim))


def as_complex(x: Tensor, angles: int) -> Tensor:
    """(..., N) -> (..., N - R): the first 2 R numbers in pairs, the others real."""
    first, second, rest = x.split((angles, angles, x.shape[-1] - 2 * angles), -1)
    return torch.cat((torch.complex(first, second), rest.to(torch.complex128)), -1)


def as_real(x: Tensor, angles: int) -> Tensor:
    return torch.cat((x[..., :angles].real, x[..., :angles].imag, x[..., angles:].real), -1)


def paper(mixer: Mamba3, x: Tensor) -> tuple[Tensor, ...]:
    """x (B, T, D) -> the outputs, and S, k, x and exp(i phi) after the last token. The state h does the turning, by the
    conjugate of exp(i dt theta); S is h turned by phi, a product of all turns."""
    gate, value, key, query, steps, decay, share, theta = mixer.project(x).split(mixer.widths, -1)
    angles, still = theta.shape[-1], mixer.widths[2] - 2 * theta.shape[-1]
    theta = F.pad(math.pi * torch.tanh(theta), (0, still))[:, :, None]  # (B, T, 1, N - R)
    dt = torch.log1p(torch.exp(steps + mixer.step_bias))
    a = -torch.log1p(torch.exp(decay)).clamp(min=1e-4)
    trapezoid = 1 / (1 + torch.exp(-share))
    value = value.unflatten(-1, (mixer.heads, -1))
    key = as_complex(normed(key, mixer.key_norm)[:, :, None] + mixer.key_bias, angles)
    query = as_complex(normed(query, mixer.query_norm)[:, :, None] + mixer.query_bias, angles)

    h, total, outputs = torch.zeros(()), torch.ones(()), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        alpha = torch.exp(step * (a[:, t, :, None] - 1j * theta[:, t]))
        beta, gamma = (1 - trapezoid[:, t, :, None]) * step * alpha, trapezoid[:, t, :, None] * step
        h = alpha[..., None] * h + (gamma * key[:, t])[..., None] * value[:, t, :, None]
        if t:
            h = h + (beta * key[:, t - 1])[..., None] * value[:, t - 1, :, None]
        total = total * torch.exp(1j * step * theta[:, t])
        outputs.append((query[:, t].conj()[..., None] * h).real.sum(-2))
    mixed = torch.stack(outputs, 1) + mixer.skip[:, None] * value
    memory = as_real((total[..., None] * h).transpose(-1, -2), angles).transpose(-1, -2)
    output = mixer.out(mixed.flatten(2) * gate / (1 + torch.exp(-gate)))
    return output, memory, as_real(total * key[:, -1], angles), value[:, -1], torch.view_as_real(total[..., :angles])


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("rotary_dim", [6, STATE])
def test_outputs_state_and_gradients_are_those_of_the_complex_recurrence(rotary_dim, time):
    mixer = small(rotary_dim)
    x = torch.randn(2, time, DIM, dtype=torch.float64, requires_grad=True)

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], 1)

    def ours() -> Tensor:
        output, (memory, key, value, angle) = mixer.prefill(x, mixer.init_state(2, time), context(x))
        angle = 2 * math.pi * angle
        return joined(output, memory, key, value, torch.stack((angle.cos(), angle.sin()), -1))

    assert_same_outputs_and_gradients(mixer, [x], lambda: joined(*paper(mixer, x)), ours)
    assert_same_outputs_and_gradients(mixer, [x], lambda: paper(mixer, x)[0], lambda: mixer(x, context(x)))


def with_constant(x: Tensor) -> Tensor:
    """The last number of every token is 1, so that a column of the projection is a bias."""
    return torch.cat((x[..., :-1], torch.ones_like(x[..., -1:])), -1)


def test_lambda_of_one_without_rotation_is_the_euler_step_of_mamba2():
    mixer, x = small(), with_constant(torch.randn(2, 70, DIM, dtype=torch.float64))
    *_, share, angle = mixer.project.weight.split(mixer.widths)
    with torch.no_grad():
        share[:, -1] = 1e3
        angle.zero_()
        mixer.skip.zero_()
    gate, value, key, query, steps, decay, *_ = mixer.project(x).split(mixer.widths, -1)
    dt = F.softplus(steps + mixer.step_bias)
    key = normed(key, mixer.key_norm)[:, :, None] + mixer.key_bias
    query = normed(query, mixer.query_norm)[:, :, None] + mixer.query_bias
    value = value.unflatten(-1, (HEADS, -1)) * dt[..., None]
    mixed, memory = scalar_decay(query, key, value, -dt * F.softplus(decay))
    output, state = mixer.prefill(x, mixer.init_state(2, 70), context(x))
    assert_close(output, mixer.out(mixed.flatten(2) * F.silu(gate)), **SAME)
    assert_close(state.memory, memory, **SAME)


def parity_machine() -> Mamba3:
    """Reads (start, bit, 1): keeps what it read at the start, turned by half a turn for each bit."""
    mixer = Mamba3(Site(dim=3), hidden=1, heads=1, state=2, rotary_dim=2)
    with torch.no_grad():
        for parameter in (mixer.project.weight, mixer.skip):
            parameter.zero_()
        gate, value, _, _, _, decay, _, angle = mixer.project.weight.split(mixer.widths)
        gate[:, 2] = 1.0
        value[:, 0] = 1.0
        decay[:, 2] = -20.0  # as slow as it goes
        angle[:, 1] = 20.0  # tanh of it is 1
        mixer.step_bias.fill_(math.log(math.expm1(1.0)))  # dt = 1
        mixer.out.weight.fill_(1.0)
    return mixer


def test_one_head_tracks_the_parity_of_bits():
    mixer, bits = parity_machine(), torch.randint(2, (4, 300), generator=torch.Generator().manual_seed(0))
    bits[:, 0] = 0
    x = torch.stack((torch.arange(300).expand(4, 300) == 0, bits, torch.ones(4, 300)), -1).float()
    y = mixer(x, context(x))[..., 0]
    odd = bits.cumsum(1) % 2 == 1
    assert torch.equal(y < 0, odd)
    assert y[:, 1:].abs().min() > 0.9 * y.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_a_real_decay_cannot_alternate_over_a_run_of_ones(seed):
    torch.manual_seed(seed)
    mixer = perturbed(Mamba3(Site(dim=DIM), hidden=HIDDEN, heads=1, state=STATE))
    with torch.no_grad():
        mixer.project.weight.split(mixer.widths)[-1].zero_()
    torch.manual_seed(seed)
    x = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, 40, DIM)
    change = mixer(x, context(x)).diff(dim=1)  # whatever the weights, it goes one way
    assert (change[:, 1:] * change[:, :1] > -1e-20).all()
    assert change.abs().max() > 1e-3

    ones = torch.tensor([0.0, 1.0, 1.0]).expand(1, 40, 3).clone()
    ones[:, 0] = torch.tensor([1.0, 0.0, 1.0])
    change = parity_machine()(ones, context(ones)).diff(dim=1)
    assert (change[:, 1:] * change[:, :-1] < 0).all()


def test_no_output_depends_on_the_step_or_lambda_of_the_next_token():
    mixer, x = small(), torch.randn(2, 40, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, 20:] = torch.randn(2, 20, DIM, dtype=torch.float64)
    assert torch.equal(mixer(x, context(x))[:, :20], mixer(other, context(other))[:, :20])


def long(bias: float) -> tuple[Mamba3, Tensor]:
    torch.manual_seed(0)
    mixer = Mamba3(Site(dim=8), hidden=16, heads=2, state=8)
    with torch.no_grad():
        mixer.step_bias.fill_(bias)
    return mixer, torch.randn(1, 4096, 8)


@torch.no_grad()
@pytest.mark.parametrize("bias", [-4.0, 1.0, 4.0])  # dt around 0.02, 1.3 and 4
def test_4096_tokens_in_lower_precision_stay_near_float64(bias):
    mixer, x = long(bias)
    exact = copy.deepcopy(mixer).double()(x.double(), context(x))
    scale = exact.square().mean().sqrt()
    assert ((mixer(x, context(x)) - exact).abs().max() / scale) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        low, state = mixer.prefill(x, mixer.init_state(1, 4096), context(x))
    assert low.isfinite().all()
    assert ((low - exact).square().mean().sqrt() / scale) < 0.02
    assert {leaf.dtype for leaf in state} == {torch.float32}


@torch.no_grad()
def test_the_angle_is_summed_exactly_over_4096_tokens_and_stays_small():
    mixer, x = long(4.0)
    x = x.abs()  # so that the turns do not cancel
    turns = mixer._project(x)[0].turn.double().cumsum(1)
    assert turns.abs().max() > 500
    _, state = mixer.prefill(x, mixer.init_state(1, 4096), context(x))
    assert state.angle.abs().max() <= 0.5

    def off(angle: Tensor, expected: Tensor) -> float:
        return float((angle - expected - (angle - expected).round()).abs().max())

    assert off(state.angle, turns[:, -1]) < 1e-7
    state = mixer.init_state(1, 512)
    for t in range(512):
        _, state = mixer.step(x[:, t], state, context(x).at(t))
    assert state.angle.abs().max() <= 0.5
    assert off(state.angle, turns[:, 511]) < 1e-4


def test_a_huge_step_forgets_everything_and_nothing_overflows():
    mixer = Mamba3(Site(dim=8), hidden=16, heads=2, state=8)
    with torch.no_grad():
        mixer.step_bias.fill_(1e4)
    x = torch.randn(2, 100, 8, requires_grad=True)
    y = mixer(x, context(x))
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


def test_the_start_is_that_of_the_paper():
    mixer = Mamba3(Site(dim=64), heads=64)
    dt = F.softplus(mixer.step_bias)
    assert dt.min() > 0.00099
    assert dt.max() < 0.101
    assert (mixer.key_bias == 1).all()
    assert (mixer.query_bias == 1).all()


@pytest.mark.parametrize(
    "arguments", [{"heads": 3}, {"hidden": 0}, {"state": 0}, {"rotary_dim": 5}, {"rotary_dim": 66}, {"state": 1}]
)
def test_sizes_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError, match=r"heads|hidden|state|rotary_dim"):
        Mamba3(Site(dim=64), **arguments)
