"""Differential attention (arXiv 2410.05258): the difference of two softmax maps, which cancels what both attend to.

    (q1, q2)_t, (k1, k2)_t = R_t W_q x_t, R_t W_k x_t        two of width K = D / (2 H) a head;  v_t of width 2 K
    a_h = sum_{s <= t} (softmax_s(q1_t . k1_s / sqrt(K)) - lambda softmax_s(q2_t . k2_s / sqrt(K))) v_s
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,    lambda_init = 0.8 - 0.6 exp(-0.3 layer)
    y_t = W_o concat_h (1 - lambda_init) rms(a_h)

Layers count from 0. The norm is over one head's 2 K channels, has a gain that the heads share, and never sees time.
Time O(T^2 D), twice the scores of plain attention. The state grows by 4 G K numbers a token. The traps:
- Query and key heads are half as wide as value heads, so H is half the heads of a plain attention with the same K.
- The factor 1 - lambda_init comes after the norm, which would undo it.
- With grouped heads a head's second query reads the second key: usual repetition needs all first heads in front.
"""

import math

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention
from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate, shared_table
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class DifferentialAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands; lambda starts by its layer.
        heads: pairs of query heads; `dim` must divide into 4 parts a head.
        kv_heads: pairs of key heads, and value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
    """

    def __init__(self, site: Site, heads: int = 4, kv_heads: int | None = None, rotary_base: float = 10000.0):
        if heads < 1 or site.dim % (4 * heads):
            raise ValueError(f"heads: dim {site.dim} must divide into 4 parts for each of {heads} heads")
        super().__init__(site, heads, kv_heads, rotary_base)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * site.layer)
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, self.head_dim // 2))  # l_q1, l_k1, l_q2, l_k2
        self.norm = RMSNorm(self.head_dim)
        self.add_output(site)

    def project(self, x: Tensor, context: Context) -> Heads:
        """Rotated (B, T, 2 H, K), (B, T, 2 G, K), first map before second, and value (B, T, G, 2 K), no T in `step`."""
        widths = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = self.qkv(x).split(widths, -1)
        half = self.head_dim // 2
        table = shared_table(context, half, self.rotary_base, x.dtype)
        query, key = (rotate(heads.unflatten(-1, (-1, half)), table) for heads in (query, key))
        return query, key, value.unflatten(-1, (-1, self.head_dim))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        mixed = causal_attention(query, key, value.repeat(1, 2, 1, 1))  # (B, 2 H, T, 2 K)
        return self._difference(*mixed.transpose(1, 2).chunk(2, 2)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        """Each of a head's two queries sees its own half of the slots' keys, which lie side by side."""
        first, second = query.chunk(2, 2)  # (B, T, H, K)
        nothing = torch.zeros_like(first)
        # keys are 2 K wide here, so this factor makes the scale 1 / sqrt(K)
        halves = torch.stack((torch.cat((first, nothing), -1), torch.cat((nothing, second), -1)), 3) * math.sqrt(2)
        both = torch.cat(key.chunk(2, 2), -1)  # (B, T, G, 2 K)
        mixed, cache = attend_cache(halves.flatten(2, 3), both, value, cache, context)
        return self._difference(*mixed.unflatten(-1, (self.heads, 2, -1)).unbind(3)).flatten(2), cache

    def _difference(self, first: Tensor, second: Tensor) -> Tensor:
        """The outputs of the two maps, (B, T, H, 2 K) each -> (B, T, H, 2 K)"""
        # a sum, because autocast would run @ in 16 bits
        plus, minus = (self.lambdas[0::2] * self.lambdas[1::2]).sum(-1).exp()
        scale = plus - minus + self.lambda_init
        return self.norm(first - scale * second) * (1 - self.lambda_init)
