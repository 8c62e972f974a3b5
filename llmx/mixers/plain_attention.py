"""Causal softmax attention by content alone, as in the first Transformer and in GPT-2: positions are somebody else's.

    q_t, k_t, v_t = W_q x_t + b_q, W_k x_t + b_k, W_v x_t + b_v     H query heads, G key/value heads, K = D / H
    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s + b_o

arXiv 1706.03762; without any position embedding it is NoPE (arXiv 2305.19466), for a causal mask alone already lets a
network count. Time O(T^2 D) a sequence, memory O(T D) with the fused kernel; the state grows with the length, 2 G K
numbers a token. The trap: without positions the mixer is not blind to order, only to distance, so a test that permutes
the past must find the last output unchanged after one layer, and changed after two.
"""

from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class PlainAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: query heads; must divide `dim`.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        bias: all projections have a bias, as in 2017 and in GPT-2.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for head counts that do not divide.
    """

    def __init__(
        self, site: Site, heads: int = 8, kv_heads: int | None = None, bias: bool = False, dropout: float = 0.0
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
        self.dropout = dropout
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(site.dim, site.dim, bias=bias)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x))
        mixed = causal_attention(query, key, value, self.dropout if self.training else 0.0)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        mixed, state = attend_cache(*self._project(x[:, None]), state, context)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = attend_cache(*self._project(x), state, context)
        return self.out(mixed), state

    def _project(self, x: Hidden) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, T, H, K), key and value (B, T, G, K)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        return query, key, value
