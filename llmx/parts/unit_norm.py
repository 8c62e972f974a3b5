"""Vectors of length 1, and scale factors that give them back their freedom (nGPT, arXiv 2410.01131)."""

import torch
from torch import Tensor, nn

from llmx.parts.precision import at_least_float32


def unit_norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x|, the Euclidean norm taken along `dim`, in float32 at least; a vector of zeros stays as it is."""
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
    """A learned vector: value = parameter * start / stored.

    Before the first step the value is `start` and the parameter is `stored`, which is not 0. Adam moves any parameter
    by about the learning rate a step, so `stored` says how fast the value changes relative to its start. The parameter
    has one dimension, so the optimizer applies no weight decay.
    """

    def __init__(self, size: int, start: float, stored: float):
        super().__init__()
        self.ratio = start / stored
        self.weight = nn.Parameter(torch.full((size,), stored))

    def forward(self) -> Tensor:
        """The values, (size,)."""
        return self.weight * self.ratio
