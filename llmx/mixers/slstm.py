"""The sLSTM of xLSTM (arXiv 2405.04517): an LSTM with exponential gates, a normaliser, and heads.

    i_t = exp(W_i s_t + R_i h_{t-1} + b_i)                   s_t = silu(conv(x)_t), over the last 4 tokens
    f_t = sigmoid(W_f s_t + R_f h_{t-1} + b_f)
    z_t, o_t = tanh, sigmoid of W x_t + R h_{t-1} + b        R block-diagonal: (K, K) for each head and gate
    c_t = f_t c_{t-1} + i_t z_t,   n_t = f_t n_{t-1} + i_t,   h_t = o_t * c_t / n_t,   y_t = norm of h_t in each head

Truly sequential: h_{t-1} goes through the gates of step t, so `forward` loops over time, after one product for the
rest. Time O(T D (D + K)) in T dependent steps, memory O(T D). The state is h, c, n, m and 3 inputs of the convolution,
7 D numbers. The trap: exp overflows. A stabiliser m_t = max(log f_t + m_{t-1}, log i_t) is taken out of both gates and
cancels in c / n. It starts at minus infinity: from m_0 = 0 a first i_t below e^-88 would round to 0 and give 0 / 0. So
n_t >= 1 always. There is no output projection: the paper's block goes from the norm to its feed-forward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.init import normal_
from llmx.parts.norm import HeadNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class SLSTMState(NamedTuple):
    short: Tensor  # of the convolution
    hidden: Tensor  # (B, H, K), h
    cell: Tensor  # (B, H, K), c / exp(m)
    normalizer: Tensor  # (B, H, K), n / exp(m)
    stabilizer: Tensor  # (B, H, K), m


class SLSTM(PrefillMixer[SLSTMState]):
    """(B, T, D) -> (B, T, D).

    Recurrent weights start at 0. The bias of the forget gate starts between 5 and -7 over the channels of a head; in
    lower layers more of them start high.

    Args:
        heads: must divide `dim`.
        width: tokens that the convolution before the input and forget gates sees.
    """

    def __init__(self, site: Site, heads: int = 4, width: int = 4):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.convolution = ShortConvolution(site.dim, width)
        self.gates = nn.Linear(site.dim, 2 * site.dim, bias=False)  # rows: heads, in each i and f
        self.inputs = nn.Linear(site.dim, 2 * site.dim, bias=False)  # rows: heads, in each z and o
        self.bias = nn.Parameter(torch.zeros(4 * site.dim))  # heads, in each i, f, z, o
        self.recurrent = nn.Parameter(torch.zeros(heads, self.head_dim, 4 * self.head_dim))  # from h to i, f, z, o
        self.norm = HeadNorm(heads, self.head_dim)
        std = (2 / (5 * site.dim)) ** 0.5
        normal_(self.gates, std)
        normal_(self.inputs, std)
        power = 0.3 + 1.3 * site.layer / max(site.depth - 1, 1)
        with torch.no_grad():
            self.bias.view(heads, 4, -1)[:, 1] = 5 - 12 * torch.linspace(0, 1, self.head_dim) ** power

    def init_state(self, batch_size: int, max_length: int) -> SLSTMState:
        zeros = exact_zeros(self.recurrent, batch_size, self.heads, self.head_dim)
        stabilizer = torch.full_like(zeros, float("-inf"))
        return SLSTMState(self.convolution.init_state(batch_size), zeros, zeros.clone(), zeros.clone(), stabilizer)

    def step(self, x: Tensor, state: SLSTMState, context: Context) -> tuple[Tensor, SLSTMState]:
        mixed, short = self.convolution.step(x, state.short)
        hidden = torch.einsum("bhk,hkg->bhg", state.hidden, self.recurrent.to(state.hidden.dtype))
        i, f, z, o = (self._project(x, mixed) + hidden).chunk(4, -1)  # (B, H, K)
        kept = F.logsigmoid(f) + state.stabilizer
        stabilizer = torch.maximum(kept, i)
        i, f = (i - stabilizer).exp(), (kept - stabilizer).exp()
        cell = f * state.cell + i * z.tanh()
        normalizer = f * state.normalizer + i
        hidden = o.sigmoid() * cell / normalizer
        return self.norm(hidden).to(x.dtype), SLSTMState(short, hidden, cell, normalizer, stabilizer)

    def prefill(self, x: Hidden, state: SLSTMState | None, context: Context) -> tuple[Hidden, SLSTMState]:
        """The loop over time. Heads come first, so that a step is one batched product."""
        mixed, short = self.convolution.prefill(x, state.short if state else None)
        state = state or self.init_state(len(x), 0)
        inputs = self._project(x, mixed).permute(1, 2, 0, 3).contiguous()  # (T, H, B, 4 K)
        recurrent = self.recurrent.to(inputs.dtype)
        hidden, cell, normalizer, stabilizer = (part.transpose(0, 1) for part in state[1:])  # (H, B, K)
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for step in inputs.unbind(0):
                i, f, z, o = torch.baddbmm(step, hidden, recurrent).chunk(4, -1)
                kept = F.logsigmoid(f) + stabilizer
                stabilizer = torch.maximum(kept, i).detach()  # the outputs do not depend on it
                i, f = (i - stabilizer).exp(), (kept - stabilizer).exp()
                cell = torch.addcmul(f * cell, i, z.tanh())
                normalizer = torch.addcmul(i, f, normalizer)
                hidden = o.sigmoid() * cell / normalizer
                outputs.append(hidden)
        output = self.norm(torch.stack(outputs).permute(2, 0, 1, 3)).to(x.dtype)  # (B, T, D)
        after = (part.transpose(0, 1) for part in (hidden, cell, normalizer, stabilizer))
        return output, SLSTMState(short, *after)

    def _project(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The input's part of the gates: (..., H, 4 K), in float32 at least."""
        shape = (self.heads, 2 * self.head_dim)
        i_f = self.gates(F.silu(mixed)).unflatten(-1, shape)
        z_o = self.inputs(x).unflatten(-1, shape)
        return at_least_float32(torch.cat((i_f, z_o), -1)) + self.bias.view(self.heads, -1)
