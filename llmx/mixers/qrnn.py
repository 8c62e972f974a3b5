"""The quasi-recurrent network (arXiv 1611.01576): gates from a short convolution, then pooling along time.

    z_t, f_t, o_t = tanh, sigmoid, sigmoid of  sum_{j < w} W_j x_{t-j} + b          (F,) each, x before the text 0
    c_t = f_t * c_{t-1} + (1 - f_t) * z_t                                           the paper's fo-pooling
    y_t = o_t * c_t

An LSTM that reads x_{t-1} instead of h_{t-1}: nothing recurrent is inside a nonlinearity, so all gates are one matrix
product for the whole text, and c is a scan. Unlike the convolutions of later models this one mixes channels. Time
O(T w D^2), memory O(T D). The state is c and the last w - 1 inputs, w D numbers. The trap: a centred convolution, the
padding of most libraries, shows each gate the next token. This one sees back only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.parts.init import normal_
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.scan import scan
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class QRNNState(NamedTuple):
    inputs: Tensor  # (B, w - 1, D), oldest first
    cell: Tensor  # (B, D), c


class QRNN(PrefillMixer[QRNNState]):
    """(B, T, D) -> (B, T, D).

    Args:
        width: w, tokens that the gates see, the current one among them.
    """

    def __init__(self, site: Site, width: int = 2):
        super().__init__()
        check_sizes(width=width)
        self.width = width
        self.dim = site.dim
        self.gates = nn.Linear(width * site.dim, 3 * site.dim)  # columns: oldest token first; rows: z, f, o
        normal_(self.gates, (width * site.dim) ** -0.5)

    def init_state(self, batch_size: int, max_length: int) -> QRNNState:
        inputs = self.gates.weight.new_zeros(batch_size, self.width - 1, self.dim)
        return QRNNState(inputs, exact_zeros(inputs, batch_size, self.dim))

    def step(self, x: Tensor, state: QRNNState, context: Context) -> tuple[Tensor, QRNNState]:
        seen = torch.cat((state.inputs.to(x.dtype), x[:, None]), 1)  # (B, w, D)
        z, f, o = self.gates(seen.flatten(1)).to(state.cell.dtype).chunk(3, -1)
        f = f.sigmoid()
        cell = f * state.cell + (1 - f) * z.tanh()
        return (o.sigmoid() * cell).to(x.dtype), QRNNState(seen[:, 1:], cell)

    def prefill(self, x: Hidden, state: QRNNState | None, context: Context) -> tuple[Hidden, QRNNState]:
        inputs, start = state or (x.new_zeros(len(x), self.width - 1, self.dim), None)
        seen = torch.cat((inputs.to(x.dtype), x), 1)
        time = x.shape[1]
        windows = torch.cat([seen[:, j : j + time] for j in range(self.width)], -1)  # (B, T, w D)
        z, f, o = at_least_float32(self.gates(windows)).chunk(3, -1)
        f = f.sigmoid()
        cell = scan(f, (1 - f) * z.tanh(), start)
        return (o.sigmoid() * cell).to(x.dtype), QRNNState(seen[:, time:], cell[:, -1])
