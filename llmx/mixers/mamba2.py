"""Mamba-2 (arXiv 2405.21060): a selective state space with one decay a head, hence linear attention in chunks (SSD).

    (g, [u; B; C], r)_t = W x_t,    [u; B; C] = silu(conv([u; B; C]))     u, g (F,) in H heads of P; B, C (N,) for all
    dt_t = softplus(r_t + b)   (H,),    a_t = exp(-dt_t exp(A_log))       (H,)
    S_t = a_t S_{t-1} + B_t (dt_t u_t)^T                                  (N, P) a head
    y_t = W_o norm((S_t^T C_t + E u_t) * silu(g_t))                       norm: RMSNorm over all F; E (H,)

C is the query, B the key of linear attention, shared by all heads, and dt u the value. exp(A_log) starts uniform in 1
to 16, dt log-uniform in 0.001 to 0.1, E at 1. Time O(T (c + N) F) for chunks of c = 32, nearly all matrix products,
memory O(T c H) for the scores and N F for each chunk. The state is S and the last 3 inputs of the convolution, N F + 3
(F + 2 N) numbers. The traps: the norm comes after the gate. B and C are convolved too. Differences of summed log decays
are masked before exp: above the diagonal they overflow, and 0 times infinity is no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width, hidden_width
from llmx.parts.init import normal_, residual_std, softplus_time_steps
from llmx.parts.linear_attention import decay_step, scalar_decay
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class Mamba2(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the state space; twice `dim` if not given.
        heads: H; must divide `hidden`.
        state: N, numbers of state a channel.
        convolution: tokens that the convolution sees, the current one among them.
    """

    def __init__(self, site: Site, hidden: int | None = None, heads: int = 4, state: int = 64, convolution: int = 4):
        super().__init__()
        hidden = hidden_width(hidden, 2 * site.dim)
        check_sizes(state=state, convolution=convolution)
        self.heads = heads
        self.memory_shape = (heads, state, head_width(hidden, heads, "hidden"))  # H, N, P
        self.widths = (hidden, hidden + 2 * state, heads)  # g, the convolution's input, r
        self.convolved = (hidden, state, state)  # u, B, C
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(hidden + 2 * state, convolution, bias=True)
        self.step_bias = nn.Parameter(softplus_time_steps(heads))  # b
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # A_log
        self.skip = nn.Parameter(torch.ones(heads))  # E
        self.norm = RMSNorm(hidden)
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.project, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.skip, batch_size, *self.memory_shape)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        gate, u, steps = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        query, key, value, new, log_decay = self._recurrence(u, steps)
        mixed, memory = decay_step(query, key, new, log_decay[..., None], state.memory)
        return self._read(mixed, value, gate), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        gate, u, steps = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        query, key, value, new, log_decay = self._recurrence(u, steps)
        mixed, memory = scalar_decay(query, key, new, log_decay, memory)
        return self._read(mixed, value, gate), ConvolvedState(convolution, memory)

    def _recurrence(self, u: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """C and B (B, T, 1, N), u and dt u (B, T, H, P), and log a (B, T, H), without T in `step`."""
        value, key, query = F.silu(u).split(self.convolved, -1)
        exact = exact_dtype(steps)
        size = F.softplus(steps.to(exact) + self.step_bias.to(exact))
        value = value.unflatten(-1, (self.heads, -1))
        new = (value * size[..., None]).to(value.dtype)
        return query[..., None, :], key[..., None, :], value, new, -size * self.decay_log.to(exact).exp()

    def _read(self, mixed: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """(B, T, H, P), and the gate (B, T, F) -> (B, T, D), without T in `step`."""
        mixed = torch.addcmul(mixed, self.skip.to(value.dtype)[:, None], value).flatten(-2)
        return self.out(self.norm(mixed * F.silu(gate)))
