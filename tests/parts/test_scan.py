"""The scan against a naive loop over time."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmx.parts.scan import SHORT, WIDE, scan

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [1, 2, SHORT, SHORT + 1, 36, 37, 100]  # at once, in pieces that come out even, and that do not


def naive(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    h, all_h = start, []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        all_h.append(h)
    return torch.stack(all_h, 1)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a of absolute value below 1, b and a start."""
    torch.manual_seed(0)
    a, b = torch.randn(2, *shape, dtype=dtype)
    return a / (a.abs() + 0.1), b, torch.randn(shape, dtype=dtype)[:, 0]


def assert_same(arguments: tuple[Tensor, ...], fast: Tensor, slow: Tensor) -> None:
    assert_close(fast, slow, **EXACT)
    weights = torch.randn_like(slow)
    ones, others = (torch.autograd.grad((h * weights).sum().abs(), arguments) for h in (fast, slow))
    for one, other in zip(ones, others, strict=True):
        assert_close(one, other, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("width", [(3,), (2, 5), (WIDE // 2,)], ids=str)
def test_outputs_and_gradients_are_those_of_the_loop_from_any_start(width, time, dtype):
    arguments = tuple(x.requires_grad_() for x in drawn((2, time, *width), dtype))
    assert_same(arguments, scan(*arguments), naive(*arguments))


def test_a_real_decay_of_complex_inputs_that_all_rows_share():
    _, b, start = drawn((3, 20, 4), torch.complex128)
    a = torch.rand(1, 20, 4, dtype=torch.float64)
    arguments = tuple(x.requires_grad_() for x in (a, b, start))
    assert_same(arguments, scan(*arguments), naive(*arguments))


def test_a_scan_begins_at_zero_and_continues_from_its_last():
    a, b, start = drawn((2, 50, 3), torch.float64)
    assert_close(scan(a, b), naive(a, b, torch.zeros_like(start)), **EXACT)
    first = scan(a[:, :21], b[:, :21], start)
    assert_close(torch.cat((first, scan(a[:, 21:], b[:, 21:], first[:, -1])), 1), naive(a, b, start), **EXACT)


@pytest.mark.parametrize("width", [8, WIDE], ids=["in pieces", "at once"])
def test_extreme_decays_over_4096_tokens_stay_exact_in_float32(width):
    torch.manual_seed(0)
    _, b, start = drawn((1, 4096, 8), torch.float32)
    a = torch.tensor([0.0, 1e-30, 1.0, 0.5, 1 - 1e-4, -1.0, 0.0, 1.0]).expand(1, 4096, 8).clone()
    a[:, ::7, 6:] = 1e-30  # among others
    repeats = width // 8
    a, b, start = (x.repeat(*[1] * (x.ndim - 1), repeats).requires_grad_() for x in (a, b, start))
    gradients = torch.autograd.grad((h := scan(a, b, start)).sum(), (a, b, start))
    if repeats > 1:
        a, b, start, h, gradients = a[..., :8], b[..., :8], start[..., :8], h[..., :8], [g[..., :8] for g in gradients]
    exact = tuple(x.detach().double().requires_grad_() for x in (a, b, start))
    expected = scan(*exact)
    for one, other in zip((h, *gradients), (expected, *torch.autograd.grad(expected.sum(), exact)), strict=True):
        assert one.isfinite().all()
        # measured 5e-6 of the largest in pieces, 1e-6 at once: sums of 4,096 numbers where nothing is forgotten
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_numbers_are_float32_at_least():
    a, b = torch.rand(1, 5, 3), torch.randn(1, 5, 3)
    assert scan(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert scan(a, b.double()).dtype == torch.float64
    assert scan(a, b.cfloat()).dtype == torch.complex64


def test_a_compiler_takes_it_in_one_piece():
    arguments = tuple(x.requires_grad_() for x in drawn((2, 20, 3), torch.float64))
    compiled = torch.compile(lambda a, b, start: scan(a.square(), b, start).tanh(), backend="aot_eager", fullgraph=True)
    a, b, start = arguments
    assert_same(arguments, compiled(*arguments), naive(a.square(), b, start).tanh())


def test_the_operator_keeps_what_pytorch_asks_of_one():
    arguments = tuple(x.requires_grad_() for x in drawn((2, 20, 3), torch.float64))
    torch.library.opcheck(torch.ops.llmx.scan, arguments)
