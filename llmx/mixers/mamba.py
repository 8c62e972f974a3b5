"""Mamba (arXiv 2312.00752): a diagonal state space whose step, input and output depend on the token (S6).

    u, g = W_u x, W_g x;    u = silu(conv(u))                            (F,) each, a causal convolution over 4 tokens
    (r_t, B_t, C_t) = W_s u_t,    dt_t = softplus(W_r r_t + b_r)         r (R,), B and C (N,), dt (F,)
    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T                       (F, N), A = -exp(A_log) (F, N)
    y_t = W_o ((h_t C_t + E * u_t) * silu(g_t))

A large dt forgets and writes, a small one passes the token by. Start: A = -1 .. -N in each channel, dt log-uniform in
0.001 to 0.1, E = 1. Time O(T D F + T F N), memory O(T F) and the states of a piece of the text, much as in the paper's
kernel; the state is h and the last 3 inputs of the convolution, (N + 3) F numbers a sequence, whatever its length. No
positions. The traps: A is discretised exactly, B by Euler, dt B and not (exp(dt A) - 1) / A B; the convolution has a
state too, without which a step is another function than training; and the bias of dt is the inverse of softplus of the
step that is meant.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.selective_scan import selective_scan
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, Site, StatefulMixer

FASTEST, SLOWEST = 0.1, 0.001  # dt at the start


class MambaState(NamedTuple):
    convolution: Tensor  # (B, w - 1, F)
    memory: Tensor  # (B, F, N), h


class Mamba(StatefulMixer[MambaState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        hidden: F, the channels of the state space; twice `dim` if not given.
        state: N, numbers of state a channel.
        rank: R, numbers that the steps dt are computed from; a 16th of `dim`, rounded up, if not given.
        convolution: tokens that the convolution sees, the current one among them.

    Raises:
        ValueError: for a size below 1.
    """

    undecayed = ("decay_log",)

    def __init__(
        self, site: Site, hidden: int | None = None, state: int = 16, rank: int | None = None, convolution: int = 4
    ):
        super().__init__()
        hidden = 2 * site.dim if hidden is None else hidden
        rank = -(-site.dim // 16) if rank is None else rank
        for name, size in (("hidden", hidden), ("state", state), ("rank", rank), ("convolution", convolution)):
            if size < 1:
                raise ValueError(f"{name}: {size} is below 1")
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
        start = torch.empty(hidden).uniform_(math.log(SLOWEST), math.log(FASTEST)).exp()
        with torch.no_grad():
            self.step_size.bias.copy_(start.expm1().log())  # softplus of it is the start

    def forward(self, x: Hidden, context: Context) -> Hidden:
        u, gate = self.project(x).chunk(2, -1)
        return self._mix(F.silu(self.convolution(u)), gate, None)[0]

    def init_state(self, batch_size: int, max_length: int) -> MambaState:
        memory = exact_zeros(self.decay_log, batch_size, *self.decay_log.shape)
        return MambaState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: MambaState, context: Context) -> tuple[Tensor, MambaState]:
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        u = F.silu(u)
        size, rate, write, read = self._select(u)
        memory = torch.exp(size[..., None] * rate) * state.memory + (size * u)[..., None] * write[:, None]
        return self._read((memory * read[:, None]).sum(-1), u, gate), MambaState(convolution, memory)

    def prefill(self, x: Hidden, state: MambaState, context: Context) -> tuple[Hidden, MambaState]:
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.prefill(u, state.convolution)
        mixed, memory = self._mix(F.silu(u), gate, state.memory)
        return mixed, MambaState(convolution, memory)

    def _mix(self, u: Tensor, gate: Tensor, memory: Tensor | None) -> tuple[Hidden, Tensor]:
        """u and g (B, T, F), h before them (B, F, N) -> (B, T, D), and h after them."""
        size, rate, write, read = self._select(u)
        mixed, memory = selective_scan(size, u, rate, write, read, memory)
        return self._read(mixed, u, gate), memory

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (B, T, F), A (F, N), B and C (B, T, N), in float32 at least, without T in `step`."""
        exact = exact_dtype(u)
        low, write, read = self.select(u).split(self.widths, -1)
        size = F.softplus(self.step_size(low).to(exact))
        return size, -self.decay_log.to(exact).exp(), write.to(exact), read.to(exact)

    def _read(self, mixed: Tensor, u: Tensor, gate: Tensor) -> Tensor:
        """h C, u and g (B, T, F) -> (B, T, D), without T in `step`."""
        return self.out((mixed + self.skip * u).to(gate.dtype) * F.silu(gate))
