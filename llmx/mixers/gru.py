"""The gated recurrent unit (arXiv 1406.1078), in the form that cuDNN and PyTorch compute.

    r_t, z_t = sigmoid(W x_t + U h_{t-1} + b)            reset and update gate, (D,) each
    n_t = tanh(W_n x_t + b_n + r_t * (U_n h_{t-1} + u_n))
    y_t = h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Sequential like the LSTM, in the kernel of torch.nn.GRU. Time O(T D^2) in T dependent steps, memory O(T D) for training.
The state is h, D numbers. The traps: the paper's first version resets before the product, U_n (r_t * h_{t-1}), which is
another function and costs a second product that waits for the first. Here the reset comes after it, hence the bias u_n
of its own inside. And the papers disagree whether z keeps the old state or takes the new one: here z = 1 keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.init import recurrent_
from llmx.parts.states import HiddenState
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class GRU(StatefulMixer[HiddenState]):
    """(B, T, D) -> (B, T, D). W starts uniform in +-1 / sqrt(D), U orthogonal for each gate, biases at 0."""

    def __init__(self, site: Site):
        super().__init__()
        dim = site.dim
        self.input = nn.Linear(dim, 3 * dim)  # rows: the gates r and z, and n
        self.recurrent = nn.Linear(dim, 3 * dim, bias=False)
        self.reset_bias = nn.Parameter(torch.zeros(dim))  # u_n
        recurrent_(self.input, self.recurrent)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self._run(x, self.init_state(x.shape[0], x.shape[1]))[0]

    def init_state(self, batch_size: int, max_length: int) -> HiddenState:
        return HiddenState(self.recurrent.weight.new_zeros(batch_size, self.recurrent.in_features))

    def step(self, x: Tensor, state: HiddenState, context: Context) -> tuple[Tensor, HiddenState]:
        r, z, n = self.input(x).chunk(3, -1)
        past_r, past_z, past_n = self.recurrent(state.hidden).chunk(3, -1)
        keep = (z + past_z).sigmoid()
        new = (n + (r + past_r).sigmoid() * (past_n + self.reset_bias)).tanh()
        hidden = (1 - keep) * new + keep * state.hidden
        return hidden, HiddenState(hidden)

    def prefill(self, x: Hidden, state: HiddenState, context: Context) -> tuple[Hidden, HiddenState]:
        with torch.autocast(x.device.type, enabled=False):
            return self._run(x.to(state.hidden.dtype), state)

    @torch.compiler.disable  # compilation would unroll it
    def _run(self, x: Hidden, state: HiddenState) -> tuple[Hidden, HiddenState]:
        """All positions, from any state."""
        bias = F.pad(self.reset_bias, (2 * len(self.reset_bias), 0))
        weights = [self.input.weight, self.recurrent.weight, self.input.bias, bias]
        outputs, hidden = torch.gru(
            x, state.hidden[None], weights, True, 1, 0.0, self.training, False, True
        )  # with biases, one layer, no dropout, one direction, batch first
        return outputs, HiddenState(hidden[0])
