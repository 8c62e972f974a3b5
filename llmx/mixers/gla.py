"""Gated linear attention (arXiv 2312.06635): every channel of the key forgets at a rate that the token sets.

    a_t = sigmoid(W_2 W_1 x_t + b)^(1/16)  (K,) a head,     S_t = diag(a_t) S_{t-1} + k_t v_t^T  (K, V) a head
    y_t = W_o (swish(W_r x_t) * norm_h(S_t^T q_t / sqrt(K)))

K = D / (2 H), V = D / H; W_1 is (16, D), so the gates cost few parameters. norm_h is a LayerNorm over the V channels
of one head and token. The root of 16 keeps a_t near 1: at the start the memory of a token halves in 16. Time
O(T (c + K) D) a sequence, memory O(T c) a head for chunks of c = 32; the state is S, K V H numbers a sequence,
whatever its length. No positions: the gates tell near from far. The trap: a_t may be as small as it likes, and
exp(-sum of log a), which would make the whole chunk one matrix product, overflows; see llmx/parts/linear_attention.py.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.head_norm import HeadNorm
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import decay_step, vector_decay
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class GatedLinearAttentionState(NamedTuple):
    memory: Tensor  # (B, H, K, V), S


class GatedLinearAttention(StatefulMixer[GatedLinearAttentionState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: twice as many must divide `dim`.
        rank: of the matrix that makes the gates.
        gate_root: the root that is taken of the gates, 16 in the paper.

    Raises:
        ValueError: for heads that do not divide the width, or a rank or root below 1.
    """

    def __init__(self, site: Site, heads: int = 4, rank: int = 16, gate_root: float = 16.0):
        super().__init__()
        if heads < 1 or site.dim % (2 * heads):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim} into even parts")
        if rank < 1 or gate_root < 1:
            raise ValueError(f"{'rank' if rank < 1 else 'gate_root'}: {min(rank, gate_root)} is below 1")
        self.heads = heads
        self.dim = site.dim
        self.gate_root = gate_root
        self.project = nn.Linear(site.dim, 3 * site.dim, bias=False)  # query and key of half the width, value, r
        self.gate_down = nn.Linear(site.dim, rank, bias=False)
        self.gate_up = nn.Linear(rank, site.dim // 2)
        self.norm = HeadNorm(heads, site.dim // heads)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        for linear in (self.project, self.gate_down, self.gate_up):
            normal_(linear)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value, log_decay, gate = self._project(x)
        return self._read(vector_decay(query, key, value, log_decay)[0], gate)

    def init_state(self, batch_size: int, max_length: int) -> GatedLinearAttentionState:
        like = self.out.weight
        shape = (batch_size, self.heads, self.dim // (2 * self.heads), self.dim // self.heads)
        return GatedLinearAttentionState(exact_zeros(like, *shape))

    def step(
        self, x: Tensor, state: GatedLinearAttentionState, context: Context
    ) -> tuple[Tensor, GatedLinearAttentionState]:
        query, key, value, log_decay, gate = self._project(x)
        mixed, memory = decay_step(query, key, value, log_decay, state.memory)
        return self._read(mixed, gate), GatedLinearAttentionState(memory)

    def prefill(
        self, x: Hidden, state: GatedLinearAttentionState, context: Context
    ) -> tuple[Hidden, GatedLinearAttentionState]:
        query, key, value, log_decay, gate = self._project(x)
        mixed, memory = vector_decay(query, key, value, log_decay, state.memory)
        return self._read(mixed, gate), GatedLinearAttentionState(memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query, key and log a (B, T, H, K), value (B, T, H, V), gate (B, T, H V), without T in `step`."""
        half = self.dim // 2
        query, key, value, gate = self.project(x).split((half, half, self.dim, self.dim), -1)
        logits = self.gate_up(self.gate_down(x))
        log_decay = F.logsigmoid(at_least_float32(logits)) / self.gate_root
        query, key, value, log_decay = (p.unflatten(-1, (self.heads, -1)) for p in (query, key, value, log_decay))
        return query * query.shape[-1] ** -0.5, key, value, log_decay, gate

    def _read(self, mixed: Tensor, gate: Tensor) -> Tensor:
        return self.out(F.silu(gate) * self.norm(mixed))
