"""The attention of the normalized Transformer, nGPT (arXiv 2410.01131).

    q_t, k_t = unit(R_t W_q h_t) * s_qk, unit(R_t W_k h_t) * s_qk       each head by itself, unit(x) = x / |x|
    y_t = W_o concat_h  sum_{s <= t} softmax_s(sqrt(K) q_t . k_s) v_s   v_s = W_v h_s

Rows of W_q, W_k, W_v (D,) and columns of W_o (D,) have length 1, and are given it back after every optimizer step; h
has length 1 too, so that each product with a row is a cosine. s_qk has a number for each of the H K channels, shared by
query and key; it starts at 1 and is stored as 1 / sqrt(D). Time O(T^2 D) a sequence, memory O(T D) with the fused
kernel; the state grows with the length, 2 D numbers a token. The traps: the softmax is scaled up by sqrt(K), not down,
since a product of unit vectors has a variance of 1 / K; and W_o is normalised along its other axis, a mistake that a
square matrix does not show.
"""

from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_
from llmx.parts.rotary import rotate, shared_table
from llmx.parts.unit_norm import LearnedScale, renormalise_, unit_norm
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class NGPTAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: must divide `dim` into even parts.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for heads that do not divide.
    """

    def __init__(self, site: Site, heads: int = 8, rotary_base: float = 10000.0, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or site.dim % (2 * heads):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim} into even parts")
        self.heads = heads
        self.head_dim = site.dim // heads
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.scale = LearnedScale(site.dim, 1.0, site.dim**-0.5)  # s_qk
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.out)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        renormalise_(self.qkv.weight, 1)
        renormalise_(self.out.weight, 0)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        mixed = causal_attention(query, key, value, self.dropout if self.training else 0.0)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.heads, max_length, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self._project(x, context))
        mixed, state = attend_cache(query, key, value, state, context)
        return self.out(mixed[:, 0]), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = attend_cache(*self._project(x, context), state, context)
        return self.out(mixed), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, T, H, K), without T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        both, value = heads.split((2 * self.heads, self.heads), -2)
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        query, key = unit_norm(rotate(both, table)).chunk(2, -2)
        scale = self.scale().view(self.heads, self.head_dim)
        # attention divides by sqrt(K), where sqrt(K) is to multiply
        return query * (scale * self.head_dim), key * scale, value
