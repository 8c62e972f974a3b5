"""SwiGLU feed-forward (arXiv 2002.05202): W_down (silu(W_gate x) * W_up x), no biases.

Each position by itself: time O(T D F), no state. It has three matrices, so hidden = 8/3 dim holds as many parameters as
the usual feed-forward with hidden = 4 dim.
"""

import torch.nn.functional as F
from torch import nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Pointwise, Site


class SwiGLU(Pointwise):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: width inside; 8/3 dim, rounded, if not given.
        out_std: of the initialisation of W_down; 0.02 / sqrt(2 depth) if not given.
    """

    def __init__(self, site: Site, hidden: int | None = None, out_std: float | None = None):
        super().__init__()
        hidden = hidden_width(hidden, 8 * site.dim / 3)
        self.gate_up = nn.Linear(site.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.gate_up)
        normal_(self.down, residual_std(site.depth) if out_std is None else out_std)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
