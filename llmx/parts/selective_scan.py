"""The recurrence of a selective state space (Mamba, arXiv 2312.00752), and what is read of it.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,    y_t = h_t C_t        h (F, N), dt and x (F,), B and C (N,)

The states of all times are T F N numbers, which only pass through: they are made a piece of the text at a time, small
enough for a processor's cache, read out and forgotten. Kept is the state before each piece; the backward pass makes
those within it again. Time O(T F N), memory O(T F + T F N / P) for pieces of P tokens. Within a piece it is the scan of
llmx/parts/scan.py, with its precision. Gradients of gradients are not provided.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmx.parts.scan import run

LOG2_E = math.log2(math.e)  # powers of 2 take a third of the time of powers of e on a CPU
PIECE = 2**18  # numbers of the states in a piece on a CPU
PIECE_OF_A_DEVICE = 2**26  # elsewhere, where few large calls are what is fast


def selective_scan(
    size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All y_t, and the last h.

    Args:
        size: dt, (B, T, F), not negative.
        x: (B, T, F).
        rate: A, (F, N), negative.
        write: B, (B, T, N).
        read: C, (B, T, N).
        start: h_0, (B, F, N); zeros if not given.

    Returns:
        (B, T, F) and (B, F, N), in float32 at least.
    """
    dtype = torch.promote_types(size.dtype, torch.float32)
    size, x, rate, write, read = (tensor.to(dtype).contiguous() for tensor in (size, x, rate.mT, write, read))
    start = size.new_zeros(size.shape[0], *rate.shape) if start is None else start.mT.to(dtype).contiguous()
    mixed, states = _scan(size, x, rate, write, read, start)
    return mixed, states[-1].mT


# within, a state is (N, F): the channels last, for they are many
@torch.library.custom_op("llmx::selective_scan", mutates_args=())
def _scan(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the states (pieces + 1, B, N, F) before, between and after the pieces."""
    pieces = _pieces(size, rate)
    mixed = torch.empty_like(size)
    states = size.new_empty(len(pieces) + 1, *start.shape)
    states[0] = start
    for i, piece in enumerate(pieces):
        _, h = _states(size[:, piece], x[:, piece], rate, write[:, piece], states[i])
        states[i + 1] = h[:, -1]
        torch.sum(h.mul_(read[:, piece, :, None]), -2, out=mixed[:, piece])
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
    of_rate = torch.zeros_like(rate)
    carried = torch.zeros_like(states[-1]) if of_states is None else of_states[-1]  # of the state after the piece
    for i, piece in reversed(list(enumerate(_pieces(size, rate)))):
        dt, u, b = size[:, piece], x[:, piece], write[:, piece]
        decay, h = _states(dt, u, rate, b, states[i])
        y = of_mixed[:, piece, None]
        torch.sum(h * y, -1, out=of_read[:, piece])
        direct = y * read[:, piece, :, None]
        direct[:, -1] += carried
        g = torch.empty_like(direct)
        g[:, -1] = direct[:, -1]
        run(decay[:, 1:], direct[:, :-1], g[:, -1], g[:, :-1], True)
        carried = decay[:, 0] * g[:, 0]
        if of_states is not None:
            carried += of_states[i]
        written = torch.mul(g, b[..., None], out=direct).sum(-2)
        torch.mul(written, dt, out=of_x[:, piece])
        torch.sum(torch.mul(g, (dt * u)[:, :, None], out=direct), -1, out=of_write[:, piece])
        decay.mul_(g)  # to the gradient of dt A
        decay[:, 1:].mul_(h[:, :-1])
        decay[:, 0].mul_(states[i])
        torch.add(written * u, torch.mul(decay, rate, out=direct).sum(-2), out=of_size[:, piece])
        of_rate += decay.mul_(dt[:, :, None]).sum((0, 1))
    return of_size, of_x, of_rate, of_write, of_read, carried


def _pieces(size: Tensor, rate: Tensor) -> list[slice]:
    """The text (B, T, F) cut into pieces of which the states fit."""
    batch, time, _ = size.shape
    numbers = PIECE if size.device.type == "cpu" else PIECE_OF_A_DEVICE
    length = max(1, numbers // (batch * rate.numel()))
    return [slice(start, start + length) for start in range(0, time, length)]


def _states(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt A) and h, (B, P, N, F) each."""
    decay = (size[:, :, None] * (rate * LOG2_E)).exp2_()
    written = (size * x)[:, :, None] * write[..., None]
    h = torch.empty_like(written)
    run(decay, written, start, h, False)
    return decay, h


@_scan.register_fake
def _(size: Tensor, x: Tensor, rate: Tensor, write: Tensor, read: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(size), size.new_empty(len(_pieces(size, rate)) + 1, *start.shape)


@_scan_backward.register_fake
def _(*given: Tensor | None) -> tuple[Tensor, ...]:
    *tensors, states, _, _ = given
    return tuple(torch.empty_like(tensor) for tensor in (*tensors, states[0]))  # type: ignore[arg-type,index]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.set_materialize_grads(False)  # the states are as large as all else together, and often lead nowhere


def _backward(ctx: Any, of_mixed: Tensor | None, of_states: Tensor | None) -> tuple[Tensor, ...]:
    of_mixed = torch.zeros_like(ctx.saved_tensors[0]) if of_mixed is None else of_mixed.contiguous()
    return _scan_backward(*ctx.saved_tensors, of_mixed, of_states)


_scan.register_autograd(_backward, setup_context=_keep)
