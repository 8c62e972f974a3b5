"""The delta rule in chunks against its recurrence, at any length, from any state, and over long texts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.delta import delta_rule, delta_step, delta_write, l2_norm, vector_delta_rule
from tests.delta import naive
from tests.forms import SAME

KINDS = ["none", "scalar", "vector"]


def wide(log_decay: Tensor | None, key: Tensor) -> Tensor:
    """Any decay as one a channel."""
    if log_decay is None:
        return torch.zeros_like(key)
    return log_decay if log_decay.ndim == 4 else log_decay[..., None].expand_as(key)


def inputs(kind: str, batch: int, time: int, heads: int, width: int, value_width: int, beta_max: float = 2.0):
    torch.manual_seed(0)
    query, key = torch.randn(2, batch, time, heads, width, dtype=torch.float64)
    value = torch.randn(batch, time, heads, value_width, dtype=torch.float64)
    beta = beta_max * torch.rand(batch, time, heads, dtype=torch.float64)
    shape = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, width)}[kind]
    log_decay = None if shape is None else -3 * torch.rand(shape, dtype=torch.float64) ** 4
    return [query, F.normalize(key, dim=-1), value, beta, log_decay]


def rule(kind: str):
    return vector_delta_rule if kind == "vector" else delta_rule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [8, 16, 64])
@pytest.mark.parametrize("time", [1, 7, 33, 50])
@pytest.mark.parametrize("continued", [False, True])
def test_chunks_are_the_recurrence_in_outputs_state_and_gradients(kind: str, chunk: int, time: int, continued: bool):
    query, key, value, beta, log_decay = inputs(kind, 2, time, 3, 4, 5)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64) * continued
    leaves = [x.requires_grad_() for x in (query, key, value, beta, log_decay, state) if x is not None]
    results = []
    for run in (naive, rule(kind)):
        if run is naive:
            outputs, after = naive(query, key, value, beta, wide(log_decay, key), state)
        else:
            outputs, after = run(query, key, value, beta, log_decay, state if continued else None, chunk)
        loss = (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum() + after.square().sum()
        results.append((outputs, after, *torch.autograd.grad(loss, leaves if continued else leaves[:-1])))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_recurrence(kind: str):
    query, key, value, beta, log_decay = inputs(kind, 2, 6, 3, 4, 5)
    state = first = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    outputs = []
    for t in range(6):
        decay = None if log_decay is None else wide(log_decay, key)[:, t]
        output, state = delta_step(query[:, t], key[:, t], value[:, t], beta[:, t], decay, state)
        outputs.append(output)
    expected, after = naive(query, key, value, beta, wide(log_decay, key), first)
    assert_close(torch.stack(outputs, 1), expected, **SAME)
    assert_close(state, after, **SAME)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("chunk", [8, 64])
def test_value_heads_share_the_keys_of_their_group(decays: bool, chunk: int):
    _, _, value, beta, log_decay = inputs("scalar", 2, 19, 6, 4, 5)
    query, key, *_ = inputs("none", 2, 19, 2, 4, 5)
    log_decay = log_decay if decays else None
    state = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    repeated = [x.repeat_interleave(3, 2) for x in (query, key)]
    expected = naive(*repeated, value, beta, wide(log_decay, repeated[1]), state)
    for ours, theirs in zip(delta_rule(query, key, value, beta, log_decay, state, chunk), expected, strict=True):
        assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("chunk", [2, 8, 64])
def test_a_query_reads_after_several_keys(decays: bool, chunk: int):
    query, key, value, beta, log_decay = inputs("scalar", 2, 33, 2, 4, 5)
    log_decay = log_decay if decays else None
    state = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    expected, after = naive(query, key, value, beta, wide(log_decay, key), state)
    outputs, ours = delta_rule(query[:, 2::3], key, value, beta, log_decay, state, chunk)
    assert_close(outputs, expected[:, 2::3], **SAME)
    assert_close(ours, after, **SAME)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_what_is_taken_out_has_faded_first(kind: str):
    """Written by hand: the decay comes before the erasure. The other order leaves another memory."""
    _, key, value, beta, log_decay = inputs(kind, 1, 1, 1, 3, 2)
    state = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    a, k, v, b, s = wide(log_decay, key)[0, 0, 0].exp(), key[0, 0, 0], value[0, 0, 0], beta[0, 0, 0], state[0, 0]
    faded = a[:, None] * s
    expected = faded - b * torch.outer(k, k @ faded) + b * torch.outer(k, v)
    assert_close(rule(kind)(key, key, value, beta, log_decay, state)[1][0, 0], expected, **SAME)
    other = a[:, None] * (s - b * torch.outer(k, k @ s)) + b * torch.outer(k, v)
    assert kind == "scalar" or (other - expected).abs().max() > 1e-3  # one number a head commutes


def test_a_rate_of_one_recalls_exactly_and_of_two_reflects():
    key = F.normalize(torch.randn(1, 1, 4, dtype=torch.float64), dim=-1)
    value = torch.randn(1, 1, 5, dtype=torch.float64)
    state = torch.randn(1, 1, 4, 5, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert_close(delta_step(key, key, value, one, None, state)[0], value, **SAME)
    twice = delta_write(key, 0 * value, 2 * one, None, delta_write(key, 0 * value, 2 * one, None, state))
    assert_close(twice, state, **SAME)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_stay_exact(dtype: torch.dtype, tolerance: float, kind: str):
    """2,048 tokens against the recurrence in float64 on the same numbers, relative to the largest number. A row each:
    decays at random, all gone at once, next to nothing, and both in turn, where differences of sums would have lost the
    small ones. In bf16 it is the rounding of the outputs that shows."""
    arguments = inputs(kind, 4, 2048, 2, 8, 8)
    if kind != "none":
        arguments[4][1], arguments[4][2] = -50.0, -1e-6
        arguments[4][3] = torch.where(torch.rand_like(arguments[4][3]) < 0.1, -50.0, -1e-6)
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    outputs, state = rule(kind)(*arguments)
    exact = [None if x is None else x.double() for x in arguments]
    expected, after = naive(*exact[:4], wide(exact[4], exact[1]), torch.zeros(4, 2, 8, 8, dtype=torch.float64))
    assert outputs.dtype == dtype
    assert state.dtype == torch.float32
    for row in range(4):
        assert (outputs[row].double() - expected[row]).abs().max() < tolerance * expected[row].abs().max()
        assert (state[row].double() - after[row]).abs().max() < 2e-6 * after[row].abs().max()


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("decay", [-50.0, -1e4])
def test_a_decay_that_leaves_nothing_has_finite_gradients_in_float32(kind: str, decay: float):
    arguments = [x.float() for x in inputs(kind, 1, 70, 1, 4, 4)]
    arguments[4] = torch.full_like(arguments[4], decay)
    leaves = [x.requires_grad_() for x in arguments]
    outputs, state = rule(kind)(*arguments)
    for gradient in torch.autograd.grad(outputs.sum() + state.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_token_even_by_rounding(kind: str):
    arguments = inputs(kind, 1, 40, 2, 4, 4)
    outputs = rule(kind)(*arguments)[0]
    for i, x in enumerate(arguments):
        if x is not None:
            moved = list(arguments)
            moved[i] = torch.cat((x[:, :20], 0.9 * x[:, 20:]), 1)
            assert torch.equal(rule(kind)(*moved)[0][:, :20], outputs[:, :20])


def test_a_vector_of_zeros_has_a_norm_with_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    y = l2_norm(x)
    assert torch.equal(y, torch.zeros(2, 3))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_the_norm_leaves_no_vector_longer_than_one():
    x = torch.randn(50, 8) * torch.logspace(-6, 3, 50)[:, None]
    lengths = l2_norm(x).norm(dim=-1)
    assert (lengths <= 1 + 1e-6).all()
    assert_close(lengths[-20:], torch.ones(20), rtol=1e-4, atol=0)
    assert l2_norm(x.bfloat16()).dtype == torch.float32
