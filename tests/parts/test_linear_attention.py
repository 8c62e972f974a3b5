"""The chunked sums against the recurrence, one token after the other, in float64."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.linear_attention import decay_step, scalar_decay, vector_decay

SAME = {"rtol": 1e-10, "atol": 1e-10}
FORMS = {"scalar": scalar_decay, "vector": vector_decay}
LENGTHS = (1, 2, 5, 16, 33, 70)


def naive(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S = diag(a) S + k v^T, then S^T q; a scalar decay (B, T, H) or a vector one (B, T, H, K)."""
    decay = log_decay.exp() if log_decay.ndim == 4 else log_decay.exp()[..., None].expand_as(key)
    outputs = []
    for t in range(value.shape[1]):
        state = decay[:, t, :, :, None] * state + torch.einsum("bhk,bhv->bhkv", key[:, t], value[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outputs, 1), state


def inputs(kind: str, time: int, batch: int = 2, heads: int = 3, width: int = 8, values: int = 5) -> list[Tensor]:
    """Query, key, value, log decay and a state, none of them zero."""
    generator = torch.Generator().manual_seed(time)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = draw(batch, time, heads, *([width] if kind == "vector" else []))
    return [
        draw(batch, time, heads, width),
        draw(batch, time, heads, width),
        draw(batch, time, heads, values),
        -decay.square(),
        draw(batch, heads, width, values),
    ]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", FORMS)
def test_outputs_state_and_gradients_are_those_of_the_recurrence(kind, chunk, time):
    tensors = [x.requires_grad_() for x in inputs(kind, time)]
    results = []
    for run in (naive, lambda *x: FORMS[kind](*x, chunk=chunk)):
        output, state = run(*tensors)
        loss = (output * output.detach().cos()).sum() + (state * state.detach().sin()).sum()
        results.append((output, state, torch.autograd.grad(loss, tensors)))
    assert_close(results[1], results[0], **SAME)


@pytest.mark.parametrize("chunk", [3, 7, 50])
def test_a_scalar_decay_takes_any_chunk(chunk):
    tensors = inputs("scalar", 70)
    assert_close(scalar_decay(*tensors, chunk=chunk), naive(*tensors), **SAME)


@pytest.mark.parametrize("time", [5, 40])
@pytest.mark.parametrize("kind", FORMS)
def test_no_state_is_a_state_of_zeros(kind, time):
    *tensors, state = inputs(kind, time)
    assert_close(FORMS[kind](*tensors, chunk=16), naive(*tensors, torch.zeros_like(state)), **SAME)


@pytest.mark.parametrize("kind", FORMS)
def test_two_halves_are_the_whole(kind):
    *tensors, state = inputs(kind, 70)
    whole = FORMS[kind](*tensors, state, chunk=16)
    first, state = FORMS[kind](*(x[:, :23] for x in tensors), state, chunk=16)
    second, state = FORMS[kind](*(x[:, 23:] for x in tensors), state, chunk=16)
    assert_close((torch.cat((first, second), 1), state), whole, **SAME)


@pytest.mark.parametrize("kind", FORMS)
def test_step_is_the_recurrence(kind):
    *tensors, state = inputs(kind, 9)
    expected, last = naive(*tensors, state)
    for t in range(9):
        query, key, value, log_decay = (x[:, t] for x in tensors)
        output, state = decay_step(query, key, value, log_decay if kind == "vector" else log_decay[..., None], state)
        assert_close(output, expected[:, t], **SAME)
    assert_close(state, last, **SAME)


def test_neighbouring_heads_share_a_group_of_query_and_key():
    query, key, value, log_decay, state = inputs("scalar", 37, heads=6)
    query, key = query[:, :, :2], key[:, :, :2]
    found = scalar_decay(query, key, value, log_decay, state, chunk=16)
    wide = (x.repeat_interleave(3, 2) for x in (query, key))
    assert_close(found, naive(*wide, value, log_decay, state), **SAME)


def test_a_decay_may_be_shared_by_all_rows():
    query, key, value, log_decay, state = inputs("scalar", 37)
    found = scalar_decay(query, key, value, log_decay[:1], state, chunk=16)
    assert_close(found, naive(query, key, value, log_decay[:1].expand(2, -1, -1), state), **SAME)


@pytest.mark.parametrize("kind", FORMS)
def test_an_output_ignores_later_tokens(kind):
    *tensors, state = inputs(kind, 40)
    before, _ = FORMS[kind](*tensors, state, chunk=16)
    for tensor in tensors:
        tensor[:, 21:] = tensor[:, 21:].flip(0) * 3
    after, _ = FORMS[kind](*tensors, state, chunk=16)
    assert torch.equal(before[:, :21], after[:, :21])


@pytest.mark.parametrize("step", ["-50", "-1e-6", "both"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("kind", FORMS)
def test_extreme_decays_over_a_long_sequence_stay_near_float64(kind, dtype, bound, step):
    query, key, value, log_decay, state = inputs(kind, 4096, batch=1, heads=2)
    log_decay = torch.full_like(log_decay, -50.0 if step == "-50" else -1e-6)
    if step == "both":  # the memory is emptied now and then, in the middle of a chunk
        log_decay[:, 20::100] = -50.0
    # what rounding the inputs does is not asked here
    rounded = [x.to(dtype) for x in (query, key, value)] + [log_decay.float(), state.float()]
    exact, exact_state = naive(*(x.double() for x in rounded))
    leaves = [x.requires_grad_() for x in rounded]
    output, last = FORMS[kind](*leaves)
    assert output.dtype == dtype
    assert last.dtype == torch.float32
    assert relative_error(output, exact) < bound
    assert relative_error(last, exact_state) < 2e-6
    for gradient in torch.autograd.grad(output.float().square().sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", FORMS)
def test_autocast_does_not_round_inside(kind):
    *tensors, state = (x.float() for x in inputs(kind, 70))
    with torch.autocast("cpu", torch.bfloat16):
        found = FORMS[kind](*tensors, state)
    assert_close(found, FORMS[kind](*tensors, state))
