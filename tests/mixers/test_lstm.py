"""The LSTM against torch.nn.LSTM, on the same weights."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from llmx.mixers.gru import GRU
from llmx.mixers.lstm import LSTM, LSTMState
from llmx.protocol import Context, Site

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(1, 1, 1), (2, 7, 5), (3, 20, 16)]  # batch, time, dim


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def pair(dim: int) -> tuple[LSTM, nn.LSTM]:
    torch.manual_seed(0)
    ours, theirs = LSTM(Site(dim=dim)).double(), nn.LSTM(dim, dim, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.weight_hh_l0.copy_(ours.recurrent.weight)
        theirs.bias_hh_l0.copy_(ours.input.bias - theirs.bias_ih_l0)  # only the sum of the two matters
    return ours, theirs


@pytest.mark.parametrize(("batch", "time", "dim"), SHAPES)
def test_outputs_states_and_gradients_are_those_of_torch(batch: int, time: int, dim: int):
    ours, theirs = pair(dim)
    x, before = torch.randn(batch, time, dim).double(), torch.randn(2, batch, dim).double()
    expected, (hidden, cell) = theirs(x, (before[:1], before[1:]))
    output, after = ours.prefill(x, LSTMState(*before), context(x))
    assert_close(output, expected, **CLOSE)
    assert_close(after, LSTMState(hidden[0], cell[0]), **CLOSE)

    weights = torch.randn(expected.shape).double()
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    assert_close(ours.input.weight.grad, theirs.weight_ih_l0.grad, **CLOSE)
    assert_close(ours.recurrent.weight.grad, theirs.weight_hh_l0.grad, **CLOSE)
    assert_close(ours.input.bias.grad, theirs.bias_ih_l0.grad, **CLOSE)


def test_step_gives_the_outputs_of_torch():
    ours, theirs = pair(5)
    x = torch.randn(2, 6, 5).double()
    state, here, outputs = ours.init_state(2, 6), context(x), []
    for t in range(6):
        output, state = ours.step(x[:, t], state, here.at(t))
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), theirs(x)[0], **CLOSE)


def test_the_forget_gate_starts_open():
    dim = 8
    bias = LSTM(Site(dim=dim)).input.bias.chunk(4)
    assert_close(bias[1], torch.ones(dim))
    assert all(not other.any() for other in (bias[0], bias[2], bias[3]))


def test_the_cell_stays_exact_under_autocast():
    x = torch.randn(2, 4, 8)
    mixer = LSTM(Site(dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, 4), context(x))
    assert state.cell.dtype == torch.float32
    assert_close(output, mixer(x, context(x)), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("cls", [LSTM, GRU])
def test_compilation_leaves_the_loop_over_time_to_the_kernel(cls: type):
    mixer, x, sizes = cls(Site(dim=4)), torch.randn(1, 60, 4), []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(lambda x: mixer(2 * x, context(x)) + 1, backend=aot_autograd(fw_compiler=compiler))
    assert_close(compiled(x), mixer(2 * x, context(x)) + 1)
    assert 0 < sum(sizes) < x.shape[1]
