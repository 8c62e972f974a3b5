"""GeGLU feed-forward (arXiv 2002.05202, as in Gemma): W_down (gelu(W_gate x) * W_up x), no biases.

Each position by itself: time O(T D F), no state. The trap: Gemma uses the tanh approximation of GELU.
"""

import torch.nn.functional as F
from torch import nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Pointwise, Site


class GeGLU(Pointwise):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: width inside; 8/3 dim, rounded, if not given.
    """

    def __init__(self, site: Site, hidden: int | None = None):
        super().__init__()
        hidden = hidden_width(hidden, 8 * site.dim / 3)
        self.gate_up = nn.Linear(site.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.gate_up)
        normal_(self.down, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.gelu(gate, approximate="tanh") * up)
