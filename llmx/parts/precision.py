"""Float32 or better: for gates, decays and long sums, which 16 bits would spoil. Float64 stays float64."""

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(exact_dtype(x))


def exact_zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros on the device of `like`, in its dtype or in float32 where that has fewer bits."""
    return like.new_zeros(shape, dtype=exact_dtype(like))
