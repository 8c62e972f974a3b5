"""The LSTM with a forget gate (Hochreiter & Schmidhuber 1997, doi 10.1162/neco.1997.9.8.1735; Gers et al. 2000).

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b)       three gates, (D,) each
    g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t * c_{t-1} + i_t * g_t
    y_t = h_t = o_t * tanh(c_t)

Sequential: h_{t-1} goes through a matrix and a nonlinearity before anything of step t is known, so `forward` is a loop
over time. What does not depend on h, W x_t + b, is one matrix product for all positions before it. Time O(T D^2) in T
dependent steps, memory O(T D) for training; the state is h and c, 2 D numbers a sequence, whatever its length.
The trap: a forget gate with bias 0 starts by halving the cell at every step, and a gradient does not survive 32 of
them; it starts at 1 here (Jozefowicz et al. 2015). torch.nn.LSTM orders its gates i, f, g, o and has two biases that
only ever occur as their sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.protocol import Context, Site, StatefulMixer
from llmx.shapes import Hidden


class LSTMState(NamedTuple):
    hidden: Tensor  # (B, D), h
    cell: Tensor  # (B, D), c


class LSTM(StatefulMixer):
    """One LSTM layer, (B, T, D) -> (B, T, D), whose output is its hidden state.

    Input weights start uniform in +-1 / sqrt(D), recurrent ones orthogonal for each gate.

    Args:
        site: where the mixer stands.
        forget_bias: where the bias of the forget gate starts.
    """

    def __init__(self, site: Site, forget_bias: float = 1.0):
        super().__init__()
        dim = site.dim
        self.input = nn.Linear(dim, 4 * dim)  # rows: the gates i, f, o, and g
        self.recurrent = nn.Linear(dim, 4 * dim, bias=False)
        nn.init.uniform_(self.input.weight, -(dim**-0.5), dim**-0.5)
        nn.init.zeros_(self.input.bias)
        with torch.no_grad():
            for rows in self.recurrent.weight.split(dim):
                nn.init.orthogonal_(rows)
            self.input.bias[dim : 2 * dim] = forget_bias

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self._run(x, self.init_state(x.shape[0], x.shape[1]))[0]

    def init_state(self, batch_size: int, max_length: int) -> LSTMState:
        zeros = self.recurrent.weight.new_zeros(batch_size, self.recurrent.in_features)
        return LSTMState(zeros, zeros.clone())

    def step(self, x: Tensor, state: LSTMState, context: Context) -> tuple[Tensor, LSTMState]:  # type: ignore[override]
        i, f, o, g = (self.input(x) + self.recurrent(state.hidden)).chunk(4, -1)
        cell = f.sigmoid() * state.cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        return hidden, LSTMState(hidden, cell)

    def prefill(self, x: Hidden, state: LSTMState, context: Context) -> tuple[Hidden, LSTMState]:  # type: ignore[override]
        return self._run(x, state)

    def _run(self, x: Hidden, state: LSTMState) -> tuple[Hidden, LSTMState]:
        """The loop over time, from any state."""
        hidden, cell = state
        dim = hidden.shape[-1]
        inputs = self.input(x.transpose(0, 1))  # (T, B, 4 D): time in front, so that a step reads one piece of memory
        recurrent = self.recurrent.weight.t().to(inputs.dtype)  # under autocast cast once, not at every step
        outputs = []
        for step in inputs.unbind(0):
            gates, g = torch.addmm(step, hidden.to(step.dtype), recurrent).split((3 * dim, dim), -1)
            i, f, o = gates.sigmoid().chunk(3, -1)
            cell = f * cell + i * g.tanh()
            hidden = o * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, 1), LSTMState(hidden, cell)
