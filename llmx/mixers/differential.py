"""Differential attention (arXiv 2410.05258): the difference of two softmax maps, which cancels what both attend to.

    (q1, q2)_t, (k1, k2)_t = R_t W_q x_t, R_t W_k x_t        two of width K = D / (2 H) a head;  v_t of width 2 K
    a_h = sum_{s <= t} (softmax_s(q1_t . k1_s / sqrt(K)) - lambda softmax_s(q2_t . k2_s / sqrt(K))) v_s
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,    lambda_init = 0.8 - 0.6 exp(-0.3 layer)
    y_t = W_o concat_h (1 - lambda_init) rms(a_h)

Layers count from 0. The norm is over one head's 2 K channels, has a gain that the heads share, and never sees time.
Time O(T^2 D) a sequence, twice the scores of plain attention; the state grows with the length, 4 G K numbers a token.
The traps: query and key heads are half as wide as value heads, so H here is half the heads of a plain attention with
the same K; the factor 1 - lambda_init comes after the norm, which would undo it; and with grouped heads the second
query of a head reads the second key, which the usual repetition brings about only if all first heads stand before all
second ones.
"""

import math

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class DifferentialAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands; lambda starts by its layer.
        heads: pairs of query heads; `dim` must divide into 4 parts a head.
        kv_heads: pairs of key heads, and value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.

    Raises:
        ValueError: for head counts that do not divide.
    """

    def __init__(self, site: Site, heads: int = 4, kv_heads: int | None = None, rotary_base: float = 10000.0):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or site.dim % (4 * heads):
            raise ValueError(f"heads: dim {site.dim} must divide into 4 parts for each of {heads} heads")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} must divide heads {heads}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = site.dim // (2 * heads)  # K
        self.rotary_base = rotary_base
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * site.layer)
        self.qkv = nn.Linear(site.dim, (2 * heads + 4 * kv_heads) * self.head_dim, bias=False)
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, self.head_dim))  # l_q1, l_k1, l_q2, l_k2
        self.norm = RMSNorm(2 * self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        mixed = causal_attention(query, key, value.repeat(1, 2, 1, 1))  # (B, 2 H, T, 2 K)
        return self._difference(*mixed.transpose(1, 2).chunk(2, 2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        # the two keys of a head lie side by side in one slot, for they share its value
        width = 2 * self.head_dim
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, width, width)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = self._attend(query, key, value, state, context)
        return mixed[:, 0], state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        return self._attend(*self._project(x, context), state, context)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, state: KeyValues, context: Context
    ) -> tuple[Hidden, KeyValues]:
        """Each of a head's two queries sees its own half of the slots' keys."""
        first, second = query.chunk(2, 2)  # (B, T, H, K)
        nothing = torch.zeros_like(first)
        # the width of the keys is 2 K here, hence the factor that makes the scale 1 / sqrt(K)
        halves = torch.stack((torch.cat((first, nothing), -1), torch.cat((nothing, second), -1)), 3) * math.sqrt(2)
        both = torch.cat(key.chunk(2, 2), -1)  # (B, T, G, 2 K)
        mixed, state = attend_cache(halves.flatten(2, 3), both, value, state, context)
        return self._difference(*mixed.unflatten(-1, (self.heads, 2, -1)).unbind(3)), state

    def _difference(self, first: Tensor, second: Tensor) -> Hidden:
        """What the two maps found, (B, T, H, 2 K) each, -> (B, T, D)"""
        # not @, which autocast would make 16-bit
        plus, minus = (self.lambdas[0::2] * self.lambdas[1::2]).sum(-1).exp()
        scale = plus - minus + self.lambda_init
        return self.out((self.norm(first - scale * second) * (1 - self.lambda_init)).flatten(2))

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, 2 H, K) and keys (B, T, 2 G, K), those of the first map before those of the second;
        value (B, T, G, 2 K). Without T in `step`."""
        widths = (2 * self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim, 2 * self.kv_heads * self.head_dim)
        query, key, value = self.qkv(x).split(widths, -1)
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        query, key = (rotate(heads.unflatten(-1, (-1, self.head_dim)), table) for heads in (query, key))
        return query, key, value.unflatten(-1, (self.kv_heads, 2 * self.head_dim))
