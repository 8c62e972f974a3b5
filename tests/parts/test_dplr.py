"""The chunked form of the diagonal-plus-rank-one memory against its recurrence, and over long texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.dplr import dplr

SAME = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums in another order
RWKV7_LOWEST = -math.exp(-0.5)
LOWEST = -2.5  # what chunks of 32 have room for


def naive(query, key, value, log_decay, read, write, lowest: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """A token at a time, the transition as the (K, K) matrix that it is."""
    outputs = []
    for t in range(query.shape[1]):
        transition = torch.diag_embed(log_decay[:, t].exp()) + write[:, t, :, :, None] * read[:, t, :, None]
        state = transition @ state + key[:, t, :, :, None] * value[:, t, :, None]
        outputs.append((query[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1), state


def inputs(batch: int, time: int, heads: int, width: int, value_width: int, lowest: float = RWKV7_LOWEST):
    """As RWKV-7 has them: the read is a unit vector, the write minus a share of it."""
    torch.manual_seed(0)
    query, key, decay, read, share = torch.randn(5, batch, time, heads, width, dtype=torch.float64)
    read = F.normalize(read, dim=-1)
    value = torch.randn(batch, time, heads, value_width, dtype=torch.float64)
    return [query, key * width**-0.5, value, lowest * decay.sigmoid(), read, -read * share.sigmoid()]


@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("continued", [False, True])
def test_chunks_are_the_recurrence_in_outputs_state_and_gradients(time: int, continued: bool):
    arguments = inputs(2, time, 3, 4, 5, LOWEST)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64) * continued
    leaves = [x.requires_grad_() for x in [*arguments, state]]
    results = []
    for run in (naive, dplr):
        outputs, after = run(*arguments, LOWEST, state if continued or run is naive else None)
        loss = (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum() + after.square().sum()
        gradients = torch.autograd.grad(loss, leaves if continued else leaves[:-1])
        results.append((outputs, after, *gradients))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_close(ours, theirs, **SAME)


def test_what_is_removed_is_read_before_the_memory_fades():
    arguments = inputs(1, 2, 1, 3, 3)
    _, key, value, log_decay, read, write = (x[0, :, 0] for x in arguments)
    before = torch.outer(key[0], value[0])
    expected = log_decay[1].exp()[:, None] * before + torch.outer(write[1], read[1] @ before)
    expected = expected + torch.outer(key[1], value[1])
    assert_close(dplr(*arguments, RWKV7_LOWEST)[1][0, 0], expected, **SAME)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("lowest", [RWKV7_LOWEST, -1e-4, "floor"])
def test_long_texts_stay_exact(dtype: torch.dtype, tolerance: float, lowest):
    """4,096 tokens against the recurrence in float64 on the same numbers, relative to the largest output: fading at
    random, hardly, and all channels as fast as they can. In bf16 it is the rounding of the outputs that shows."""
    arguments = inputs(1, 4096, 2, 8, 8, RWKV7_LOWEST if lowest == "floor" else lowest)
    if lowest == "floor":
        arguments[3] = torch.full_like(arguments[3], RWKV7_LOWEST)
    arguments = [x.to(dtype) for x in arguments]
    outputs, state = dplr(*arguments, RWKV7_LOWEST - 1e-3)  # bf16 rounds the floor
    empty = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    expected, expected_state = naive(*(x.double() for x in arguments), RWKV7_LOWEST, empty)
    assert outputs.dtype == dtype
    assert state.dtype == torch.float32
    assert (outputs.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (state.double() - expected_state).abs().max() < 2e-6 * expected_state.abs().max()


def test_the_lowest_decay_has_finite_gradients_in_float32():
    arguments = [x.float() for x in inputs(1, 64, 1, 4, 4)]
    arguments[3] = torch.full_like(arguments[3], LOWEST)
    leaves = [x.requires_grad_() for x in arguments]
    outputs, state = dplr(*arguments, LOWEST)
    for gradient in torch.autograd.grad(outputs.sum() + state.sum(), leaves):
        assert gradient.isfinite().all()


def test_a_floor_that_is_too_low_is_named():
    with pytest.raises(ValueError, match=r"^lowest: "):
        dplr(*inputs(1, 64, 1, 4, 4), -3.0)


def test_no_output_depends_on_a_later_token_even_by_rounding():
    arguments = inputs(1, 40, 2, 4, 4)
    outputs = dplr(*arguments, RWKV7_LOWEST)[0]
    for x in arguments:
        moved = [y.clone() if y is x else y for y in arguments]
        next(y for y, z in zip(moved, arguments, strict=True) if y is not z)[:, 20:] *= 0.9
        assert torch.equal(dplr(*moved, RWKV7_LOWEST)[0][:, :20], outputs[:, :20])
