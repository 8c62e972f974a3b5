"""Normalisations over the last dimension, and over nothing else: a statistic over time would show every position its
future (that is how the experiment in configs/seed came by its loss)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Norm(nn.Module, ABC):
    """(..., dim) -> (..., dim), each vector by itself. Built by a factory from `dim`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension (arXiv 1910.07467), in float32 at least.

    Written out, for `F.rms_norm` takes several times as long on a CPU.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (exact * scale).to(x.dtype) * self.weight.to(x.dtype)
