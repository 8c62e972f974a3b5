"""The recurrence of a selective state space (Mamba, arXiv 2312.00752), and its outputs.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,    y_t = h_t C_t        h (F, N), dt and x (F,), B and C (N,)

The states of all times are T F N numbers, which are only passed through. A piece of the text at a time, small enough
for a processor's cache, they are made, read out and forgotten. The state before each piece is kept. The backward pass
makes the others again. Time O(T F N), memory O(T F + T F N / P) for pieces of P tokens. Within a piece it is the scan
of llmx/parts/scan.py, with its precision. Gradients of gradients are not provided.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmx.parts.precision import exact_dtype
from llmx.parts.scan import run, sweep

LOG2_E = math.log2(math.e)  # powers of 2 take a third of the time of powers of e on a CPU
PIECE = 2**18  # numbers of the states in a piece on a CPU
PIECE_OF_A_DEVICE = 2**26  # elsewhere, where few large calls are fast


def selective_scan(
    size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All y_t, (B, T, F), and the last h, (B, F, N), in float32 at least.

    size is dt (B, T, F), not negative; x (B, T, F); rate is A (F, N), negative; write and read are B and C (B, T, N);
    start is h_0 (B, F, N), else zeros.
    """
    dtype = exact_dtype(size)
    size, x, write, read = (tensor.to(dtype).transpose(0, 1).contiguous() for tensor in (size, x, write, read))
    rate = rate.to(dtype).mT.contiguous()
    start = size.new_zeros(size.shape[1], *rate.shape) if start is None else start.mT.to(dtype).contiguous()
    mixed, states = _scan(size, x, rate, write, read, start)
    return mixed.transpose(0, 1), states[-1].mT


# Here time comes first, so that a step is one block of memory, and a state is (N, F), because the channels are many.
@torch.library.custom_op("llmx::selective_scan", mutates_args=())
def _scan(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the states (pieces + 1, B, N, F) before, between and after the pieces."""
    pieces = _pieces(size, rate)
    mixed = torch.empty_like(size)
    states = size.new_empty(len(pieces) + 1, *start.shape)
    states[0] = start
    decay, h = (_Steps(pieces, more, start) for more in (0, 1))
    for i, piece in enumerate(pieces):
        _fill(decay, h, size[piece], x[piece], rate, write[piece], states[i])
        n = len(size[piece])
        states[i + 1] = h.whole[n]
        torch.matmul(read[piece, :, None], h.whole[1 : n + 1], out=mixed[piece, :, None])
    return mixed, states


@torch.library.custom_op("llmx::selective_scan_backward", mutates_args=())
def _scan_backward(
    size: Tensor,
    x: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    states: Tensor,
    of_mixed: Tensor,
    of_states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all arguments of `_scan`."""
    of_size, of_x, of_write, of_read = (torch.empty_like(tensor) for tensor in (size, x, write, read))
    pieces = _pieces(size, rate)
    carried = torch.zeros_like(states[-1]) if of_states is None else of_states[-1]  # of the state after the piece
    decay, h, of_h = (_Steps(pieces, more, carried) for more in (0, 1, 0))
    of_rate = torch.zeros_like(decay.whole)
    for i, piece in reversed(list(enumerate(pieces))):
        dt, u, b, y = size[piece], x[piece], write[piece], of_mixed[piece, :, None]
        _fill(decay, h, dt, u, rate, b, states[i])
        n = len(dt)
        a, g = decay.whole[:n], of_h.whole[:n]
        torch.mul(y, read[piece, ..., None], out=g)
        g[-1] += carried
        _run(decay, slice(1, n), g[-1], of_h, slice(n - 1), True)
        a *= g
        carried = a[0].clone() if of_states is None else a[0] + of_states[i]
        a *= h.whole[:n]  # now the gradient of dt A
        of_rate[:n].addcmul_(a, dt[:, :, None])
        torch.sum(h.whole[1 : n + 1].mul_(y), -1, out=of_read[piece])
        written = (b[:, :, None] @ g)[:, :, 0]
        torch.mul(written, dt, out=of_x[piece])
        torch.sum(g.mul_((dt * u)[:, :, None]), -1, out=of_write[piece])
        torch.add(written * u, torch.mul(a, rate, out=g).sum(-2), out=of_size[piece])
    return of_size, of_x, of_rate.sum((0, 1)), of_write, of_read, carried


class _Steps:
    """Room for the states of a piece and `more`, (P, B, N, F), reused by all pieces, and a view (B, N, F) of each step.
    With small steps, new views for every piece would take as long as the arithmetic."""

    def __init__(self, pieces: list[slice], more: int, state: Tensor):
        self.whole = state.new_empty((pieces[0].stop if pieces else 0) + more, *state.shape)
        self.each = self.whole.unbind()


def _pieces(size: Tensor, rate: Tensor) -> list[slice]:
    """The text (T, B, F) cut into pieces whose states fit."""
    time, batch, _ = size.shape
    numbers = PIECE if size.device.type == "cpu" else PIECE_OF_A_DEVICE
    length = max(1, numbers // (batch * rate.numel()))
    return [slice(start, min(start + length, time)) for start in range(0, time, length)]


def _fill(decay: _Steps, h: _Steps, size: Tensor, x: Tensor, rate: Tensor, write: Tensor, start: Tensor) -> None:
    """exp(dt A) of a piece, and the state before it and after each of its tokens."""
    n = len(size)
    torch.mul(size[:, :, None], rate * LOG2_E, out=decay.whole[:n]).exp2_()
    h.whole[0] = start
    torch.mul((size * x)[:, :, None], write[..., None], out=h.whole[1 : n + 1])
    _run(decay, slice(n), start, h, slice(1, n + 1), False)


def _run(decay: _Steps, decays: slice, start: Tensor, h: _Steps, steps: slice, backwards: bool) -> None:
    """h_t += a_t h_{t-1} for these steps of both, or h_t += a_{t+1} h_{t+1}."""
    if h.whole.device.type == "cpu":
        sweep(decay.each[decays], h.each[steps], start, h.each[steps], backwards)
    else:
        a, b = (tensor.transpose(0, 1) for tensor in (decay.whole[decays], h.whole[steps]))
        run(a, b, start, b, backwards)


@_scan.register_fake
def _(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(size), size.new_empty(len(_pieces(size, rate)) + 1, *start.shape)


@_scan_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    *tensors, states, _, _ = given
    return tuple(torch.empty_like(tensor) for tensor in (*tensors, states[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.set_materialize_grads(False)  # the states are as large as all else together, and often have none


def _backward(ctx: Any, of_mixed: Tensor | None, of_states: Tensor | None) -> tuple[Tensor, ...]:
    of_mixed = torch.zeros_like(ctx.saved_tensors[0]) if of_mixed is None else of_mixed.contiguous()
    return _scan_backward(*ctx.saved_tensors, of_mixed, of_states)


_scan.register_autograd(_backward, setup_context=_keep)
