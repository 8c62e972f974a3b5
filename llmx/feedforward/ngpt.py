"""The feed-forward of the normalized Transformer, nGPT (arXiv 2410.01131): SwiGLU with matrices of unit vectors.

    u, v = s_u * W_u h, s_v * W_v h * sqrt(D)           s_u, s_v (F,), both start at 1 and are stored as 1
    y = W_down (u * silu(v))

Rows of W_u, W_v (D,) and columns of W_down (D,) get length 1 again after every optimizer step. Each position by itself:
time O(T D F), no state. The traps: a cosine with h has size 1 / sqrt(D), where silu is almost linear, hence sqrt(D) in
v. In u the next normalisation would cancel it. W_down is normalised along its output, the embedding axis, not F.
"""

import torch.nn.functional as F
from torch import nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_
from llmx.parts.norm import LearnedScale, renormalise_
from llmx.protocol import Context, Hidden, Pointwise, Site


class NGPTSwiGLU(Pointwise):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: width inside; 8/3 dim, rounded, if not given.
    """

    def __init__(self, site: Site, hidden: int | None = None):
        super().__init__()
        hidden = hidden_width(hidden, 8 * site.dim / 3)
        self.gate_up = nn.Linear(site.dim, 2 * hidden, bias=False)  # W_v, W_u
        self.gate_scale = LearnedScale(hidden, site.dim**0.5, 1.0)  # s_v sqrt(D)
        self.up_scale = LearnedScale(hidden, 1.0, 1.0)  # s_u
        self.down = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.gate_up)
        normal_(self.down)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        renormalise_(self.gate_up.weight, 1)
        renormalise_(self.down.weight, 0)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate * self.gate_scale()) * (up * self.up_scale()))
