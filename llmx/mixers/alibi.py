"""ALiBi: attention whose scores fall linearly with the distance (arXiv 2108.12409), without other positions.

    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K) - m_h (t - s)) v_s,    m_h = 2^(-8 h / H), h = 1 .. H

If H is no power of two, the first slopes are those of the power below. The rest are every other slope of twice that
power. Time O(T^2 D), memory O(T^2 H) with the scores written out. The state grows by 2 D numbers a token. The traps:
heads count from 1, so the first slope is 2^(-8/H) not 1. The distance comes from positions, not cache slots.
"""

import math

import torch
from torch import Tensor

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention, query_positions
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class ALiBiAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: must divide `dim`.
        bias: all projections have a bias.
        dropout: probability of dropping an attention weight in training.
    """

    slopes: Tensor

    def __init__(self, site: Site, heads: int = 8, bias: bool = False, dropout: float = 0.0):
        super().__init__(site, heads, bias=bias, dropout=dropout)
        self.add_output(site)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)), persistent=False)

    def project(self, x: Tensor, context: Context) -> Heads:
        return self.split_heads(x)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        bias = self._bias(context.positions, context.positions, query)
        return biased_causal_attention(query, key, value, bias, self.active_dropout)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        slots = torch.arange(cache.key.shape[2], device=query.device)[None]
        return attend_cache(query, key, value, cache, context, self._bias(query_positions(context), slots, query))

    def _bias(self, positions: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """-m_h (t - s), (B, H, 1, T, S), for queries at positions (B, T) and keys at positions (1, S)."""
        distance = (positions[:, :, None] - keys[:, None, :]).to(like.dtype)  # (B, T, S)
        return -self.slopes.to(like.dtype)[:, None, None, None] * distance[:, None, None]


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]
