"""A norm for each head by itself, for heads that mix time at different scales."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.precision import at_least_float32


class HeadNorm(nn.Module):
    """(..., H, V) -> (..., H V): (x - mean) / sqrt(variance + eps) over V, times a weight a channel.

    This is GroupNorm of each token alone, with one group a head. `nn.GroupNorm` on (B, H V, T) takes its statistics
    over time too, and so leaks the future into every position.

    Args:
        heads: H.
        head_dim: V.
        eps: added to the variance.
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = at_least_float32(x)
        normed = F.layer_norm(exact, exact.shape[-1:], eps=self.eps).to(x.dtype)
        return normed.flatten(-2) * self.weight.to(x.dtype)
