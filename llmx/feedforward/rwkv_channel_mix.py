"""RWKV-7's channel mix (arXiv 2503.14456): a two-layer perceptron that sees a share of the previous token.

    x'_t = x_t + m * (x_{t-1} - x_t),     y_t = W_down relu(W_up x'_t)^2          m (D,)

Time O(T D F), memory O(T F). The state is the last x, D numbers. Unlike earlier RWKVs it has no gate. The traps:
without its state, generation sees zeros for the previous token. A shift by `roll` shows the first position the last.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import hidden_width
from llmx.protocol import Context, Hidden, Site, StatefulFeedForward


class ChannelMixState(NamedTuple):
    last: Tensor  # (B, D), x of the previous token


class RWKVChannelMix(StatefulFeedForward[ChannelMixState]):
    """(B, T, D) -> (B, T, D). W_up starts orthogonal, W_down at 0, m spread over channels, smaller in higher layers.

    Args:
        hidden: width inside; 4 dim if not given.
    """

    def __init__(self, site: Site, hidden: int | None = None):
        super().__init__()
        hidden = hidden_width(hidden, 4 * site.dim)
        self.shift = nn.Parameter(1 - (torch.arange(site.dim) / site.dim) ** ((1 - site.layer / site.depth) ** 4))
        self.up = nn.Linear(site.dim, hidden, bias=False)
        self.down = nn.Linear(hidden, site.dim, bias=False)
        nn.init.orthogonal_(self.up.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self._mix(x, F.pad(x, (0, 0, 1, -1)))

    def init_state(self, batch_size: int, max_length: int) -> ChannelMixState:
        return ChannelMixState(self.down.weight.new_zeros(batch_size, self.down.out_features))

    def step(self, x: Tensor, state: ChannelMixState, context: Context) -> tuple[Tensor, ChannelMixState]:
        return self._mix(x, state.last.to(x.dtype)), ChannelMixState(x)

    def prefill(self, x: Hidden, state: ChannelMixState, context: Context) -> tuple[Hidden, ChannelMixState]:
        shifted = torch.cat((state.last.to(x.dtype)[:, None], x[:, :-1]), 1)
        return self._mix(x, shifted), ChannelMixState(x[:, -1])

    def _mix(self, x: Tensor, shifted: Tensor) -> Tensor:
        x = torch.addcmul(x, shifted - x, self.shift.to(x.dtype))
        return self.down(F.relu(self.up(x)).square())
