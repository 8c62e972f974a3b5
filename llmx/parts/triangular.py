"""The inverse of a triangular matrix with ones on its diagonal, for the chunks of a delta rule.

    X = (I + L)^{-1},   dL = -X^T dX X^T         L strictly lower, (c, c)

Solving for the right-hand sides instead takes one triangular solve forward and one backward, which run at a tenth of
the rate of products here. Time O(c^3).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^{-1} of the part below the diagonal of (..., c, c); the rest is not read."""
    return _Inverse.apply(lower)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        # transposed and from the right, as the library stores its matrices: half the time, and no copies
        turned = torch.linalg.solve_triangular(lower.mT, one, upper=True, left=False, unitriangular=True)
        inverse = turned.mT.contiguous()
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return (turned @ gradient @ turned).tril(-1).neg_()
