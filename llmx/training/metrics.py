"""The loss of a split, weighted by token and exact on any number of processes."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from llmx.protocol import IGNORE


class TokenLoss(Metric):
    """Mean negative log-likelihood over all counted tokens, in nats.

    It sums in float64 and divides once, so that neither the batches' sizes nor the number of processes matter.
    (torchmetrics' Perplexity takes the softmax before the logarithm: inf in fp16, and 1 % off in bf16.)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, targets: Tensor) -> None:
        """losses (B, T) in nats, 0 where targets (B, T) are IGNORE."""
        self.total += losses.double().sum()
        self.count += (targets != IGNORE).sum()

    def compute(self) -> Tensor:
        return self.total / self.count


def perplexity(loss: float) -> float:
    """exp(loss), inf where a float cannot hold it."""
    return math.inf if loss > 709 else math.exp(loss)


def bits(loss: float) -> float:
    """nats to bits"""
    return loss / math.log(2)
