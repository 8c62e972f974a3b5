"""Causal softmax attention by content alone, as in the first Transformer and in GPT-2: the embedding holds positions.

    q_t, k_t, v_t = W_q x_t + b_q, W_k x_t + b_k, W_v x_t + b_v     H query heads, G key/value heads, K = D / H
    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s + b_o

arXiv 1706.03762. Without positions it is NoPE (arXiv 2305.19466): a causal mask alone lets a network count. Time
O(T^2 D), memory O(T D) with the fused kernel. The state grows by 2 G K numbers a token. The trap: without positions the
mixer still sees order, not distance. Permuting the past leaves the last output unchanged after one layer, not after
two.
"""

from torch import Tensor

from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class PlainAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim`.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        bias: all projections have a bias, as in 2017 and in GPT-2.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self, site: Site, heads: int = 8, kv_heads: int | None = None, bias: bool = False, dropout: float = 0.0
    ):
        super().__init__(site, heads, kv_heads, bias=bias, dropout=dropout)
        self.add_output(site)

    def project(self, x: Tensor, context: Context) -> Heads:
        return self.split_heads(x)
