"""The minimal GRU (arXiv 2410.01201): a GRU whose gate and candidate no longer read the hidden state.

    z_t = sigmoid(W_z x_t + b_z),    c_t = W_c x_t + b_c                      (F,) each
    h_t = (1 - z_t) * h_{t-1} + z_t * c_t,    y_t = W_o h_t

No h is inside a nonlinearity, so the recurrence is linear in h and runs as a scan: T steps of F multiplications, where
a GRU has T matrix products. Each channel is a running mean of its candidates. Time O(T D F), memory O(T F). The state
is h, F numbers. This is the paper's first form, with a candidate of any sign. Its second computes in logarithms, for
which it makes candidates positive. The trap: that second form exists because a scan by cumulative products overflows. A
scan that multiplies step by step, as here, needs no logarithm.
"""

from torch import Tensor, nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.scan import scan
from llmx.parts.states import HiddenState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class MinGRU(PrefillMixer[HiddenState]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the recurrence; `dim` if not given.
    """

    def __init__(self, site: Site, hidden: int | None = None):
        super().__init__()
        hidden = hidden_width(hidden, site.dim)
        self.input = nn.Linear(site.dim, 2 * hidden)  # z and c
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.input, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> HiddenState:
        return HiddenState(exact_zeros(self.out.weight, batch_size, self.out.in_features))

    def step(self, x: Tensor, state: HiddenState, context: Context) -> tuple[Tensor, HiddenState]:
        gate, candidate = self.input(x).chunk(2, -1)
        z = gate.to(state.hidden.dtype).sigmoid()
        hidden = (1 - z) * state.hidden + z * candidate
        return self.out(hidden.to(x.dtype)), HiddenState(hidden)

    def prefill(self, x: Hidden, state: HiddenState | None, context: Context) -> tuple[Hidden, HiddenState]:
        hidden = scan(*self._recurrence(x), state.hidden if state else None)
        return self.out(hidden.to(x.dtype)), HiddenState(hidden[:, -1])

    def _recurrence(self, x: Hidden) -> tuple[Tensor, Tensor]:
        """1 - z_t and z_t * c_t, (B, T, F) each."""
        gate, candidate = self.input(x).chunk(2, -1)
        z = at_least_float32(gate).sigmoid()
        return 1 - z, z * candidate
