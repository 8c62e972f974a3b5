"""Attention with a learned sink (GPT-OSS, arXiv 2508.10925; the phenomenon: 2309.17453), over all and over a window.

    y_t = W_o concat_h  sum_s exp(a_ts) v_s / (exp(b_h) + sum_s exp(a_ts)),     a_ts = R_t q_t . R_s k_s / sqrt(K)

A head with nothing to say puts its probability into b_h, one number a head, instead of into the first token of the
text. Time O(T^2 D) or O(T w D), memory O(T^2 H) or O(T w H), because the scores are written out. The state grows by 2 G
K numbers a token, up to w tokens with a window. The trap: the sink has no value. A key of zeros appended instead would
fix its score at 0 and rotate with the text.
"""

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention
from llmx.parts.softmax_attention import SoftmaxAttention
from llmx.parts.windowed import attend_ring, window_attention
from llmx.protocol import Context, Site


class SinkAttention(SoftmaxAttention):
    """Over the whole past: (B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        bias: all projections have a bias.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
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
        super().__init__(site, heads, kv_heads, rotary_base, bias, dropout)
        self.sink = nn.Parameter(torch.zeros(heads))
        self.add_output(site)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return biased_causal_attention(query, key, value, dropout=self.active_dropout, sink=self.sink)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        return attend_cache(query, key, value, cache, context, sink=self.sink)


class SinkWindowAttention(SoftmaxAttention):
    """Over the last `window` positions: (B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        window: positions that a query sees, its own among them.
        bias: all projections have a bias.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
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
        super().__init__(site, heads, kv_heads, rotary_base, bias, dropout)
        if window < 1:
            raise ValueError(f"window: {window} is below 1")
        self.window = window
        self.sink = nn.Parameter(torch.zeros(heads))
        self.add_output(site)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return window_attention(query, key, value, self.window, self.active_dropout, sink=self.sink)

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return super().init_state(batch_size, min(self.window, max_length))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        return attend_ring(query, key, value, cache, context, self.window, sink=self.sink)
