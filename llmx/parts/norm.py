"""Norms over the last dimension, and over nothing else: a statistic over time would show every position its future (the
loss of the experiment in configs/seed comes from that). At the end nGPT's unit vectors, for weights too."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.precision import at_least_float32


class Norm(nn.Module, ABC):
    """(..., dim) -> (..., dim), each vector by itself. A factory builds it from `dim`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


NewNorm = Callable[[int], Norm]  # a factory


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension (arXiv 1910.07467), in float32 at least.

    Written out, because `F.rms_norm` takes several times as long on a CPU.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x, self.eps) * self.weight.to(x.dtype)


class GainlessRMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps), without parameters: the next layer can learn the gain."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x, self.eps)


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension (arXiv 1607.06450)."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class NoNorm(Norm):
    """x as it is, for a norm slot left empty."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class DyT(Norm):
    """weight * tanh(alpha x) + bias, each number by itself (arXiv 2503.10622): no statistic, hence no norm at all.

    The trap: nothing brings the stream to unit size. The paper's Llama multiplies its embedding by a number that starts
    at sqrt(D), and does not converge without it. It starts alpha at 0.8 before attention and 0.2 elsewhere at D = 4096,
    at 0.2 and 0.05 at D = 8192: the narrower the network, the larger.

    Args:
        alpha: where the one learned slope starts.
    """

    def __init__(self, dim: int, alpha: float = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((), alpha))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class HeadNorm(nn.Module):
    """(..., H, V) -> (..., H V): (x - mean) / sqrt(variance + eps) over V, times a weight a channel.

    This is GroupNorm of each token alone, with one group a head. `nn.GroupNorm` on (B, H V, T) takes its statistics
    over time too, and so leaks the future into every position.
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = at_least_float32(x)
        normed = F.layer_norm(exact, exact.shape[-1:], eps=self.eps).to(x.dtype)
        return normed.flatten(-2) * self.weight.to(x.dtype)


def _rms(x: Tensor, eps: float) -> Tensor:
    exact = at_least_float32(x)
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def unit_norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x|, the Euclidean norm along `dim` (nGPT, arXiv 2410.01131), in float32 at least; zeros stay zeros."""
    exact = at_least_float32(x)
    return (exact * torch.rsqrt(exact.square().sum(dim, keepdim=True) + 1e-20)).to(x.dtype)


@torch.no_grad()
def renormalise_(matrix: Tensor, dim: int) -> None:
    """Brings the vectors of a weight matrix back to length 1, in place.

    `dim` is the axis of the embedding space: 1 for matrices whose rows read the stream (embedding and head too), 0 for
    matrices whose columns are added to it. The result depends on the matrix alone, so processes with equal weights keep
    equal weights.
    """
    matrix.copy_(unit_norm(matrix, dim))


class LearnedScale(nn.Module):
    """A learned vector (nGPT): value = parameter * start / stored.

    Before the first step the value is `start` and the parameter is `stored`, which is not 0. Adam moves any parameter
    by about the learning rate a step, so `stored` says how fast the value changes relative to its start. The parameter
    has one dimension, so the optimizer applies no weight decay.
    """

    def __init__(self, size: int, start: float, stored: float):
        super().__init__()
        self.ratio = start / stored
        self.weight = nn.Parameter(torch.full((size,), stored))

    def forward(self) -> Tensor:
        return self.weight * self.ratio
