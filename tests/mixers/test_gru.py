"""The GRU against torch.nn.GRU, on the same weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.mixers.gru import GRU
from llmx.parts.states import HiddenState
from llmx.protocol import Context, Site

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(1, 1, 1), (2, 7, 5), (3, 20, 16)]  # batch, time, dim


def context(x: Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])[None], x)


def pair(dim: int) -> tuple[GRU, nn.GRU]:
    torch.manual_seed(0)
    ours, theirs = GRU(Site(dim=dim)).double(), nn.GRU(dim, dim, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.weight_hh_l0.copy_(ours.recurrent.weight)
        theirs.bias_ih_l0.copy_(ours.input.bias)
        theirs.bias_hh_l0.copy_(torch.cat((torch.zeros(2 * dim), ours.reset_bias)))
    return ours, theirs


@pytest.mark.parametrize(("batch", "time", "dim"), SHAPES)
def test_outputs_states_and_gradients_are_those_of_torch(batch: int, time: int, dim: int):
    ours, theirs = pair(dim)
    x, before = torch.randn(batch, time, dim).double(), torch.randn(batch, dim).double()
    expected, hidden = theirs(x, before[None])
    output, after = ours.prefill(x, HiddenState(before), context(x))
    assert_close(output, expected, **CLOSE)
    assert_close(after.hidden, hidden[0], **CLOSE)

    weights = torch.randn(expected.shape).double()
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    assert_close(ours.input.weight.grad, theirs.weight_ih_l0.grad, **CLOSE)
    assert_close(ours.recurrent.weight.grad, theirs.weight_hh_l0.grad, **CLOSE)
    assert_close(ours.input.bias.grad, theirs.bias_ih_l0.grad, **CLOSE)
    assert_close(ours.reset_bias.grad, theirs.bias_hh_l0.grad[2 * dim :], **CLOSE)


def test_step_gives_the_outputs_of_torch():
    ours, theirs = pair(5)
    x = torch.randn(2, 6, 5).double()
    state, here, outputs = ours.init_state(2, 6), context(x), []
    for t in range(6):
        output, state = ours.step(x[:, t], state, here.at(t))
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), theirs(x)[0], **CLOSE)


def test_the_state_stays_exact_under_autocast():
    x = torch.randn(2, 4, 8)
    mixer = GRU(Site(dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer.prefill(x, mixer.init_state(2, 4), context(x))
    assert state.hidden.dtype == torch.float32
    assert_close(output, mixer(x, context(x)), rtol=0.05, atol=0.02)
