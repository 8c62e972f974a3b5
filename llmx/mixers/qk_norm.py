"""Attention with normalised queries and keys (arXiv 2010.04245, 2302.05442; per head with RMSNorm as in Qwen3).

    q_t, k_t = R_t rms(W_q x_t) * g_q, R_t rms(W_k x_t) * g_k          each head by itself, gains g of width K
    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

The scores are bounded by sqrt(K) times the gains. So they cannot grow until the softmax saturates, which makes large
learning rates diverge. Time O(T^2 D), memory O(T D) with the fused kernel. The state grows by 2 G K numbers a token.
The trap: the norm comes before the rotation. A gain applied after it would pull the rotated pairs apart.
"""

from torch import Tensor

from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class QKNormAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        eps: of the norms.
        dropout: probability of dropping an attention weight in training.
        out_std: of the initialisation of W_o; 0.02 / sqrt(2 depth) if not given.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
        dropout: float = 0.0,
        out_std: float | None = None,
    ):
        super().__init__(site, heads, kv_heads, rotary_base, dropout=dropout)
        self.query_norm = RMSNorm(self.head_dim, eps)
        self.key_norm = RMSNorm(self.head_dim, eps)
        self.add_output(site, std=out_std)

    def project(self, x: Tensor, context: Context) -> Heads:
        query, key, value = self.split_heads(x)
        table = self.rotary_table(context, x)
        return rotate(self.query_norm(query), table), rotate(self.key_norm(key), table), value
