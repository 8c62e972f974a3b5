"""A gated convolution over the last few tokens and nothing else: the worth of short memory alone.

    y_t = W_o (silu(W_g x_t) * sum_{j < w} c_j * (W_v x)_{t-j})         c_j (D,), each channel by itself

A baseline for longer memories (gated convolutions, arXiv 1612.08083); H3, Hyena and Mamba have this operator inside. A
stack of L layers sees L (w - 1) tokens back. Time O(T D (D + w)), memory O(T D). The state is the last w - 1 inputs of
the convolution, (w - 1) D numbers. The traps: a convolution padded on both sides, as in image networks, reads the
future. One padded anew at each piece forgets the last piece.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.init import normal_, residual_std
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class GatedShortConvolution(PrefillMixer[tuple[Tensor]]):
    """(B, T, D) -> (B, T, D).

    Args:
        width: w, the tokens that the convolution sees, its own among them.
    """

    def __init__(self, site: Site, width: int = 4):
        super().__init__()
        self.gate_value = nn.Linear(site.dim, 2 * site.dim, bias=False)
        self.convolution = ShortConvolution(site.dim, width)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.gate_value)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> tuple[Tensor]:
        return (self.convolution.init_state(batch_size),)

    def step(self, x: Tensor, state: tuple[Tensor], context: Context) -> tuple[Tensor, tuple[Tensor]]:
        gate, value = self.gate_value(x).chunk(2, -1)
        mixed, last = self.convolution.step(value, state[0])
        return self.out(F.silu(gate) * mixed), (last,)

    def prefill(self, x: Hidden, state: tuple[Tensor] | None, context: Context) -> tuple[Hidden, tuple[Tensor]]:
        gate, value = self.gate_value(x).chunk(2, -1)
        mixed, last = self.convolution.prefill(value, state[0] if state else None)
        return self.out(F.silu(gate) * mixed), (last,)
