"""DeltaProduct (arXiv 2502.10297): DeltaNet with n steps of its rule for every token, hence n keys and n values.

    q_t = silu(conv(W_q x))_t,   k_{t,j}, v_{t,j} = silu(conv(W_j x))_t,   j = 1 .. n;   q, k of length 1, q / sqrt(K)
    beta_{t,j} = B sigmoid(b_j . x_t),  a number a head;           S_{t,0} = S_{t-1,n}
    S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T      (K, K) a head, K = D / H
    y_t = W_o norm(S_{t,n}^T q_t)                                  norm: RMSNorm over the K channels of a head

A token multiplies the memory by a product of n generalised Householder matrices. One alone is symmetric and turns
nothing; with B = 2 the product can be any orthogonal map of n dimensions, and so any permutation of n + 1 things. Time
O(n T (c + K) D) a sequence in chunks of c = 32 keys, see llmx/parts/delta.py; the state is S and the last 3 inputs of
the convolution, K D + 3 (2 n + 1) D numbers a sequence, whatever its length. No positions, and nothing fades. The
traps: the query reads once, after the last of the n steps; the steps of a token do not commute; and with B = 1 no
product of theirs is a reflection or a rotation, so here the default is 2.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.delta import delta_rule, delta_step, delta_write, l2_norm
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class DeltaProductState(NamedTuple):
    convolution: Tensor  # (B, w - 1, (2 n + 1) D)
    memory: Tensor  # (B, H, K, K), S


class DeltaProduct(StatefulMixer[DeltaProductState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: H; must divide `dim`.
        steps: n, of the delta rule a token.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.

    Raises:
        ValueError: for heads that do not divide the width, steps below 1, or a rate beyond its bounds.
    """

    def __init__(self, site: Site, heads: int = 4, steps: int = 2, convolution: int = 4, beta_max: float = 2.0):
        super().__init__()
        if heads < 1 or site.dim % heads:
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}")
        if steps < 1:
            raise ValueError(f"steps: {steps} is below 1")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: {beta_max} is not above 0 and up to 2")
        self.heads = heads
        self.steps = steps
        self.head_dim = site.dim // heads
        self.beta_max = beta_max
        self.convolved = (site.dim, steps * site.dim, steps * site.dim)  # q; k and v, step by step
        self.widths = (sum(self.convolved), steps * heads)  # those; beta
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), convolution)
        self.norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        u, rate = self.project(x).split(self.widths, -1)
        return self._mix(self.convolution(u), rate, None)[0]

    def init_state(self, batch_size: int, max_length: int) -> DeltaProductState:
        like = self.out.weight
        memory = exact_zeros(like, batch_size, self.heads, self.head_dim, self.head_dim)
        return DeltaProductState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: DeltaProductState, context: Context) -> tuple[Tensor, DeltaProductState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        query, keys, values, betas = self._heads(u, rate)
        memory = state.memory
        for j in range(self.steps - 1):
            memory = delta_write(keys[:, j], values[:, j], betas[:, j], None, memory)
        mixed, memory = delta_step(query, keys[:, -1], values[:, -1], betas[:, -1], None, memory)
        return self._read(mixed), DeltaProductState(convolution, memory)

    def prefill(self, x: Hidden, state: DeltaProductState, context: Context) -> tuple[Hidden, DeltaProductState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, state.convolution)
        output, memory = self._mix(u, rate, state.memory)
        return output, DeltaProductState(convolution, memory)

    def _mix(self, u: Tensor, rate: Tensor, memory: Tensor | None) -> tuple[Hidden, Tensor]:
        """The steps of all tokens as one sequence of n T keys, from any memory."""
        query, *written = self._heads(u, rate)
        key, value, beta = (y.flatten(1, 2) for y in written)
        mixed, memory = delta_rule(query, key, value, beta, None, memory)
        return self._read(mixed), memory

    def _heads(self, u: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query (B, T, H, K), key and value (B, T, n, H, K), beta (B, T, n, H), without T in `step`."""
        query, key, value = F.silu(u).split(self.convolved, -1)
        key, value = (y.unflatten(-1, (self.steps, self.heads, -1)) for y in (key, value))
        beta = self.beta_max * at_least_float32(rate).sigmoid()
        query = l2_norm(query.unflatten(-1, (self.heads, -1))) * self.head_dim**-0.5
        return query, l2_norm(key), value, beta.unflatten(-1, (self.steps, self.heads))

    def _read(self, mixed: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, D), without T in `step`."""
        return self.out(self.norm(mixed).flatten(-2))
