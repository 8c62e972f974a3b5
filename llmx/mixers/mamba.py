"""Mamba (arXiv 2312.00752): a diagonal state space whose step, input and output depend on the token (S6).

    u, g = W_u x, W_g x;    u = silu(conv(u))                            (F,) each, a causal convolution over 4 tokens
    (r_t, B_t, C_t) = W_s u_t,    dt_t = softplus(W_r r_t + b_r)         r (R,), B and C (N,), dt (F,)
    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T                       (F, N), A = -exp(A_log) (F, N)
    y_t = W_o ((h_t C_t + E * u_t) * silu(g_t))

A large dt forgets and writes, a small one passes the token by. Start: A = -1 .. -N in each channel, dt log-uniform in
0.001 to 0.1, E = 1. Time O(T D F + T F N), memory O(T F N) for the scan in PyTorch (the paper's kernel keeps T F); the
state is h and the last 3 inputs of the convolution, (N + 3) F numbers a sequence, whatever its length. No positions.
The traps: A is discretised exactly, B by Euler, dt B and not (exp(dt A) - 1) / A B; the convolution has a state too,
without which a step is another function than training; and the bias of dt is the inverse of softplus of the step that
is meant.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.init import normal_, residual_std
from llmx.parts.scan import scan
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Site, StatefulMixer
from llmx.shapes import Hidden

FASTEST, SLOWEST = 0.1, 0.001  # dt at the start


class MambaState(NamedTuple):
    convolution: Tensor  # (B, w - 1, F)
    memory: Tensor  # (B, F, N), h


class Mamba(StatefulMixer):
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
        u = F.silu(self.convolution(u))
        decay, write, read = self._recurrence(u)
        return self._read(scan(decay, write), read, u, gate)

    def init_state(self, batch_size: int, max_length: int) -> MambaState:
        exact = torch.promote_types(self.decay_log.dtype, torch.float32)
        memory = self.decay_log.new_zeros(batch_size, *self.decay_log.shape, dtype=exact)
        return MambaState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: MambaState, context: Context) -> tuple[Tensor, MambaState]:  # type: ignore[override]
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        u = F.silu(u)
        decay, write, read = self._recurrence(u)
        memory = decay * state.memory + write
        return self._read(memory, read, u, gate), MambaState(convolution, memory)

    def prefill(self, x: Hidden, state: MambaState, context: Context) -> tuple[Hidden, MambaState]:  # type: ignore[override]
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.prefill(u, state.convolution)
        u = F.silu(u)
        decay, write, read = self._recurrence(u)
        memory = scan(decay, write, state.memory)
        return self._read(memory, read, u, gate), MambaState(convolution, memory[:, -1])

    def _recurrence(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(dt A) and dt u B^T (B, T, F, N), and C (B, T, N), in float32 at least, without T in `step`."""
        exact = torch.promote_types(u.dtype, torch.float32)
        low, write, read = self.select(u).split(self.widths, -1)
        size = F.softplus(self.step_size(low).to(exact))
        decay = torch.exp(size[..., None] * -self.decay_log.to(exact).exp())
        with torch.autocast(u.device.type, enabled=False):  # a product of matrices, for the sake of its gradient
            written = (size * u)[..., None] @ write.to(exact)[..., None, :]
        return decay, written, read.to(exact)

    def _read(self, memory: Tensor, read: Tensor, u: Tensor, gate: Tensor) -> Tensor:
        """memory (B, T, F, N), read (B, T, N) -> (B, T, D), without T in `step`."""
        mixed = (memory * read[..., None, :]).sum(-1)  # on a CPU faster than so many small products of matrices
        return self.out((mixed + self.skip * u).to(gate.dtype) * F.silu(gate))
