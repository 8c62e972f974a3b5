"""Attention with an output gate (arXiv 2505.06708), as in Qwen3-Next: normalised heads, partly rotated.

    q_t, k_t = R_t rms(W_q x_t), R_t rms(W_k x_t);  v_t = W_v x_t;  g_t = sigmoid(W_g x_t)       g a number a channel
    y_t = W_o (g_t * concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s)

The gate lets a head be silent, which otherwise needs a sink. It separates value and output projections, otherwise one
low-rank matrix. R turns the first part of a head. Time O(T^2 D), memory O(T D) with the fused kernel. The state grows
by 2 G K numbers a token. The trap: the gate reads the input x_t, not what attention found, and is sigmoid, not SiLU.
"""

from torch import Tensor, nn

from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate_part, shared_table
from llmx.parts.softmax_attention import Heads, SoftmaxAttention
from llmx.protocol import Context, Site


class GatedAttention(SoftmaxAttention):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: query heads; must divide `dim`.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        rotary_fraction: part of each head that is rotated; must make an even number of channels.
        eps: of the norms of query and key.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        rotary_fraction: float = 0.25,
        eps: float = 1e-6,
    ):
        super().__init__(site, heads, kv_heads)
        self.rotated = int(self.head_dim * rotary_fraction)
        if not 0 < rotary_fraction <= 1 or not self.rotated or self.rotated % 2:
            raise ValueError(
                f"rotary_fraction: {rotary_fraction} of {self.head_dim} channels a head is no even number of them"
            )
        self.rotary_base = rotary_base
        self.gate = nn.Linear(site.dim, site.dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, eps)
        self.key_norm = RMSNorm(self.head_dim, eps)
        self.add_output(site, self.gate)

    def project(self, x: Tensor, context: Context) -> Heads:
        query, key, value = self.split_heads(x)
        table = shared_table(context, self.rotated, self.rotary_base, x.dtype)
        return rotate_part(self.query_norm(query), table), rotate_part(self.key_norm(key), table), value

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(mixed * self.gate(x).sigmoid())
