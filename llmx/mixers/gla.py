"""Gated linear attention (arXiv 2312.06635): every channel of the key forgets at a rate that the token sets.

    a_t = sigmoid(W_2 W_1 x_t + b)^(1/16)  (K,) a head,     S_t = diag(a_t) S_{t-1} + k_t v_t^T  (K, V) a head
    y_t = W_o (swish(W_r x_t) * norm_h(S_t^T q_t / sqrt(K)))          norm_h: LayerNorm over the V channels of a head

K = D / (2 H), V = D / H. W_1 is (16, D), so the gates cost few parameters. The root of 16 keeps a_t near 1: at the
start the memory of a token halves in 16. Time O(T (c + K) D), memory O(T c) a head for chunks of c = 32. The state is
S, K V H numbers. The gates tell near from far. The trap: a_t may be arbitrarily small, and exp(-sum of log a), which
would make the whole chunk one matrix product, overflows. See llmx/parts/linear_attention.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import decay_step, vector_decay
from llmx.parts.norm import HeadNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.states import MemoryState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class GatedLinearAttention(PrefillMixer[MemoryState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: twice as many must divide `dim`.
        rank: of the matrix that makes the gates.
        gate_root: the root taken of the gates, 16 in the paper; at least 1.
    """

    def __init__(self, site: Site, heads: int = 4, rank: int = 16, gate_root: float = 16.0):
        super().__init__()
        check_sizes(rank=rank, gate_root=gate_root)
        self.heads = heads
        self.head_dim = head_width(site.dim, heads, even=True)  # V
        self.dim = site.dim
        self.gate_root = gate_root
        self.project = nn.Linear(site.dim, 3 * site.dim, bias=False)  # query and key of half the width, value, r
        self.gate_down = nn.Linear(site.dim, rank, bias=False)
        self.gate_up = nn.Linear(rank, site.dim // 2)
        self.norm = HeadNorm(heads, self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        for linear in (self.project, self.gate_down, self.gate_up):
            normal_(linear)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> MemoryState:
        return MemoryState(exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim // 2, self.head_dim))

    def step(self, x: Tensor, state: MemoryState, context: Context) -> tuple[Tensor, MemoryState]:
        query, key, value, log_decay, gate = self._project(x)
        mixed, memory = decay_step(query, key, value, log_decay, state.memory)
        return self.out(F.silu(gate) * self.norm(mixed)), MemoryState(memory)

    def prefill(self, x: Hidden, state: MemoryState | None, context: Context) -> tuple[Hidden, MemoryState]:
        query, key, value, log_decay, gate = self._project(x)
        mixed, memory = vector_decay(query, key, value, log_decay, state.memory if state else None)
        return self.out(F.silu(gate) * self.norm(mixed)), MemoryState(memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query, key and log a (B, T, H, K), value (B, T, H, V), gate (B, T, H V), without T in `step`."""
        half = self.dim // 2
        query, key, value, gate = self.project(x).split((half, half, self.dim, self.dim), -1)
        logits = self.gate_up(self.gate_down(x))
        log_decay = F.logsigmoid(at_least_float32(logits)) / self.gate_root
        query, key, value, log_decay = (p.unflatten(-1, (self.heads, -1)) for p in (query, key, value, log_decay))
        return query * query.shape[-1] ** -0.5, key, value, log_decay, gate
