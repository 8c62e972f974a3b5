"""ALiBi: attention whose scores fall linearly with the distance (arXiv 2108.12409), and no other position.

    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K) - m_h (t - s)) v_s,    m_h = 2^(-8 h / H), h = 1 .. H

Where H is no power of two, the slopes are those of the power below, and every other one of twice that power for the
rest. Time O(T^2 D) a sequence, memory O(T^2 H) with the scores written out; the state grows with the length, 2 D
numbers a token. The trap: heads count from 1, so the first slope is 2^(-8/H) and not 1; and the distance comes from
positions, not from slots of the cache.
"""

import math

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention, empty_cache, places
from llmx.parts.init import normal_, residual_std
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class ALiBiAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: must divide `dim`.
        bias: all projections have a bias.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for heads that do not divide the width.
    """

    slopes: Tensor

    def __init__(self, site: Site, heads: int = 8, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or site.dim % heads:
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}")
        self.heads = heads
        self.head_dim = site.dim // heads
        self.dropout = dropout
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=bias)
        self.out = nn.Linear(site.dim, site.dim, bias=bias)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))
        self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)), persistent=False)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x))
        bias = self._bias(context.positions, context.positions, query)
        mixed = biased_causal_attention(query, key, value, bias, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        mixed, state = self._attend(x[:, None], state, context)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = self._attend(x, state, context)
        return self.out(mixed), state

    def _attend(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        query, key, value = self._project(x)
        slots = torch.arange(state.key.shape[2], device=x.device)[None]
        return attend_cache(query, key, value, state, context, self._bias(places(context), slots, query))

    def _project(self, x: Hidden) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, T, H, K) each."""
        query, key, value = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim)).chunk(3, -2)
        return query, key, value

    def _bias(self, positions: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """-m_h (t - s) for positions (B, T) and keys at (1, S): (B, H, 1, T, S)."""
        distance = (positions[:, :, None] - keys[:, None, :]).to(like.dtype)  # (B, T, S)
        return -self.slopes.to(like.dtype)[:, None, None, None] * distance[:, None, None]


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]
