"""minGRU, minLSTM and QRNN: what holds them together, and where they break when written carelessly."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmx.mixers.mingru import MinGRU
from llmx.mixers.minlstm import MinLSTM
from llmx.mixers.qrnn import QRNN
from llmx.protocol import Site
from tests.parity import context


def hidden_states(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mixer.prefill(x, mixer.init_state(len(x), x.shape[1]), context(x))[1][-1]


@pytest.mark.parametrize("cls", [MinGRU, MinLSTM])
def test_a_state_is_a_running_mean_of_its_candidates(cls):
    torch.manual_seed(0)
    mixer = cls(Site(dim=6))
    with torch.no_grad():
        mixer.input.bias[-6:] = 0.7  # constant candidates
        mixer.input.weight[-6:] = 0
    x = 3 * torch.randn(2, 500, 6)
    assert_close(hidden_states(mixer, x), torch.full((2, 6), 0.7))


def test_gates_that_are_both_shut_are_divided_all_the_same():
    mixer = MinLSTM(Site(dim=4))
    with torch.no_grad():
        mixer.input.weight.zero_()
        mixer.input.bias[:4] = -200.0  # f and i are 0 in float32, i three times f
        mixer.input.bias[4:8] = -200.0 + torch.tensor(3.0).log()
        mixer.input.bias[8:] = 1.0
    x = torch.randn(1, 1, 4)
    assert_close(hidden_states(mixer, x), torch.full((1, 4), 0.75), rtol=1e-4, atol=0)


def test_only_the_ratio_of_the_gates_matters():
    torch.manual_seed(0)
    mixer = MinLSTM(Site(dim=4)).double()
    x = torch.randn(2, 9, 4).double()
    f, i, c = mixer.input(x).chunk(3, -1)
    f, i, h = f.sigmoid(), i.sigmoid(), torch.zeros(2, 4).double()
    for t in range(9):
        h = (f[:, t] * h + i[:, t] * c[:, t]) / (f[:, t] + i[:, t])
    assert_close(hidden_states(mixer, x), h)
    wrong = f[:, -1] * h + i[:, -1] * c[:, -1]
    assert not torch.allclose(wrong, h)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_gates_of_a_qrnn_are_those_of_conv1d_that_sees_back_only(width):
    torch.manual_seed(0)
    dim = 5
    mixer = QRNN(Site(dim=dim), width).double()
    x = torch.randn(2, 8, dim).double()
    convolution = nn.Conv1d(dim, 3 * dim, width, padding=width - 1).double()
    with torch.no_grad():
        convolution.weight.copy_(mixer.gates.weight.unflatten(1, (width, dim)).transpose(1, 2))
        convolution.bias.copy_(mixer.gates.bias)
    z, f, o = convolution(x.transpose(1, 2))[..., :8].transpose(1, 2).chunk(3, -1)
    c, expected = torch.zeros(2, dim).double(), []
    for t in range(8):
        c = f[:, t].sigmoid() * c + (1 - f[:, t].sigmoid()) * z[:, t].tanh()
        expected.append(o[:, t].sigmoid() * c)
    assert_close(mixer(x, context(x)), torch.stack(expected, 1))


@pytest.mark.parametrize("cls", [MinGRU, MinLSTM, QRNN])
def test_the_state_stays_exact_under_autocast(cls):
    x = torch.randn(2, 20, 8)
    mixer = cls(Site(dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, 20), context(x))
    assert state[-1].dtype == torch.float32
    assert_close(output.float(), mixer(x, context(x)), rtol=0.05, atol=0.02)
