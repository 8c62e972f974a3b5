"""Initialisation, called by the module that owns the parameter."""

import math

from torch import nn


def normal_(linear: nn.Linear | nn.Embedding, std: float = 0.02) -> None:
    """Weights from N(0, std^2), bias 0."""
    nn.init.normal_(linear.weight, std=std)
    if isinstance(linear, nn.Linear) and linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_std(depth: int) -> float:
    """The standard deviation for projections that write to the residual stream, two a layer (GPT-2)."""
    return 0.02 / math.sqrt(2 * depth)
