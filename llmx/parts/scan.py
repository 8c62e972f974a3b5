"""The elementwise linear recurrence over time, shared by gated recurrences and diagonal state spaces.

    h_t = a_t * h_{t-1} + b_t        each number by itself, real or complex, |a_t| <= 1, from any h_0

Computed as it stands, left to right: the steps are dependent, but each is one pass over all rows and channels. With few
of those, or on a GPU, time is cut into about sqrt(T) pieces. The last value of every piece and the product of its a are
taken in all pieces at once, then carried from piece to piece, then each piece runs from its true start: some 3 sqrt(T)
dependent steps instead of T, for twice the arithmetic. Time O(T) a channel. The backward pass is the same scan from
right to left and keeps only a and h:

    g_t = dL/dh_t + a*_{t+1} g_{t+1},      dL/db_t = g_t,      dL/da_t = g_t h*_{t-1},      dL/dh_0 = a*_1 g_1

The trap: dividing by cumulative products, or exponentiating minus their logarithms, turns the recurrence into a
cumulative sum, and overflows as soon as something is forgotten. Here a = 0 is as good as any other decay. Numbers are
float32 at least, under autocast too. Gradients of gradients are not provided.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 4096  # numbers a step from which, on a CPU, the arithmetic of a step outweighs its overhead
SHORT = 16  # so few steps are never cut
FEW = 128  # so few steps are not cut from a quarter of WIDE on: a view of a step costs as much as the step


def scan(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """All h_t of h_t = a_t * h_{t-1} + b_t.

    a and b (B, T, ...), which broadcast to each other, and h_0 (B, ...), else zeros -> (B, T, ...) in float32 at least,
    complex if an argument is. The last is the state to continue from.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if start is not None:
        dtype = torch.promote_types(dtype, start.dtype)
    a, b = torch.broadcast_tensors(a.to(dtype), b.to(dtype))
    start = b.new_zeros(b[:, 0].shape) if start is None else start.to(dtype)
    return _scan(a, b, start)


# custom operators, because a compiler would unroll the steps of a plain function
@torch.library.custom_op("llmx::scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    run(a, b, start, h, False)
    return h


@torch.library.custom_op("llmx::scan_backward", mutates_args=())
def _scan_backward(a: Tensor, h: Tensor, start: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and the start."""
    a, h, start = a.conj(), h.conj(), start.conj()
    g = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    g[:, -1] = gradient[:, -1]
    run(a[:, 1:], gradient[:, :-1], gradient[:, -1], g[:, :-1], True)
    d = torch.empty_like(g)
    torch.mul(g[:, 1:], h[:, :-1], out=d[:, 1:])
    torch.mul(g[:, 0], start, out=d[:, 0])
    return d, g, g[:, 0] * a[:, 0]


@_scan.register_fake
def _(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


@_scan_backward.register_fake
def _(a: Tensor, h: Tensor, start: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, g, of_start = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (h, h, start))
    return d, g, of_start


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output, inputs[2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _scan_backward(*ctx.saved_tensors, gradient)


_scan.register_autograd(_backward, setup_context=_keep)


def run(a: Tensor, b: Tensor, h: Tensor, out: Tensor, backwards: bool) -> None:
    """The scan without gradients, from h to out, first step to last or backwards. `out` may be `b`."""
    time = b.shape[1]
    wide = WIDE if time > FEW else WIDE // 4
    if time <= SHORT or (b.device.type == "cpu" and b.numel() >= wide * time):
        sweep(a.unbind(1), b.unbind(1), h, out.unbind(1), backwards)
        return
    size = math.isqrt(time - 1) + 1
    missing = -time % size
    if missing:  # zeros where the scan ends
        padding = (0, 0) * (b.ndim - 2) + ((missing, 0) if backwards else (0, missing))
        a, b = F.pad(a, padding), F.pad(b, padding)
    whole = torch.empty(b.shape, dtype=b.dtype, device=b.device) if missing else out
    decays, inputs, outputs = (x.unflatten(1, (-1, size)).unbind(2) for x in (a, b, whole))  # c of (B, N, ...)
    order = range(size)[::-1] if backwards else range(size)
    last, product = inputs[order[0]], decays[order[0]]
    for t in order[1:]:
        last = torch.addcmul(inputs[t], decays[t], last)
        product = product * decays[t]
    lasts = torch.empty_like(last)
    sweep(product.unbind(1), last.unbind(1), h, lasts.unbind(1), backwards)
    starts = torch.cat((lasts[:, 1:], h[:, None]) if backwards else (h[:, None], lasts[:, :-1]), 1)
    sweep(decays, inputs, starts, outputs, backwards)
    if missing:
        out.copy_(whole[:, missing:] if backwards else whole[:, :time])


def sweep(
    decays: Sequence[Tensor], inputs: Sequence[Tensor], h: Tensor, outputs: Sequence[Tensor], backwards: bool
) -> None:
    """One step after the other, `h` first; the outputs may be the inputs."""
    for t in range(len(inputs))[::-1] if backwards else range(len(inputs)):
        h = torch.addcmul(inputs[t], decays[t], h, out=outputs[t])
