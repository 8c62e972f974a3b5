"""Gated DeltaNet (arXiv 2412.06464): a delta rule whose memory fades by one decay a head; as in Qwen3-Next.

    [q; k; v]_t = silu(conv(W x))_t,    q, k of length 1 in each head, q / sqrt(K);    (b, r)_t = W_b x_t   (2 H,)
    beta_t = B sigmoid(b_t)   (H,),     a_t = exp(-exp(A_log) softplus(r_t + d))    (H,)
    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T                     (K, V) a head
    y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t))                                     norm: RMSNorm over V, a head

G heads of keys serve H heads of values, H / G neighbours each. With B = 2 the transition's eigenvalue along k_t reaches
down to -a_t (arXiv 2411.12537), as alternating states need. exp(A_log) starts uniform in 0.01 to 16, softplus(d)
log-uniform in 0.001 to 0.1. Time O(T (c + K) (K + V)) a head in chunks of c = 32 (llmx/parts/delta.py). The state is S
and the last 3 inputs of the convolution, K V H + 3 (2 K G + V H) numbers. The traps: what a key erases has faded by
a_t, what it writes has not. Keys are normalised after conv and SiLU. The norm comes before the gate, in Mamba-2 after
it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.parts.delta import check_rate, delta_rule, delta_step, unit_heads
from llmx.parts.init import normal_, residual_std, softplus_time_steps
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class GatedDeltaNet(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H, of values.
        key_heads: G, of queries and keys; must divide `heads`. As many if not given.
        key_dim: K, width of a head of keys; dim / heads if not given.
        value_dim: V, width of a head of values; dim / heads if not given.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.
        eps: of the norm.
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
        check_sizes(key_dim=key_dim, value_dim=value_dim)
        check_rate(beta_max)
        self.heads, self.key_heads, self.key_dim, self.value_dim = heads, key_heads, key_dim, value_dim
        self.beta_max = beta_max
        keys, values = key_heads * key_dim, heads * value_dim
        self.convolved = (keys, keys, values)  # q, k, v
        self.widths = (sum(self.convolved), values, heads, heads)  # those, gate, b, r
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), convolution)
        self.decay_bias = nn.Parameter(softplus_time_steps(heads))  # d
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())  # A_log
        self.norm = RMSNorm(value_dim, eps)
        self.out = nn.Linear(values, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.decay_log, batch_size, self.heads, self.key_dim, self.value_dim)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, gate, beta, log_decay = self._project(x)
        u, convolution = self.convolution.step(u, state.convolution)
        query, key, value = unit_heads(u, self.key_heads, self.key_dim, self.heads)
        query, key = (y.repeat_interleave(self.heads // self.key_heads, -2) for y in (query, key))
        mixed, memory = delta_step(query, key, value, beta, log_decay[..., None], state.memory)
        return self.out(self.norm(mixed).flatten(-2) * F.silu(gate)), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        u, gate, beta, log_decay = self._project(x)
        u, convolution = self.convolution.prefill(u, convolution)
        mixed, memory = delta_rule(*unit_heads(u, self.key_heads, self.key_dim, self.heads), beta, log_decay, memory)
        return self.out(self.norm(mixed).flatten(-2) * F.silu(gate)), ConvolvedState(convolution, memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The convolution's input (B, T, 2 G K + H V), gate (B, T, H V), beta, log a (B, T, H), without T in `step`."""
        u, gate, rate, decay = self.project(x).split(self.widths, -1)
        exact = exact_dtype(x)
        log_decay = -self.decay_log.to(exact).exp() * F.softplus(decay.to(exact) + self.decay_bias.to(exact))
        return u, gate, self.beta_max * rate.to(exact).sigmoid(), log_decay
