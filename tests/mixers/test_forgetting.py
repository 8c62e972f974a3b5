"""Forgetting attention against the product of gates, pair by pair, and with gates at their ends."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.mixers.forgetting import ForgettingAttention
from llmx.protocol import Site
from tests.parity import context, randomised

DIM, HEADS = 12, 3
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64


def mixer(dim: int = DIM, heads: int = HEADS) -> ForgettingAttention:
    return randomised(ForgettingAttention(Site(dim=dim), heads=heads)).double()


def with_gates(logit: float) -> ForgettingAttention:
    made = mixer()
    with torch.no_grad():
        made.forget.weight.zero_()
        made.forget.bias.fill_(logit)
    return made


def projected(made: ForgettingAttention, x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, T, K)"""
    return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in made.qkv(x).chunk(3, -1))


def in_steps(made: ForgettingAttention, x: Tensor) -> Tensor:
    state, outputs = made.init_state(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        output, state = made.step(x[:, t], state, context(x).at(t))
        outputs.append(output)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("batch", "time"), [(2, 7), (1, 2), (3, 10)])
def test_a_weight_is_multiplied_by_every_gate_after_the_token_it_looks_at(batch, time):
    made = mixer()
    x = torch.randn(batch, time, DIM, dtype=torch.float64, requires_grad=True)
    query, key, value = projected(made, x)
    gates = made.forget(x).sigmoid()  # (B, T, H)
    rows = []
    for b in range(batch):
        for t in range(time):
            heads = []
            for h in range(HEADS):
                weights = []
                for s in range(t + 1):
                    weight = (query[b, h, t] @ key[b, h, s] / math.sqrt(DIM // HEADS)).exp()
                    for r in range(s + 1, t + 1):
                        weight = weight * gates[b, r, h]
                    weights.append(weight)
                heads.append(torch.stack(weights) @ value[b, h, : t + 1] / sum(weights))
            rows.append(torch.cat(heads))
    expected = made.out(torch.stack(rows).view(batch, time, DIM))
    leaves = [x, *made.parameters()]
    for output in (made(x, context(x)), in_steps(made, x)):
        assert_close(output, expected, **EXACT)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(output, leaves, upstream)
        assert_close(gradients, torch.autograd.grad(expected, leaves, upstream, retain_graph=True), **EXACT)


def test_open_gates_leave_attention_without_positions():
    made = with_gates(1e4)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    mixed = F.scaled_dot_product_attention(*projected(made, x), is_causal=True)
    expected = made.out(mixed.transpose(1, 2).flatten(2))
    assert_close(made(x, context(x)), expected, **EXACT)
    assert_close(in_steps(made, x), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shut_gates_leave_each_token_itself_and_finite_gradients(dtype):
    made = with_gates(-1e4).to(dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype, requires_grad=True)
    expected = made.out(made.qkv(x).chunk(3, -1)[2])
    for output in (made(x, context(x)), in_steps(made, x)):
        assert_close(output, expected)
        gradients = torch.autograd.grad(output.sum(), [x, *made.parameters()], retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_text_that_has_forgotten_much_still_forgets_by_small_steps():
    """Sums of log gates near 10^5, then gates of e^-0.0025, which such a sum in float32 swallows."""
    half = 2048
    made = mixer(dim=8, heads=1)
    with torch.no_grad():
        made.qkv.weight[:, 0] = 0
        made.forget.weight.zero_()
        made.forget.weight[:, 0] = 1
        made.forget.bias.zero_()
    x = torch.randn(1, 2 * half, 8, dtype=torch.float64)
    x[:, :half, 0], x[:, half:, 0] = -50, 6
    alive = x[:, half - 1 :]  # nothing before has any weight for those
    with torch.no_grad():
        expected = made(alive, context(alive))[:, 1:]
        made, x = made.float(), x.float()
        close = {"rtol": 1e-5, "atol": 1e-5}
        assert_close(made(x, context(x))[:, half:].double(), expected, **close)

        whole, steps = context(x), 400
        whole.tokens, whole.positions = whole.tokens[:, :half], whole.positions[:, :half]
        _, state = made.prefill(x[:, :half], made.init_state(1, half + steps), whole)
        outputs = []
        for t in range(half, half + steps):
            output, state = made.step(x[:, t], state, context(x).at(t))
            outputs.append(output)
        assert_close(torch.stack(outputs, 1).double(), expected[:, :steps], **close)


def test_heads_have_to_divide_the_width():
    with pytest.raises(ValueError, match="heads: 5 heads"):
        ForgettingAttention(Site(dim=12), heads=5)
