"""The two-layer perceptron of the first Transformer (arXiv 1706.03762): W_down f(W_up x + b) + c.

Each position by itself: time O(T D F), no state. f is ReLU in 2017, GELU (arXiv 1606.08415) in GPT-2 and BERT, and the
square of ReLU in Primer (arXiv 2109.08668). GPT-2 computes GELU by its tanh approximation. The trap: the exact GELU and
its approximation differ by up to 5e-4, which copied weights show.
"""

from typing import Literal

import torch.nn.functional as F
from torch import nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Pointwise, Site

Activation = Literal["relu", "gelu", "gelu_tanh", "relu_squared"]


class MLP(Pointwise):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: width inside; 4 dim if not given.
        activation: the function between the two layers.
        bias: both layers have a bias.
        out_std: of the initialisation of the second layer; 0.02 / sqrt(2 depth) if not given.
    """

    def __init__(
        self,
        site: Site,
        hidden: int | None = None,
        activation: Activation = "gelu",
        bias: bool = False,
        out_std: float | None = None,
    ):
        super().__init__()
        hidden = hidden_width(hidden, 4 * site.dim)
        self.activation = activation
        self.up = nn.Linear(site.dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, site.dim, bias=bias)
        normal_(self.up)
        normal_(self.down, residual_std(site.depth) if out_std is None else out_std)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        inner = self.up(x)
        if self.activation == "relu":
            return self.down(F.relu(inner))
        if self.activation == "relu_squared":
            return self.down(F.relu(inner).square())
        return self.down(F.gelu(inner, approximate="tanh" if self.activation == "gelu_tanh" else "none"))
