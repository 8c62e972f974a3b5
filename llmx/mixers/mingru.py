"""The minimal GRU (arXiv 2410.01201): a GRU whose gate and candidate no longer read the hidden state.

    z_t = sigmoid(W_z x_t + b_z),    c_t = W_c x_t + b_c                      (F,) each
    h_t = (1 - z_t) * h_{t-1} + z_t * c_t,    y_t = W_o h_t

With nothing of h inside a nonlinearity the recurrence is linear in h and runs as a scan: T steps of F multiplications,
where a GRU has T matrix products. Each channel is a running mean of its candidates. Time O(T D F), memory O(T F); the
state is h, F numbers a sequence, whatever its length. This is the paper's first form, with a candidate of any sign. Its
second computes in logarithms and makes candidates positive for that. The trap: that second form exists because a scan
by cumulative products overflows; one that multiplies as it goes, as here, needs no logarithm.
"""

from typing import NamedTuple

from torch import Tensor, nn

from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.scan import scan
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class MinGRUState(NamedTuple):
    hidden: Tensor  # (B, F), h


class MinGRU(StatefulMixer[MinGRUState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        hidden: F, the channels of the recurrence; `dim` if not given.

    Raises:
        ValueError: for a hidden width below 1.
    """

    def __init__(self, site: Site, hidden: int | None = None):
        super().__init__()
        hidden = site.dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden: {hidden} is below 1")
        self.input = nn.Linear(site.dim, 2 * hidden)  # z and c
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.input, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self.out(scan(*self._recurrence(x)).to(x.dtype))

    def init_state(self, batch_size: int, max_length: int) -> MinGRUState:
        like = self.out.weight
        return MinGRUState(exact_zeros(like, batch_size, self.out.in_features))

    def step(self, x: Tensor, state: MinGRUState, context: Context) -> tuple[Tensor, MinGRUState]:
        gate, candidate = self.input(x).chunk(2, -1)
        z = gate.to(state.hidden.dtype).sigmoid()
        hidden = (1 - z) * state.hidden + z * candidate
        return self.out(hidden.to(x.dtype)), MinGRUState(hidden)

    def prefill(self, x: Hidden, state: MinGRUState, context: Context) -> tuple[Hidden, MinGRUState]:
        hidden = scan(*self._recurrence(x), state.hidden)
        return self.out(hidden.to(x.dtype)), MinGRUState(hidden[:, -1])

    def _recurrence(self, x: Hidden) -> tuple[Tensor, Tensor]:
        """1 - z_t and z_t * c_t, (B, T, F) each."""
        gate, candidate = self.input(x).chunk(2, -1)
        z = at_least_float32(gate).sigmoid()
        return 1 - z, z * candidate
