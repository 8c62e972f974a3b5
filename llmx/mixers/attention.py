"""Causal softmax attention with rotary positions and grouped key/value heads, as in Llama.

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t            H query heads, G key/value heads, each of K = D / H
    y_t = W_o concat_h  sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

arXiv 1706.03762 (attention), 2104.09864 (rotary R), 2305.13245 (grouped heads). Time O(T^2 D), memory O(T D) with the
fused kernel, O(T^2) with the products written out. The state grows by 2 G K numbers a token. `SoftmaxAttention` holds
the code. The trap: grouped heads repeat each key head for neighbouring query heads (h // (H / G)), not in turn.
"""

from llmx.parts.softmax_attention import SoftmaxAttention
from llmx.protocol import Site


class Attention(SoftmaxAttention):
    """Multi-head causal attention with rotary positions and a key/value cache.

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
        out_std: of the initialisation of W_o; 0.02 / sqrt(2 depth) if not given.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        out_std: float | None = None,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        self.add_output(site, std=out_std)
