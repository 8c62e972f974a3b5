"""Attention over the last w positions (arXiv 2004.05150; Mistral, arXiv 2310.06825), with rotary positions.

    y_t = W_o concat_h  sum_{t - w < s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

Time O(T w D), memory O(T w H). The state is a ring of w slots: at most 2 G K w numbers, whatever its length. Depth
widens the view: after L layers a position has heard from L (w - 1) before it. The traps: a window of w counts the
query's own position, so the farthest key is w - 1 away. A prefill must attend before it writes the ring, which
otherwise loses what the first queries of the piece still see.
"""

from torch import Tensor

from llmx.parts.attention import KeyValues
from llmx.parts.softmax_attention import SoftmaxAttention
from llmx.parts.windowed import attend_ring, window_attention
from llmx.protocol import Context, Site


class SlidingWindowAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        window: positions that a query sees, its own among them.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        window: int = 8,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        if window < 1:
            raise ValueError(f"window: {window} is below 1")
        self.window = window
        self.add_output(site)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return window_attention(query, key, value, self.window, self.active_dropout)

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return super().init_state(batch_size, min(self.window, max_length))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        return attend_ring(query, key, value, cache, context, self.window)
