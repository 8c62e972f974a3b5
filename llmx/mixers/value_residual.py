"""Attention with a value residual (arXiv 2410.17897, the learnable ResFormer): later layers mix the values of the first
layer into their own.

    v_t = l_1 W_v x_t + l_2 v_t^(1)          v^(1) the values of the first layer of this kind, (B, T, G K)
    y_t = W_o concat_h  sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

l_1 and l_2 are two learned numbers a layer, both 1/2 at the start; the first layer has none, its values are as they
are. Attention concentrates on few tokens in deep stacks, and what those tokens were is carried past it. Time, memory
and state are those of grouped rotary attention: O(T^2 D), and 2 G K numbers a token, for the mixed values are what is
kept. The trap: the term has to be there in every form. A step that does not hand the first layer's value of the same
token to the layers above generates from another network than the one that was trained, with no error to show it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import NoNorm, Norm
from llmx.parts.rotary import rotate, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer

FIRST_VALUE = "first value"  # in the context's store: (B, T, G K), without T in `step`


class ValueResidualAttention(StatefulMixer[KeyValues]):
    """Multi-head causal attention with rotary positions, its values mixed with those of the first such layer.

    All layers need the same `heads` and `kv_heads`, for the values to be of one width.

    Args:
        site: where the mixer stands; the one with occurrence 0 is the first.
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
        norm: factory of a norm for each head's query and key, from K, before the rotation; none if not given.
        out_std: of the initialisation of W_o; 0.02 / sqrt(2 depth) if not given.

    Raises:
        ValueError: for head counts that do not divide.
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
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.query_norm, self.key_norm = norm(self.head_dim), norm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        self.shares = None if site.occurrence == 0 else nn.Parameter(torch.full((2,), 0.5))  # l_1, l_2
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth) if out_std is None else out_std)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        mixed = causal_attention(query, key, value, self.dropout if self.training else 0.0)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = attend_cache(query, key, value, state, context)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = attend_cache(*self._project(x, context), state, context)
        return self.out(mixed), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query (B, T, H, K), rotated key (B, T, G, K), mixed value (B, T, G, K), without T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        if self.shares is None:
            context.store[FIRST_VALUE] = value.flatten(-2)
        else:
            own, first = self.shares.to(value.dtype).unbind()
            value = own * value + first * context.store[FIRST_VALUE].unflatten(-1, (-1, self.head_dim))
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        return rotate(self.query_norm(query), table), rotate(self.key_norm(key), table), value
