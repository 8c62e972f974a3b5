"""Attention with normalised queries and keys (arXiv 2010.04245, 2302.05442; per head with RMSNorm as in Qwen3).

    q_t, k_t = R_t rms(W_q x_t) * g_q, R_t rms(W_k x_t) * g_k          each head by itself, gains g of width K
    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

The scores are bounded by sqrt(K) times the gains, so they cannot grow until the softmax saturates, which is what makes
large learning rates blow up. Time O(T^2 D) a sequence, memory O(T D) with the fused kernel; the state grows with the
length, 2 G K numbers a token. The trap: the norm is over one head's K numbers and comes before the rotation, whose
pairs a gain applied afterwards would pull apart.
"""

from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class QKNormAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands.
        heads: query heads; must divide `dim` into even parts.
        kv_heads: key/value heads; must divide `heads`. As many as `heads` if not given.
        rotary_base: base of the rotary frequencies.
        eps: of the norms.
        dropout: probability of dropping an attention weight in training.
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
        eps: float = 1e-6,
        dropout: float = 0.0,
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
        self.query_norm = RMSNorm(self.head_dim, eps)
        self.key_norm = RMSNorm(self.head_dim, eps)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth) if out_std is None else out_std)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self._project(x, context))
        mixed = causal_attention(query, key, value, self.dropout if self.training else 0.0)
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
        """Rotated query (B, T, H, K), rotated key and value (B, T, G, K), without T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        table = shared_table(context, self.head_dim, self.rotary_base, x.dtype)
        return rotate(self.query_norm(query), table), rotate(self.key_norm(key), table), value
