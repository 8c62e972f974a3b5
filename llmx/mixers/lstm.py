"""The LSTM with a forget gate (Hochreiter & Schmidhuber 1997, doi 10.1162/neco.1997.9.8.1735; Gers et al. 2000).

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b)       three gates, (D,) each
    g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t * c_{t-1} + i_t * g_t
    y_t = h_t = o_t * tanh(c_t)

Sequential: h_{t-1} goes through a matrix and a nonlinearity before anything of step t is known, so `forward` takes step
after step, in the kernel of torch.nn.LSTM (oneDNN, cuDNN). Time O(T D^2) in T dependent steps, memory O(T D) for
training. The state is h and c, 2 D numbers. The traps: a forget gate with bias 0 first halves the cell at every step,
and a gradient does not survive 32 of them. It starts at 1 here (Jozefowicz et al. 2015). The kernel takes two biases
that only occur as their sum. Under bf16 autocast it keeps the cell in bf16, where a cell that counts by hundredths is
stuck at 4: a network that counts needs `32-true`. `prefill` and `step` keep the cell in the dtype of the weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.parts.init import recurrent_
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class LSTMState(NamedTuple):
    hidden: Tensor  # (B, D), h
    cell: Tensor  # (B, D), c


class LSTM(StatefulMixer[LSTMState]):
    """(B, T, D) -> (B, T, D). Input weights start uniform in +-1 / sqrt(D), recurrent ones orthogonal for each gate.

    Args:
        forget_bias: where the bias of the forget gate starts.
    """

    def __init__(self, site: Site, forget_bias: float = 1.0):
        super().__init__()
        dim = site.dim
        self.input = nn.Linear(dim, 4 * dim)  # rows: the gates i, f, g and o
        self.recurrent = nn.Linear(dim, 4 * dim, bias=False)
        recurrent_(self.input, self.recurrent)
        with torch.no_grad():
            self.input.bias[dim : 2 * dim] = forget_bias

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self._run(x, self.init_state(x.shape[0], x.shape[1]))[0]

    def init_state(self, batch_size: int, max_length: int) -> LSTMState:
        zeros = self.recurrent.weight.new_zeros(batch_size, self.recurrent.in_features)
        return LSTMState(zeros, zeros.clone())

    def step(self, x: Tensor, state: LSTMState, context: Context) -> tuple[Tensor, LSTMState]:
        i, f, g, o = (self.input(x) + self.recurrent(state.hidden)).chunk(4, -1)
        cell = f.sigmoid() * state.cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        return hidden, LSTMState(hidden, cell)

    def prefill(self, x: Hidden, state: LSTMState, context: Context) -> tuple[Hidden, LSTMState]:
        with torch.autocast(x.device.type, enabled=False):
            return self._run(x.to(state.hidden.dtype), state)

    @torch.compiler.disable  # compilation would unroll it
    def _run(self, x: Hidden, state: LSTMState) -> tuple[Hidden, LSTMState]:
        """All positions, from any state."""
        bias = self.input.bias
        weights = [self.input.weight, self.recurrent.weight, bias, torch.zeros_like(bias)]
        outputs, hidden, cell = torch.lstm(
            x, [part[None] for part in state], weights, True, 1, 0.0, self.training, False, True
        )  # with biases, one layer, no dropout, one direction, batch first
        return outputs, LSTMState(hidden[0], cell[0])
