"""S4D against the state space it stands for, discretised by matrix exponentials, and its traps."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.s4d import S4D
from llmx.protocol import Site
from tests.forms import SAME, perturbed
from tests.parity import context


def convolved(mixer: S4D, x: torch.Tensor) -> torch.Tensor:
    """What the state spaces give, before anything mixes channels."""
    seen = []
    handle = mixer.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixer(x, context(x))
    handle.remove()
    return seen[0]


def test_outputs_are_those_of_the_state_space_by_matrix_exponentials():
    mixer = perturbed(S4D(Site(dim=3), state=8), 0.5)
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    expected = torch.empty_like(x)
    for channel in range(3):
        half = torch.complex(-mixer.log_decay[channel].exp(), mixer.frequency[channel])
        read = torch.view_as_complex(mixer.read)[channel]
        rates, read = torch.cat((half, half.conj())), torch.cat((read, read.conj()))
        system = torch.zeros(9, 9, dtype=torch.complex128)  # of the modes, and of an input that stands still
        system[:8, :8], system[:8, 8] = rates.diag(), 1
        system = torch.matrix_exp(system * mixer.log_step[channel].exp())
        h = torch.zeros(2, 8, dtype=torch.complex128)
        for t in range(11):
            u = x[:, t, channel]
            h = h @ system[:8, :8].T + u[:, None] * system[:8, 8]
            expected[:, t, channel] = (h @ read).real + mixer.skip[channel] * u
    assert_close(convolved(mixer, x), nn.functional.gelu(expected), **SAME)


@pytest.mark.parametrize("time", [2, 9, 16])
def test_the_end_of_the_text_does_not_wrap_round_to_its_beginning(time):
    mixer = S4D(Site(dim=4)).double()
    with torch.no_grad():
        mixer.log_decay.fill_(-30.0)  # nothing fades, so a circular convolution would show the future at full size
    x = torch.randn(1, time, 4, dtype=torch.float64)
    later = x.clone()
    later[:, -1] += 100
    assert_close(mixer(later, context(x))[:, :-1], mixer(x, context(x))[:, :-1], rtol=0, atol=1e-10)


def test_a_small_step_keeps_its_digits_in_float32():
    mixer = S4D(Site(dim=4))
    with torch.no_grad():
        mixer.log_step.fill_(math.log(1e-5))
        mixer.frequency[:, 0] = 0  # dt A is -5e-6: exp of it minus 1 keeps two digits
        _, write, _ = mixer._discrete()
        _, exact, _ = mixer.double()._discrete()
    assert_close(write.cdouble(), exact, rtol=1e-5, atol=0)


def test_the_start_is_s4d_lin():
    mixer = S4D(Site(dim=5), state=6)
    exponent, _, _ = mixer._discrete()
    step = mixer.log_step.exp()
    assert ((step > 0.0009) & (step < 0.11)).all()
    expected = torch.complex(torch.tensor([-0.5] * 3), math.pi * torch.arange(3.0))
    assert_close(exponent / step[:, None], expected.expand(5, 3), rtol=1e-5, atol=1e-5)
