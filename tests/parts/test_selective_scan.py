"""The selective scan against its recurrence, one step after the other."""

import pytest
import torch
from torch import Tensor

from llmx.parts.selective_scan import selective_scan

BATCH, CHANNELS, STATE = 2, 5, 3


def stepwise(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    read_out = []
    for t in range(size.shape[1]):
        written = (size[:, t] * x[:, t])[..., None] * write[:, t, None]
        h = torch.exp(size[:, t, :, None] * rate) * h + written
        read_out.append((h * read[:, t, None]).sum(-1))
    return torch.stack(read_out, 1), h


def arguments(time: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(time)
    size, rate = torch.rand(BATCH, time, CHANNELS), -4 * torch.rand(CHANNELS, STATE)
    x, write, read = (torch.randn(BATCH, time, width) for width in (CHANNELS, STATE, STATE))
    start = torch.randn(BATCH, CHANNELS, STATE)
    return [tensor.to(dtype).requires_grad_() for tensor in (size, x, rate, write, read, start)]


@pytest.mark.parametrize("piece", [1, 90, 200, 10**6])  # numbers: 1, 3, 6 and all tokens at once
@pytest.mark.parametrize("time", [1, 3, 37])
def test_outputs_state_and_gradients_are_those_of_the_recurrence(monkeypatch, piece: int, time: int) -> None:
    """To 1e-10 in float64, wherever the text is cut."""
    monkeypatch.setattr("llmx.parts.selective_scan.PIECE", piece)
    given = arguments(time, torch.float64)
    weights = torch.randn(BATCH, time, CHANNELS).double(), torch.randn(BATCH, CHANNELS, STATE).double()
    for used in ((0,), (1,), (0, 1)):  # the outputs that the loss looks at
        results = []
        for form in (selective_scan, stepwise):
            outputs = form(*given)
            loss = sum((outputs[i] * weights[i]).sum() for i in used)
            results.append([*outputs, *torch.autograd.grad(loss, given, allow_unused=True)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(
                ours, torch.zeros_like(ours) if expected is None else expected, atol=1e-10, rtol=0
            )


def test_it_is_float32_under_autocast_and_without_a_start_begins_at_zero() -> None:
    *given, start = arguments(37, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, last = selective_scan(*(tensor.bfloat16() if i else tensor for i, tensor in enumerate(given)))
    assert mixed.dtype == last.dtype == torch.float32
    exact = [tensor.bfloat16().double() if i else tensor.double() for i, tensor in enumerate(given)]
    expected = stepwise(*exact, torch.zeros_like(start).double())[0]
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_graph_holds_it_when_compiled() -> None:
    given = arguments(9, torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), selective_scan(*given))
    size, x, rate, write, read, start = given
    size, x, write, read = (tensor.transpose(0, 1).contiguous() for tensor in (size, x, write, read))
    rate, start = rate.mT.contiguous(), start.mT.contiguous()
    torch.library.opcheck(torch.ops.llmx.selective_scan, (size, x, rate, write, read, start))
