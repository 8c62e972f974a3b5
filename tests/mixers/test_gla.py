"""Gated linear attention against its equation, with gates that close."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmx.mixers.gla import GatedLinearAttention
from llmx.protocol import Site
from tests.parity import context, randomised

DIM, HEADS, TIME = 24, 3, 70


def test_outputs_are_those_of_the_equation():
    made = randomised(GatedLinearAttention(Site(dim=DIM), heads=HEADS, rank=5)).double()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    query, key, value, gate = made.project(x).split((12, 12, 24, 24), -1)
    decay = torch.sigmoid(made.gate_up(made.gate_down(x))) ** (1 / 16)
    memory, rows = torch.zeros(2, HEADS, 4, 8, dtype=torch.float64), []
    for t in range(TIME):
        written = torch.einsum("bhk,bhv->bhkv", key[:, t].view(2, HEADS, 4), value[:, t].view(2, HEADS, 8))
        memory = decay[:, t].view(2, HEADS, 4, 1) * memory + written
        rows.append(torch.einsum("bhk,bhkv->bhv", query[:, t].view(2, HEADS, 4) / 2, memory))
    mixed = F.layer_norm(torch.stack(rows, 1), (8,)).flatten(2)
    expected = made.out(F.silu(gate) * mixed * made.norm.weight)
    assert_close(made(x, context(x)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("logit", [-3000.0, -800.0, 800.0])
def test_closed_and_open_gates_leave_outputs_and_gradients_finite(logit):
    made = randomised(GatedLinearAttention(Site(dim=DIM), heads=HEADS))
    torch.nn.init.constant_(made.gate_up.bias, logit)  # the naive factors would be exp(logit / 16) over a chunk
    x = torch.randn(2, 300, DIM, requires_grad=True)
    output = made(x, context(x))
    exact = made.double()(x.double(), context(x.double()))
    assert ((output.double() - exact).norm() / exact.norm()).item() < 1e-5
    output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_channel_that_forgets_leaves_the_others_alone():
    made = randomised(GatedLinearAttention(Site(dim=DIM), heads=HEADS)).double()
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    state = made.init_state(1, TIME)
    before = made.prefill(x, state, context(x))[1].memory
    with torch.no_grad():
        made.gate_up.bias[1] = -1e5  # head 0, channel 1
    after = made.prefill(x, state, context(x))[1].memory
    key, value = made.project(x[:, -1]).split((12, 12, 24, 24), -1)[1:3]
    assert_close(after[0, 0, 1], key[0, 1] * value[0, :8])
    before[0, 0, 1] = after[0, 0, 1]
    assert_close(after, before)
