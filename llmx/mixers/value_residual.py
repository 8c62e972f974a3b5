"""Attention with a value residual (arXiv 2410.17897, the learnable ResFormer): later layers add the first's values.

    v_t = l_1 W_v x_t + l_2 v_t^(1)          v^(1) the values of the first layer of this kind, (B, T, G K)
    y_t = W_o concat_h  sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

l_1 and l_2 are two learned numbers a layer, both 1/2 at the start. The first layer has none and keeps its values as
they are. Attention concentrates on few tokens in deep stacks, and the residual carries those tokens' values past it.
Time, memory and state are those of grouped rotary attention: O(T^2 D), and 2 G K numbers a token, since the cache keeps
the mixed values. The trap: every form needs the term. A step must hand the first layer's value of the same token to the
layers above. Otherwise generation silently uses another network than training.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmx.parts.norm import NoNorm, Norm
from llmx.parts.rotary import rotate
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site

FIRST_VALUE = "first value"  # in the context's store: (B, T, G K), no T in `step`


class ValueResidualAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D). All layers need the same `heads` and `kv_heads`, so that their values have one width.

    Args:
        site: where the mixer stands; occurrence 0 is the first layer of this kind.
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
        norm: factory of a norm for each head's query and key, from K, before the rotation; none if not given.
        out_std: of the initialisation of W_o; 0.02 / sqrt(2 depth) if not given.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        norm: Callable[[int], Norm] = NoNorm,
        out_std: float | None = None,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        self.query_norm, self.key_norm = norm(self.head_dim), norm(self.head_dim)
        self.shares = None if site.occurrence == 0 else nn.Parameter(torch.full((2,), 0.5))  # l_1, l_2
        self.add_output(site, std=out_std)

    def project(self, x: Tensor, context: Context) -> Heads:
        query, key, value = self.split_heads(x)
        if self.shares is None:
            context.store[FIRST_VALUE] = value.flatten(-2)
        else:
            own, first = self.shares.to(value.dtype).unbind()
            value = own * value + first * context.store[FIRST_VALUE].unflatten(-1, (-1, self.head_dim))
        table = self.rotary_table(context, x)
        return rotate(self.query_norm(query), table), rotate(self.key_norm(key), table), value
