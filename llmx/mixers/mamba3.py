"""Mamba-3 (arXiv 2603.15569), one input and output a head (SISO): a state space that turns, by the trapezoidal rule.

    (g, x, B, C, r, a, l, w)_t = W u_t     g, x (F,) in H heads of P; B, C (N,) for all; r, a, l (H,); w (R,) for all
    B_t = rms(B_t) + b_B,  C_t = rms(C_t) + b_C                               (H, N), biases a head, 1 at the start
    dt = softplus(r + b)   (H,),    alpha = exp(-dt softplus(a))   (H,),    lambda = sigmoid(l)   (H,)
    phi_t = phi_{t-1} + dt_t pi tanh(w_t)   (H, R);    k_t = turn(phi_t) B_t,    q_t = turn(phi_t) C_t
    S_t = alpha_t S_{t-1} + (1 - lambda_t) dt_t alpha_t k_{t-1} x_{t-1}^T + lambda_t dt_t k_t x_t^T    (N, P) a head
    y_t = W_o ((S_t^T q_t + E x_t) * silu(g_t))                               E (H,)

The first 2 R numbers of B and C turn in pairs. That is a complex decay alpha exp(i dt theta), which counts modulo n, as
no decay in (0, 1] can. lambda = 1 is Mamba-2's step (Euler). The term of t - 1 replaces the convolution. MIMO is left
out. dt starts log-uniform in 0.001 to 0.1. The least softplus(a) is 1e-4. Time O(T (c + N) F) for chunks of c = 32,
memory O(T c H) for the scores and N F a chunk. The state is S, k, x and phi, N F + H N + F + H R numbers. The traps: a
single weight for x_t, covering its own term and what t + 1 adds, shows y_t the next token, so the sum here runs one
token late. The angle phi grows without bound, beyond float32: it is summed in float64, in whole turns, modulo 1.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width, hidden_width
from llmx.parts.init import normal_, residual_std, softplus_time_steps
from llmx.parts.linear_attention import scalar_decay
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.rotary import rotate_part
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class Mamba3State(NamedTuple):
    memory: Tensor  # (B, H, N, P), S
    key: Tensor  # (B, H, N), k of the last token
    value: Tensor  # (B, H, P), x of the last token
    angle: Tensor  # (B, H, R), phi / 2 pi modulo 1, in -1/2 to 1/2


class Inputs(NamedTuple):
    """What the recurrence reads of its tokens, in float32 at least; without T in `step`."""

    query: Tensor  # (B, T, H, N), C before its turn
    key: Tensor  # (B, T, H, N), B before its turn
    value: Tensor  # (B, T, H, P)
    previous: Tensor  # (B, T, H, 1), (1 - lambda) dt alpha
    current: Tensor  # (B, T, H, 1), lambda dt
    log_decay: Tensor  # (B, T, H), log alpha
    turn: Tensor  # (B, T, H, R), in whole turns


class Mamba3(PrefillMixer[Mamba3State]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the state space; twice `dim` if not given.
        heads: H; must divide `hidden`.
        state: N, numbers of state a channel.
        rotary_dim: 2 R, how many of them turn; even, from 2 to `state`; half if not given, as in the authors' code.
    """

    undecayed = ("key_bias", "query_bias")

    def __init__(
        self, site: Site, hidden: int | None = None, heads: int = 4, state: int = 64, rotary_dim: int | None = None
    ):
        super().__init__()
        hidden = hidden_width(hidden, 2 * site.dim)
        rotary_dim = max(2, state // 4 * 2) if rotary_dim is None else rotary_dim
        check_sizes(state=state)
        self.head_dim = head_width(hidden, heads, "hidden")  # P
        if not 2 <= rotary_dim <= state or rotary_dim % 2:
            raise ValueError(f"rotary_dim: {rotary_dim} is no even number from 2 to state {state}")
        self.heads = heads
        self.widths = (hidden, hidden, state, state, heads, heads, heads, rotary_dim // 2)  # g, x, B, C, r, a, l, w
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.step_bias = nn.Parameter(softplus_time_steps(heads))  # b
        self.key_norm, self.query_norm = RMSNorm(state), RMSNorm(state)
        self.key_bias = nn.Parameter(torch.ones(heads, state))  # b_B
        self.query_bias = nn.Parameter(torch.ones(heads, state))  # b_C
        self.skip = nn.Parameter(torch.ones(heads))  # E
        self.out = nn.Linear(hidden, site.dim, bias=False)
        normal_(self.project, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> Mamba3State:
        _, _, state, *_, angles = self.widths
        shapes = ((state, self.head_dim), (state,), (self.head_dim,), (angles,))
        return Mamba3State(*(exact_zeros(self.skip, batch_size, self.heads, *shape) for shape in shapes))

    def step(self, x: Tensor, state: Mamba3State, context: Context) -> tuple[Tensor, Mamba3State]:
        new, gate = self._project(x)
        angle = _modulo(state.angle + new.turn)
        query, key = _turned(new.query, angle), _turned(new.key, angle)
        memory = new.log_decay.exp()[..., None, None] * state.memory
        memory = memory + state.key[..., None] * (new.previous * state.value)[..., None, :]
        memory = memory + key[..., None] * (new.current * new.value)[..., None, :]
        mixed = (query[..., None] * memory).sum(-2)
        return self._read(mixed, new.value, gate), Mamba3State(memory, key, new.value, angle)

    def prefill(self, x: Hidden, state: Mamba3State | None, context: Context) -> tuple[Hidden, Mamba3State]:
        """Keys and values enter the sum one token late: at t it adds both terms of x_{t-1}, its own, faded by alpha_t,
        and that of t. The own term of x_t is added afterwards; a given memory has it already."""
        new, gate = self._project(x)
        memory, key_before, value_before, angle_before = (None,) * 4 if state is None else state
        angle = new.turn.double().cumsum(1)
        if angle_before is not None:
            angle = angle + angle_before[:, None]
        angle = _modulo(angle).to(new.turn.dtype)
        query, key = _turned(new.query, angle), _turned(new.key, angle)
        weight = new.previous + _late(new.current, None) * new.log_decay.exp()[..., None]
        late = weight * _late(new.value, value_before)
        mixed, memory = scalar_decay(query, _late(key, key_before), late, new.log_decay, memory)
        own = new.current * new.value
        mixed = mixed + (query * key).sum(-1, keepdim=True) * own
        memory = memory + key[:, -1, :, :, None] * own[:, -1, :, None]
        return self._read(mixed, new.value, gate), Mamba3State(memory, key[:, -1], new.value[:, -1], angle[:, -1])

    def _project(self, x: Tensor) -> tuple[Inputs, Tensor]:
        """(B, T, D) -> the inputs of the recurrence, and the gate (B, T, F), without T in `step`."""
        gate, value, key, query, steps, decay, share, angle = self.project(x).split(self.widths, -1)
        exact = exact_dtype(steps)
        value, steps, decay, share, angle = (part.to(exact) for part in (value, steps, decay, share, angle))
        size = F.softplus(steps + self.step_bias.to(exact))
        log_decay = -size * F.softplus(decay).clamp(min=1e-4)
        share = share.sigmoid()
        inputs = Inputs(
            self.query_norm(query).to(exact)[..., None, :] + self.query_bias.to(exact),
            self.key_norm(key).to(exact)[..., None, :] + self.key_bias.to(exact),
            value.unflatten(-1, (self.heads, -1)),
            ((1 - share) * size * log_decay.exp())[..., None],
            (share * size)[..., None],
            log_decay,
            size[..., None] * (angle.tanh() / 2)[..., None, :],
        )
        return inputs, gate

    def _read(self, mixed: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Two times (B, T, H, P), and the gate (B, T, F) -> (B, T, D), without T in `step`."""
        mixed = (mixed + self.skip[:, None] * value).flatten(-2).to(gate.dtype)
        return self.out(mixed * F.silu(gate))


def _modulo(turns: Tensor) -> Tensor:
    """Into -1/2 to 1/2, exactly; modulo 2 pi would round at each turn."""
    return turns - turns.round()


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """The first 2 R of x (..., N), by angles (..., R) in whole turns."""
    angle = 2 * math.pi * angle
    return rotate_part(x, torch.stack((angle.cos(), angle.sin()), -2))


def _late(x: Tensor, first: Tensor | None) -> Tensor:
    """(B, T, ...) a token later, behind `first` (B, ...), or behind zeros."""
    first = torch.zeros_like(x[:, 0]) if first is None else first
    return torch.cat((first[:, None], x[:, :-1]), 1)
