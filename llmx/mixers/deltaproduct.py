"""DeltaProduct (arXiv 2502.10297): DeltaNet with n steps of its rule for every token, hence n keys and n values.

    q_t = silu(conv(W_q x))_t,   k_{t,j}, v_{t,j} = silu(conv(W_j x))_t,   j = 1 .. n;   q, k of length 1, q / sqrt(K)
    beta_{t,j} = B sigmoid(b_j . x_t),  a number a head;           S_{t,0} = S_{t-1,n}
    S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T      (K, K) a head, K = D / H
    y_t = W_o norm(S_{t,n}^T q_t)                                  norm: RMSNorm over the K channels of a head

A token multiplies the memory by a product of n generalised Householder matrices. One alone is symmetric and turns
nothing. With B = 2 the product can be any orthogonal map of n dimensions, and so any permutation of n + 1 things. Time
O(n T (c + K) D) in chunks of c = 32 keys, see llmx/parts/delta.py. The state is S and the last 3 inputs of the
convolution, K D + 3 (2 n + 1) D numbers. Nothing fades. The traps: the query reads once, after the last of n steps. The
steps of a token do not commute. With B = 1 no product of them is a reflection or a rotation, so 2 is the default.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.delta import check_rate, delta_rule, delta_step, delta_write, l2_norm
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class DeltaProduct(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H; must divide `dim`.
        steps: n, of the delta rule a token.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.
    """

    def __init__(self, site: Site, heads: int = 4, steps: int = 2, convolution: int = 4, beta_max: float = 2.0):
        super().__init__()
        check_sizes(steps=steps)
        check_rate(beta_max)
        self.heads = heads
        self.steps = steps
        self.head_dim = head_width(site.dim, heads)
        self.beta_max = beta_max
        self.convolved = (site.dim, steps * site.dim, steps * site.dim)  # q; k and v, step by step
        self.widths = (sum(self.convolved), steps * heads)  # those; beta
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), convolution)
        self.norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        query, keys, values, betas = self._heads(u, rate)
        memory = state.memory
        for j in range(self.steps - 1):
            memory = delta_write(keys[:, j], values[:, j], betas[:, j], None, memory)
        mixed, memory = delta_step(query, keys[:, -1], values[:, -1], betas[:, -1], None, memory)
        return self.out(self.norm(mixed).flatten(-2)), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        query, *written = self._heads(u, rate)
        key, value, beta = (y.flatten(1, 2) for y in written)  # the steps of all tokens as one sequence of n T keys
        mixed, memory = delta_rule(query, key, value, beta, None, memory)
        return self.out(self.norm(mixed).flatten(-2)), ConvolvedState(convolution, memory)

    def _heads(self, u: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query (B, T, H, K), key and value (B, T, n, H, K), beta (B, T, n, H), without T in `step`."""
        query, key, value = F.silu(u).split(self.convolved, -1)
        key, value = (y.unflatten(-1, (self.steps, self.heads, -1)) for y in (key, value))
        beta = self.beta_max * at_least_float32(rate).sigmoid()
        query = l2_norm(query.unflatten(-1, (self.heads, -1))) * self.head_dim**-0.5
        return query, l2_norm(key), value, beta.unflatten(-1, (self.steps, self.heads))
