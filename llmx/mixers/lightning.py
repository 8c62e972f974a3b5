"""Lightning attention (arXiv 2401.04658) as in MiniMax-01 (arXiv 2501.08313): fixed decays by head and by layer.

    q_t, k_t, v_t = silu(W x_t),     S_t = exp(-s_hl) S_{t-1} + k_t v_t^T  (K, K) a head, K = D / H
    y_t = W_o (sigmoid(W_g x_t) * norm(S_t^T q_t))           norm: RMSNorm over all D channels
    s_hl = 2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5),      h = 0 .. H - 1 heads, l = 0 .. L - 1 layers

The slopes are those of ALiBi, scaled down with the layer: the first layers see near, the last one forgets nothing. The
norm replaces a normaliser z. Time O(T (c + K) D), memory O(T c) a head for chunks of c = 32. The state is S, K D
numbers. The traps: the values go through SiLU too. exp(s t) and exp(-s t), computed in advance as factors of a block's
decays, limit the block to the length that the steepest head allows, while their differences are safe at any length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import decay_step, scalar_decay
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.states import MemoryState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class LightningAttention(PrefillMixer[MemoryState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands; its layer sets the decays.
        heads: must divide `dim`.
    """

    def __init__(self, site: Site, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.slope = 1 - site.layer / max(site.depth - 1, 1) + 1e-5  # of this layer
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.gate = nn.Linear(site.dim, site.dim, bias=False)
        self.norm = RMSNorm(site.dim, eps=1e-6)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.gate)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> MemoryState:
        return MemoryState(exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim))

    def step(self, x: Tensor, state: MemoryState, context: Context) -> tuple[Tensor, MemoryState]:
        query, key, value = self._project(x)
        mixed, memory = decay_step(query, key, value, self._log_decay(value)[:, None], state.memory)
        return self.out(torch.sigmoid(self.gate(x)) * self.norm(mixed.flatten(-2))), MemoryState(memory)

    def prefill(self, x: Hidden, state: MemoryState | None, context: Context) -> tuple[Hidden, MemoryState]:
        query, key, value = self._project(x)
        log_decay = self._log_decay(value).expand(1, x.shape[1], -1)
        mixed, memory = scalar_decay(query, key, value, log_decay, state.memory if state else None)
        return self.out(torch.sigmoid(self.gate(x)) * self.norm(mixed.flatten(-2))), MemoryState(memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, T, H, K), without T in `step`."""
        query, key, value = F.silu(self.qkv(x)).unflatten(-1, (-1, self.head_dim)).chunk(3, -2)
        return query, key, value

    def _log_decay(self, like: Tensor) -> Tensor:
        """(H,), -s."""
        heads = torch.arange(1, self.heads + 1, device=like.device, dtype=exact_dtype(like))
        return -self.slope * torch.exp2(-8 * heads / self.heads)
