"""Attention with soft-capped scores (Gemma 2, arXiv 2408.00118), global and over a window: Gemma 2 alternates the two.

    y_t = W_o concat_h  sum_s softmax_s(c tanh(R_t q_t . R_s k_s / (c sqrt(K)))) v_s,       s <= t, or t - w < s <= t

No score leaves (-c, c), so no weight of one key over another exceeds e^(2 c). Time O(T^2 D) or O(T w D), memory
O(T^2 H) or O(T w H), because the scores are written out. The state grows by 2 G K numbers a token, up to w tokens with
a window. The trap: the cap comes before the mask, because tanh would make a finite score of -inf.
"""

from torch import Tensor

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention
from llmx.parts.softmax_attention import SoftmaxAttention
from llmx.parts.windowed import attend_ring, window_attention
from llmx.protocol import Context, Site


class SoftCappedAttention(SoftmaxAttention):
    """Over the whole past: (B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        cap: the bound of the scores, above 0.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        cap: float = 50.0,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        if cap <= 0:
            raise ValueError(f"cap: {cap} is not above 0")
        self.cap = cap
        self.add_output(site)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return biased_causal_attention(query, key, value, dropout=self.active_dropout, cap=self.cap)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        return attend_cache(query, key, value, cache, context, cap=self.cap)


class SoftCappedWindowAttention(SoftmaxAttention):
    """Over the last `window` positions: (B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        window: positions that a query sees, its own among them.
        cap: the bound of the scores, above 0.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        window: int = 8,
        cap: float = 50.0,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        if window < 1:
            raise ValueError(f"window: {window} is below 1")
        if cap <= 0:
            raise ValueError(f"cap: {cap} is not above 0")
        self.window = window
        self.cap = cap
        self.add_output(site)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return window_attention(query, key, value, self.window, self.active_dropout, cap=self.cap)

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return super().init_state(batch_size, min(self.window, max_length))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        return attend_ring(query, key, value, cache, context, self.window, cap=self.cap)
