"""Initialisation, called by the module that owns the parameter."""

import math

import torch
from torch import Tensor, nn


def normal_(linear: nn.Linear | nn.Embedding, std: float = 0.02) -> None:
    """Weights from N(0, std^2), bias 0."""
    nn.init.normal_(linear.weight, std=std)
    if isinstance(linear, nn.Linear) and linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_std(depth: int) -> float:
    """The standard deviation for projections that write to the residual stream, two a layer (GPT-2)."""
    return 0.02 / math.sqrt(2 * depth)


def log_time_steps(size: int) -> Tensor:
    """Logarithms of the first time steps of a state space, uniform between those of 0.001 and 0.1."""
    return torch.empty(size).uniform_(math.log(0.001), math.log(0.1))


def softplus_time_steps(size: int) -> Tensor:
    """Numbers whose softplus are such time steps."""
    return log_time_steps(size).exp().expm1().log()


def recurrent_(inputs: nn.Linear, recurrent: nn.Linear) -> None:
    """Input weights uniform in +-1 / sqrt(D), biases 0, and an orthogonal recurrent matrix for each gate."""
    dim = recurrent.in_features
    nn.init.uniform_(inputs.weight, -(dim**-0.5), dim**-0.5)
    nn.init.zeros_(inputs.bias)
    with torch.no_grad():
        for rows in recurrent.weight.split(dim):
            nn.init.orthogonal_(rows)
