"""The minimal LSTM (arXiv 2410.01201): an LSTM whose gates and candidate no longer read the hidden state.

    f_t, i_t = sigmoid(W_f x_t + b_f), sigmoid(W_i x_t + b_i),    c_t = W_c x_t + b_c      (F,) each
    h_t = f_t / (f_t + i_t) * h_{t-1} + i_t / (f_t + i_t) * c_t,    y_t = W_o h_t

There is no cell apart from h, and no output gate. Only the ratio of the gates matters, so h stays a running mean of the
candidates at any length. Time O(T D F), memory O(T F) by a scan. The state is h, F numbers. The candidate has any sign,
as in the paper's first form. The traps: without the division h grows with the length. Where both gates are nearly shut
the division is 0 / 0, so the ratio is taken of logarithms: f / (f + i) = sigmoid(log f - log i).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.scan import scan
from llmx.parts.states import HiddenState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class MinLSTM(PrefillMixer[HiddenState]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the recurrence; `dim` if not given.
        forget_bias: where the bias of the forget gate starts.
    """

    def __init__(self, site: Site, hidden: int | None = None, forget_bias: float = 1.0):
        super().__init__()
        hidden = hidden_width(hidden, site.dim)
        self.input = nn.Linear(site.dim, 3 * hidden)  # f, i and c
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.input, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))
        with torch.no_grad():
            self.input.bias[:hidden] = forget_bias

    def init_state(self, batch_size: int, max_length: int) -> HiddenState:
        return HiddenState(exact_zeros(self.out.weight, batch_size, self.out.in_features))

    def step(self, x: Tensor, state: HiddenState, context: Context) -> tuple[Tensor, HiddenState]:
        keep, write = self._recurrence(x)
        hidden = keep * state.hidden + write
        return self.out(hidden.to(x.dtype)), HiddenState(hidden)

    def prefill(self, x: Hidden, state: HiddenState | None, context: Context) -> tuple[Hidden, HiddenState]:
        hidden = scan(*self._recurrence(x), state.hidden if state else None)
        return self.out(hidden.to(x.dtype)), HiddenState(hidden[:, -1])

    def _recurrence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f / (f + i), and i / (f + i) * c, (B, T, F) each, without T in `step`."""
        forget, let, candidate = self.input(x).chunk(3, -1)
        exact = exact_dtype(x)
        ratio = F.logsigmoid(forget.to(exact)) - F.logsigmoid(let.to(exact))
        return ratio.sigmoid(), (-ratio).sigmoid() * candidate
