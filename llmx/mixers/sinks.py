"""Attention with a learned sink (GPT-OSS, arXiv 2508.10925; the phenomenon: 2309.17453), over all and over a window.

    y_t = W_o concat_h  sum_s exp(a_ts) v_s / (exp(b_h) + sum_s exp(a_ts)),     a_ts = R_t q_t . R_s k_s / sqrt(K)

A head with nothing to say lets its probability run into b_h, one number a head, instead of into the first token of the
text. Time O(T^2 D) or O(T w D), memory O(T^2 H) or O(T w H), for the scores are written out; the state grows with the
length, 2 G K numbers a token, up to w tokens where there is a window. The trap: the sink has no value; to append a key
of zeros instead would fix its score at 0 and rotate with the text.
"""

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.parts.rotary import rotate, shared_table
from llmx.parts.windowed import attend_ring, window_attention
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class SinkAttention(StatefulMixer[KeyValues]):
    """Over the whole past: (B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        bias: all projections have a bias.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for head counts that do not divide.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        bias: bool = False,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or site.dim % (2 * heads):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim} into even parts")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} must divide heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = site.dim // heads
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.sink = nn.Parameter(torch.zeros(heads))
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(site.dim, site.dim, bias=bias)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        dropout = self.dropout if self.training else 0.0
        mixed = biased_causal_attention(query, key, value, dropout=dropout, sink=self.sink)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = attend_cache(query, key, value, state, context, sink=self.sink)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        query, key, value = self._project(x, context)
        mixed, state = attend_cache(query, key, value, state, context, sink=self.sink)
        return self.out(mixed), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query (B, T, H, K), rotated key and value (B, T, G, K), without T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        both, value = heads.split((self.heads + self.kv_heads, self.kv_heads), -2)
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        query, key = rotate(both, table).split((self.heads, self.kv_heads), -2)
        return query, key, value


class SinkWindowAttention(StatefulMixer[KeyValues]):
    """Over the last `window` positions: (B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        window: positions that a query sees, its own among them.
        bias: all projections have a bias.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for head counts that do not divide, or a window below 1.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        window: int = 8,
        bias: bool = False,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or site.dim % (2 * heads):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim} into even parts")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} must divide heads {heads}")
        if window < 1:
            raise ValueError(f"window: {window} is below 1")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = site.dim // heads
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.window = window
        self.sink = nn.Parameter(torch.zeros(heads))
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(site.dim, site.dim, bias=bias)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        dropout = self.dropout if self.training else 0.0
        mixed = window_attention(query, key, value, self.window, dropout, sink=self.sink)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(
            self.out.weight, batch_size, self.kv_heads, min(self.window, max_length), self.head_dim, self.head_dim
        )

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = attend_ring(query, key, value, state, context, self.window, sink=self.sink)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        query, key, value = self._project(x, context)
        mixed, state = attend_ring(query, key, value, state, context, self.window, sink=self.sink)
        return self.out(mixed), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query (B, T, H, K), rotated key and value (B, T, G, K), without T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        both, value = heads.split((self.heads + self.kv_heads, self.kv_heads), -2)
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        query, key = rotate(both, table).split((self.heads, self.kv_heads), -2)
        return query, key, value
