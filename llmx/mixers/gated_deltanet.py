"""Gated DeltaNet (arXiv 2412.06464): the memory fades, and a key first takes out what it holds there; as in Qwen3-Next.

    [q; k; v]_t = silu(conv(W x))_t,    q, k of length 1 in each head, q / sqrt(K);    (b, r)_t = W_b x_t   (2 H,)
    beta_t = B sigmoid(b_t)   (H,),     a_t = exp(-exp(A_log) softplus(r_t + d))    (H,)
    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T                     (K, V) a head
    y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t))                                     norm: RMSNorm over V, a head

G heads of keys serve H heads of values, H / G neighbours each. B = 1; with B = 2 the eigenvalue of the transition along
k_t reaches from a_t down to -a_t (arXiv 2411.12537), which states that alternate need. Start: exp(A_log) uniform below
16, softplus(d) log-uniform in 0.001 to 0.1. Time O(T (c + K) (K + V)) a head in chunks of c = 32, see
llmx/parts/delta.py; the state is S and the last 3 inputs of the convolution, K V H + 3 (2 K G + V H) numbers a
sequence, whatever its length. No positions. The traps: what a key takes out has faded by a_t, what it writes has not;
its length is made 1 after convolution and SiLU; the norm comes before the gate, in Mamba-2 after.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.delta import delta_rule, delta_step, l2_norm
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, Site, StatefulMixer

FASTEST, SLOWEST = 0.1, 0.001  # softplus(d) at the start
WEAKEST, STRONGEST = 0.01, 16.0  # exp(A_log) at the start


class GatedDeltaNetState(NamedTuple):
    convolution: Tensor  # (B, w - 1, 2 G K + H V)
    memory: Tensor  # (B, H, K, V), S


class GatedDeltaNet(StatefulMixer[GatedDeltaNetState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: H, of values.
        key_heads: G, of queries and keys; must divide `heads`. As many if not given.
        key_dim: K, width of a head of keys; dim / heads if not given.
        value_dim: V, width of a head of values; dim / heads if not given.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.
        eps: of the norm.

    Raises:
        ValueError: for widths that do not fit.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 4,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        convolution: int = 4,
        beta_max: float = 1.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if heads < 1 or (site.dim % heads and (key_dim is None or value_dim is None)):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}, where their widths are not given")
        key_heads = heads if key_heads is None else key_heads
        key_dim = site.dim // heads if key_dim is None else key_dim
        value_dim = site.dim // heads if value_dim is None else value_dim
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads: {key_heads} must divide heads {heads}")
        if key_dim < 1 or value_dim < 1:
            raise ValueError(f"{'key_dim' if key_dim < 1 else 'value_dim'}: {min(key_dim, value_dim)} is below 1")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: {beta_max} is not above 0 and up to 2")
        self.heads, self.key_heads, self.key_dim, self.value_dim = heads, key_heads, key_dim, value_dim
        self.beta_max = beta_max
        keys, values = key_heads * key_dim, heads * value_dim
        self.convolved = (keys, keys, values)  # q, k, v
        self.widths = (sum(self.convolved), values, heads, heads)  # those, gate, b, r
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), convolution)
        start = torch.empty(heads).uniform_(math.log(SLOWEST), math.log(FASTEST)).exp()
        self.decay_bias = nn.Parameter(start.expm1().log())  # d: softplus of it is the start
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(WEAKEST, STRONGEST).log())  # A_log
        self.norm = RMSNorm(value_dim, eps)
        self.out = nn.Linear(values, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        u, gate, beta, log_decay = self._project(x)
        mixed, _ = delta_rule(*self._heads(self.convolution(u)), beta, log_decay)
        return self._read(mixed, gate)

    def init_state(self, batch_size: int, max_length: int) -> GatedDeltaNetState:
        memory = exact_zeros(self.decay_log, batch_size, self.heads, self.key_dim, self.value_dim)
        return GatedDeltaNetState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: GatedDeltaNetState, context: Context) -> tuple[Tensor, GatedDeltaNetState]:
        u, gate, beta, log_decay = self._project(x)
        u, convolution = self.convolution.step(u, state.convolution)
        query, key, value = self._heads(u)
        query, key = (y.repeat_interleave(self.heads // self.key_heads, -2) for y in (query, key))
        mixed, memory = delta_step(query, key, value, beta, log_decay[..., None], state.memory)
        return self._read(mixed, gate), GatedDeltaNetState(convolution, memory)

    def prefill(self, x: Hidden, state: GatedDeltaNetState, context: Context) -> tuple[Hidden, GatedDeltaNetState]:
        u, gate, beta, log_decay = self._project(x)
        u, convolution = self.convolution.prefill(u, state.convolution)
        mixed, memory = delta_rule(*self._heads(u), beta, log_decay, state.memory)
        return self._read(mixed, gate), GatedDeltaNetState(convolution, memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is convolved (B, T, 2 G K + H V), gate (B, T, H V), beta and log a (B, T, H), without T in `step`."""
        u, gate, rate, decay = self.project(x).split(self.widths, -1)
        exact = exact_dtype(x)
        log_decay = -self.decay_log.to(exact).exp() * F.softplus(decay.to(exact) + self.decay_bias.to(exact))
        return u, gate, self.beta_max * rate.to(exact).sigmoid(), log_decay

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key (B, T, G, K), value (B, T, H, V), without T in `step`."""
        query, key, value = F.silu(u).split(self.convolved, -1)
        query, key = (l2_norm(y.unflatten(-1, (self.key_heads, -1))) for y in (query, key))
        return query * self.key_dim**-0.5, key, value.unflatten(-1, (self.heads, -1))

    def _read(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """(B, T, H, V), and the gate (B, T, H V) -> (B, T, D), without T in `step`."""
        return self.out(self.norm(mixed).flatten(-2) * F.silu(gate))
