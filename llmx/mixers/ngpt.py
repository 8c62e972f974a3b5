"""The attention of the normalized Transformer, nGPT (arXiv 2410.01131).

    q_t, k_t = unit(R_t W_q h_t) * s_qk, unit(R_t W_k h_t) * s_qk       each head by itself, unit(x) = x / |x|
    y_t = W_o concat_h  sum_{s <= t} softmax_s(sqrt(K) q_t . k_s) v_s   v_s = W_v h_s

Rows of W_q, W_k, W_v (D,) and columns of W_o (D,) have length 1; every optimizer step ends by restoring it. h has
length 1 too, so each product with a row is a cosine. s_qk has a number for each of the H K channels, shared by query
and key. It starts at 1 and is stored as 1 / sqrt(D). Time O(T^2 D), memory O(T D) with the fused kernel. The state
grows by 2 D numbers a token. The traps: the softmax is scaled up by sqrt(K), not down, since a product of unit vectors
has a variance of 1 / K. W_o is normalised along its other axis; a square matrix hides a mistake here.
"""

from torch import Tensor

from llmx.parts.norm import LearnedScale, renormalise_, unit_norm
from llmx.parts.rotary import rotate
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class NGPTAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: must divide `dim` into even parts.
        rotary_base: base of the rotary frequencies.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, site: Site, heads: int = 8, rotary_base: float = 10000.0, dropout: float = 0.0):
        super().__init__(site, heads, rotary_base=rotary_base, dropout=dropout)
        self.scale = LearnedScale(site.dim, 1.0, site.dim**-0.5)  # s_qk
        self.add_output(site, std=0.02)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        renormalise_(self.qkv.weight, 1)
        renormalise_(self.out.weight, 0)

    def project(self, x: Tensor, context: Context) -> Heads:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        both, value = heads.split((2 * self.heads, self.heads), -2)
        query, key = unit_norm(rotate(both, self.rotary_table(context, x))).chunk(2, -2)
        scale = self.scale().view(self.heads, self.head_dim)
        # attention divides by sqrt(K), but nGPT multiplies by it
        return query * (scale * self.head_dim), key * scale, value
