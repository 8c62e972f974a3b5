"""Retention, the mixer of RetNet (arXiv 2307.08621): linear attention with rotary positions and a fixed decay a head.

    S_t = g_h S_{t-1} + (R_t k_t) v_t^T,     g_h = 1 - 2^(-5 - h), h = 0 .. H - 1,     S: (K, V) a head
    y_t = W_o (swish(W_g x_t) * norm_h(S_t^T R_t q_t / sqrt(K)))      norm_h: LayerNorm over the V channels of a head

K = D / H, V = 2 D / H. R turns query and key by their position. With the decay this is the paper's xPos with one decay
a head. Time O(T K D), memory O(T c) a head for chunks of c = 32. The state is S, K V H numbers. The paper's other
scales, the root of the row sums of decays and max(|row sum|, 1), are left out: the norm divides by them anyway. The
traps: a group norm on (B, H V, T) takes its statistics over time and shows each token its future. The slowest head
forgets half in 177 tokens at H = 4, so within a short window retention is almost undecayed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import decay_step, scalar_decay
from llmx.parts.norm import HeadNorm
from llmx.parts.precision import exact_dtype, exact_zeros
from llmx.parts.rotary import rotate, shared_table
from llmx.parts.states import MemoryState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class Retention(PrefillMixer[MemoryState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: must divide `dim` into even parts.
        value_factor: width of the values, in multiples of `dim`.
        rotary_base: base of the rotary frequencies.
    """

    def __init__(self, site: Site, heads: int = 4, value_factor: int = 2, rotary_base: float = 10000.0):
        super().__init__()
        check_sizes(value_factor=value_factor)
        self.heads = heads
        self.head_dim = head_width(site.dim, heads, even=True)  # K
        self.dim = site.dim
        self.value_dim = value_factor * site.dim
        self.rotary_base = rotary_base
        self.project = nn.Linear(site.dim, 2 * self.dim + 2 * self.value_dim, bias=False)  # query, key, value, gate
        self.norm = HeadNorm(heads, self.value_dim // heads)
        self.out = nn.Linear(self.value_dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> MemoryState:
        shape = (batch_size, self.heads, self.head_dim, self.value_dim // self.heads)
        return MemoryState(exact_zeros(self.out.weight, *shape))

    def step(self, x: Tensor, state: MemoryState, context: Context) -> tuple[Tensor, MemoryState]:
        query, key, value, gate = self._project(x, context)
        mixed, memory = decay_step(query, key, value, self._log_decay(value)[:, None], state.memory)
        return self.out(F.silu(gate) * self.norm(mixed)), MemoryState(memory)

    def prefill(self, x: Hidden, state: MemoryState | None, context: Context) -> tuple[Hidden, MemoryState]:
        query, key, value, gate = self._project(x, context)
        log_decay = self._log_decay(value).expand(1, x.shape[1], -1)
        mixed, memory = scalar_decay(query, key, value, log_decay, state.memory if state else None)
        return self.out(F.silu(gate) * self.norm(mixed)), MemoryState(memory)

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated query and key (B, T, H, K), value (B, T, H, V), gate (B, T, H V), without T in `step`."""
        query, key, value, gate = self.project(x).split((self.dim, self.dim, self.value_dim, self.value_dim), -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        return rotate(query * self.head_dim**-0.5, table), rotate(key, table), value, gate

    def _log_decay(self, like: Tensor) -> Tensor:
        """(H,), log g."""
        head = torch.arange(self.heads, device=like.device, dtype=exact_dtype(like))
        return torch.log1p(-torch.exp2(-5 - head))
