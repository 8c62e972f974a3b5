"""A causal convolution over the last few tokens, each channel by itself.

    y_t = sum_{j < w} c_j * x_{t-j} + bias          c_j (D,), x before the first token 0

Time O(T D w). The state is the last w - 1 inputs, (w - 1) D numbers. Written as w products of whole sequences: grouped
convolutions are slower on a CPU. The traps: padding on both sides, or w on the left and no cut on the right, reads the
future. The padding of a continued text is its last tokens, not zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmx.parts.checks import check_sizes


class ShortConvolution(nn.Module):
    """(B, T, D) -> (B, T, D) over w = `width` tokens, the current one among them; w is at least 1.

    Its state is (B, w - 1, D), oldest first. It starts uniform in +-1 / sqrt(w), the bias (a number a channel) at 0.
    """

    def __init__(self, dim: int, width: int = 4, bias: bool = False):
        super().__init__()
        check_sizes(width=width)
        self.width = width
        self.taps = nn.Parameter(torch.empty(width, dim).uniform_(-(width**-0.5), width**-0.5))  # oldest first
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(F.pad(x, (0, 0, self.width - 1, 0)))

    def init_state(self, batch_size: int) -> Tensor:
        return self.taps.new_zeros(batch_size, self.width - 1, self.taps.shape[1])

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, (B, D) -> (B, D)."""
        seen = torch.cat((state.to(x.dtype), x[:, None]), 1)  # (B, w, D)
        y = (seen * self.taps.to(x.dtype)).sum(1)
        return y if self.bias is None else y + self.bias.to(x.dtype), _alone(seen[:, 1:])

    def prefill(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """From any state, (B, T, D) -> (B, T, D); without one, at the start of a text."""
        if state is None:
            last = x[:, max(0, x.shape[1] - self.width + 1) :]
            return self(x), F.pad(last, (0, 0, self.width - 1 - last.shape[1], 0))
        seen = torch.cat((state.to(x.dtype), x), 1)
        return self._convolve(seen), _alone(seen[:, x.shape[1] :])

    def _convolve(self, seen: Tensor) -> Tensor:
        """(B, w - 1 + T, D) -> (B, T, D)"""
        y = _Convolution.apply(seen, self.taps.to(seen.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _alone(part: Tensor) -> Tensor:
    """A copy: a view would keep the whole piece alive, and its strides would differ from those of the first state, so
    that decoding would be compiled twice. (One row counts as contiguous, whatever its stride.)"""
    return part.clone(memory_format=torch.contiguous_format)


class _Convolution(torch.autograd.Function):
    """(B, w - 1 + T, D), taps (w, D) -> (B, T, D). Autograd would give every slice a gradient as long as the whole."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(seen, taps)
        time = seen.shape[1] - len(taps) + 1
        y = taps[0] * seen[:, :time]
        for j in range(1, len(taps)):
            y.addcmul_(taps[j], seen[:, j : j + time])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        seen, taps = ctx.saved_tensors
        time = gradient.shape[1]
        of_seen = torch.zeros_like(seen)
        for j in range(len(taps)):
            of_seen[:, j : j + time].addcmul_(taps[j], gradient)
        return of_seen, torch.stack([(gradient * seen[:, j : j + time]).sum((0, 1)) for j in range(len(taps))])
