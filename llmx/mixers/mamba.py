"""Mamba (arXiv 2312.00752): a diagonal state space whose step, input and output depend on the token (S6).

    u, g = W_u x, W_g x;    u = silu(conv(u))                            (F,) each, a causal convolution over 4 tokens
    (r_t, B_t, C_t) = W_s u_t,    dt_t = softplus(W_r r_t + b_r)         r (R,), B and C (N,), dt (F,)
    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T                       (F, N), A = -exp(A_log) (F, N)
    y_t = W_o ((h_t C_t + E * u_t) * silu(g_t))

A large dt forgets and writes, a small one lets the token pass by. At the start A = -1 .. -N in each channel, dt is
log-uniform in 0.001 to 0.1, and E = 1. Time O(T D F + T F N), memory O(T F) and the states of a piece of the text, much
as in the paper's kernel. The state is h and the last 3 inputs of the convolution, (N + 3) F numbers. The traps: A is
discretised exactly, B by Euler, dt B and not (exp(dt A) - 1) / A B. The convolution has a state too, without which a
step is another function than training. The bias of dt is the inverse softplus of the intended step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, hidden_width
from llmx.parts.init import normal_, residual_std, softplus_time_steps
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.selective_scan import selective_scan
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class Mamba(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the state space; twice `dim` if not given.
        state: N, numbers of state a channel.
        rank: R, numbers that the steps dt are computed from; a 16th of `dim`, rounded up, if not given.
        convolution: tokens that the convolution sees, the current one among them.
    """

    undecayed = ("decay_log",)

    def __init__(
        self, site: Site, hidden: int | None = None, state: int = 16, rank: int | None = None, convolution: int = 4
    ):
        super().__init__()
        hidden = hidden_width(hidden, 2 * site.dim)
        rank = -(-site.dim // 16) if rank is None else rank
        check_sizes(state=state, rank=rank, convolution=convolution)
        self.widths = (rank, state, state)
        self.project = nn.Linear(site.dim, 2 * hidden, bias=False)  # u and g
        self.convolution = ShortConvolution(hidden, convolution, bias=True)
        self.select = nn.Linear(hidden, rank + 2 * state, bias=False)  # r, B and C
        self.step_size = nn.Linear(rank, hidden)  # of dt
        self.decay_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(hidden, 1))  # A_log
        self.skip = nn.Parameter(torch.ones(hidden))  # E
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.project, site.dim**-0.5)
        normal_(self.select, hidden**-0.5)
        normal_(self.out, residual_std(site.depth))
        nn.init.uniform_(self.step_size.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.step_size.bias.copy_(softplus_time_steps(hidden))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.decay_log, batch_size, *self.decay_log.shape)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        u = F.silu(u)
        size, rate, write, read = self._select(u)
        memory = torch.exp(size[..., None] * rate) * state.memory + (size * u)[..., None] * write[:, None]
        mixed = (memory * read[:, None]).sum(-1)
        return self.out((mixed + self.skip * u).to(gate.dtype) * F.silu(gate)), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        u = F.silu(u)
        size, rate, write, read = self._select(u)
        mixed, memory = selective_scan(size, u, rate, write, read, memory)
        return self.out((mixed + self.skip * u).to(gate.dtype) * F.silu(gate)), ConvolvedState(convolution, memory)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (B, T, F), A (F, N), B and C (B, T, N), in float32 at least, without T in `step`."""
        exact = exact_dtype(u)
        low, write, read = self.select(u).split(self.widths, -1)
        size = F.softplus(self.step_size(low).to(exact))
        return size, -self.decay_log.to(exact).exp(), write.to(exact), read.to(exact)
