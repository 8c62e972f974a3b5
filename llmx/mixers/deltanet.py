"""DeltaNet (arXiv 2406.06484): linear attention whose memory, before it writes, takes out what the key already holds.

    [q; k; v]_t = silu(conv(W x))_t,    q, k of length 1 in each head, q / sqrt(K);    beta_t = B sigmoid(W_b x_t)  (H,)
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         (K, K) a head, K = D / H
    y_t = W_o norm(S_t^T q_t)                                       norm: RMSNorm over the K channels of a head

One step of gradient descent, of rate beta_t, on |S^T k_t - v_t|^2 / 2. B = 1; with B = 2 the eigenvalue of the
transition along k_t lies between -1 and 1 (arXiv 2411.12537), and the parity of a string of bits, which no memory with
eigenvalues from 0 up can follow at every length, takes a single head. Time O(T (c + K) D) a sequence in chunks of
c = 32, see llmx/parts/delta.py; the state is S and the last 3 inputs of the convolution, K D + 9 D numbers a sequence,
whatever its length. No positions, and nothing fades. The traps: a key of another length than 1 makes the transition
grow, and the memory without bound; the length is made 1 after convolution and SiLU, not before.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.delta import delta_rule, delta_step, l2_norm
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class DeltaNetState(NamedTuple):
    convolution: Tensor  # (B, w - 1, 3 D)
    memory: Tensor  # (B, H, K, K), S


class DeltaNet(StatefulMixer[DeltaNetState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: H; must divide `dim`.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.

    Raises:
        ValueError: for heads that do not divide the width, or a rate beyond its bounds.
    """

    def __init__(self, site: Site, heads: int = 4, convolution: int = 4, beta_max: float = 1.0):
        super().__init__()
        if heads < 1 or site.dim % heads:
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: {beta_max} is not above 0 and up to 2")
        self.heads = heads
        self.head_dim = site.dim // heads
        self.beta_max = beta_max
        self.widths = (3 * site.dim, heads)  # q, k, v; beta
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(3 * site.dim, convolution)
        self.norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        u, rate = self.project(x).split(self.widths, -1)
        mixed, _ = delta_rule(*self._heads(self.convolution(u), rate))
        return self._read(mixed)

    def init_state(self, batch_size: int, max_length: int) -> DeltaNetState:
        like = self.out.weight
        memory = exact_zeros(like, batch_size, self.heads, self.head_dim, self.head_dim)
        return DeltaNetState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: DeltaNetState, context: Context) -> tuple[Tensor, DeltaNetState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        mixed, memory = delta_step(*self._heads(u, rate), None, state.memory)
        return self._read(mixed), DeltaNetState(convolution, memory)

    def prefill(self, x: Hidden, state: DeltaNetState, context: Context) -> tuple[Hidden, DeltaNetState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, state.convolution)
        mixed, memory = delta_rule(*self._heads(u, rate), None, state.memory)
        return self._read(mixed), DeltaNetState(convolution, memory)

    def _heads(self, u: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value (B, T, H, K), beta (B, T, H), without T in `step`."""
        query, key, value = F.silu(u).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        beta = self.beta_max * at_least_float32(rate).sigmoid()
        return l2_norm(query) * self.head_dim**-0.5, l2_norm(key), value, beta

    def _read(self, mixed: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, D), without T in `step`."""
        return self.out(self.norm(mixed).flatten(-2))
