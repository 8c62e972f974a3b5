"""Rotary position embedding (arXiv 2104.09864) in the half-split layout: dimension i is paired with i + K/2.

The interleaved layout of the paper pairs 2i with 2i + 1. The two differ by a permutation of query and key: training
absorbs it, but copied weights need it.
"""

import torch
from torch import Tensor

from llmx.protocol import Context


def rotary_table(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of positions (...,): (..., 2, K/2). Angles are computed in float32 at least."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim
    angles = positions[..., None].to(exact) * base**-exponents  # (..., K/2)
    return torch.stack((angles.cos(), angles.sin()), -2).to(dtype)


def shared_table(context: Context, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """The rotary table that all layers of this pass share, (B or 1, T, 1, 2, K/2); no T in `step`."""
    name = f"rotary {base} {head_dim}"
    if name not in context.store:
        context.store[name] = rotary_table(context.positions, head_dim, base, dtype)[..., None, :, :]
    return context.store[name]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair of x (..., K) by its angle; the table (..., 2, K/2) broadcasts over the leading dimensions."""
    cos, sin = table.unbind(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotate_part(x: Tensor, table: Tensor) -> Tensor:
    """Turns only the first R dimensions of x (..., K), for which the table (..., 2, R/2) has angles."""
    turned, rest = x.split((2 * table.shape[-1], x.shape[-1] - 2 * table.shape[-1]), -1)
    return torch.cat((rotate(turned, table), rest), -1)
