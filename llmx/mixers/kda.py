"""Kimi Delta Attention (KDA; Kimi Linear, arXiv 2510.26692): the gated delta rule with a decay for every channel.

    [q; k; v]_t = silu(conv(W x))_t,    q, k of length 1 in each head, q / sqrt(K);    beta_t = B sigmoid(W_b x_t)  (H,)
    a_t = exp(-exp(A_log) softplus(F_2 F_1 x_t + d))            (K,) a head, A_log a number a head; F_1, G_1 (R, D)
    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T                  (K, K) a head, K = D / H
    y_t = W_o (norm(S_t^T q_t) * sigmoid(G_2 G_1 x_t))          norm: RMSNorm over the K channels of a head

With B = 2 eigenvalues may be negative (arXiv 2411.12537). At the start exp(A_log) is uniform in 1 to 16, softplus(d)
log-uniform in 0.001 to 0.1. Time O(T (c + K) D) in chunks of c = 16, see llmx/parts/delta.py. The state is S and the
last 3 inputs of the convolution, K D + 9 D numbers. Decays that differ by channel tell near from far. The traps: the
decay comes before the erasure, and with one number a channel the two do not commute. exp(-sum of log a), which would
make the scores of a chunk one matrix product, overflows. The output gate is sigmoid, in Gated DeltaNet SiLU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.delta import check_rate, delta_step, unit_heads, vector_delta_rule
from llmx.parts.init import normal_, residual_std, softplus_time_steps
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class KDA(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H; must divide `dim`.
        rank: R, of the maps to the decay and to the output gate; the width of a head if not given.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.
        eps: of the norm.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 4,
        rank: int | None = None,
        convolution: int = 4,
        beta_max: float = 1.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        rank = self.head_dim if rank is None else rank
        check_sizes(rank=rank)
        check_rate(beta_max)
        self.beta_max = beta_max
        self.widths = (3 * site.dim, rank, rank, heads)  # q, k, v; F_1; G_1; beta
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(3 * site.dim, convolution)
        self.decay_up = nn.Linear(rank, site.dim, bias=False)  # F_2
        self.decay_bias = nn.Parameter(softplus_time_steps(site.dim))  # d
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # A_log
        self.gate_up = nn.Linear(rank, site.dim, bias=False)  # G_2
        self.norm = RMSNorm(self.head_dim, eps)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        for linear in (self.project, self.decay_up, self.gate_up):
            normal_(linear)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, beta, log_decay, gate = self._project(x)
        u, convolution = self.convolution.step(u, state.convolution)
        mixed, memory = delta_step(*unit_heads(u, self.heads, self.head_dim, self.heads), beta, log_decay, state.memory)
        return self.out(self.norm(mixed).flatten(-2) * gate), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        u, beta, log_decay, gate = self._project(x)
        u, convolution = self.convolution.prefill(u, convolution)
        heads = unit_heads(u, self.heads, self.head_dim, self.heads)
        mixed, memory = vector_delta_rule(*heads, beta, log_decay, memory)
        return self.out(self.norm(mixed).flatten(-2) * gate), ConvolvedState(convolution, memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The convolution's input (B, T, 3 D), beta (B, T, H), log a (B, T, H, K), gate (B, T, D), no T in `step`."""
        u, decay, gate, rate = self.project(x).split(self.widths, -1)
        exact = exact_dtype(x)
        size = F.softplus(self.decay_up(decay).to(exact) + self.decay_bias.to(exact)).unflatten(-1, (self.heads, -1))
        log_decay = -self.decay_log.to(exact).exp()[:, None] * size
        return u, self.beta_max * rate.to(exact).sigmoid(), log_decay, self.gate_up(gate).sigmoid()
