"""Attention with an output gate (arXiv 2505.06708), as in Qwen3-Next: normalised heads, partly rotated.

    q_t, k_t = R_t rms(W_q x_t), R_t rms(W_k x_t);  v_t = W_v x_t;  g_t = sigmoid(W_g x_t)       g a number a channel
    y_t = W_o (g_t * concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s)

The gate lets a head be silent, which without it takes a sink, and stands between the value and the output projection,
which otherwise are one low-rank matrix. R turns the first part of every head only. Time O(T^2 D) a sequence, memory
O(T D) with the fused kernel; the state grows with the length, 2 G K numbers a token. The trap: the gate reads the
mixer's input x_t and not what attention found, and it is sigmoid, not SiLU.
"""

from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate_part, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class GatedAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: query heads; must divide `dim`.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        rotary_fraction: part of each head that is rotated; must make an even number of channels.
        eps: of the norms of query and key.

    Raises:
        ValueError: for head counts that do not divide, or a fraction that leaves an odd number of channels.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        rotary_fraction: float = 0.25,
        eps: float = 1e-6,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or site.dim % heads:
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} must divide heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = site.dim // heads
        self.rotated = int(self.head_dim * rotary_fraction)
        if not 0 < rotary_fraction <= 1 or not self.rotated or self.rotated % 2:
            raise ValueError(
                f"rotary_fraction: {rotary_fraction} of {self.head_dim} channels a head is no even number of them"
            )
        self.rotary_base = rotary_base
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.gate = nn.Linear(site.dim, site.dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, eps)
        self.key_norm = RMSNorm(self.head_dim, eps)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.gate)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        mixed = causal_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, T, D)
        return self.out(mixed * self.gate(x).sigmoid())

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = attend_cache(query, key, value, state, context)
        return self.out(mixed[:, 0] * self.gate(x).sigmoid()), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = attend_cache(*self._project(x, context), state, context)
        return self.out(mixed * self.gate(x).sigmoid()), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, T, H, K), key and value (B, T, G, K), without T in `step`; query and key normalised and rotated."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        table = shared_table(context, self.rotated, self.rotary_base, x.dtype)
        return rotate_part(self.query_norm(query), table), rotate_part(self.key_norm(key), table), value
