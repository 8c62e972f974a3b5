"""The Forgetting Transformer's attention (FoX, arXiv 2503.02130): softmax attention that forgets by content.

    f_t = sigmoid(w_f x_t + b_f) a head,     d_ts = sum_{r = s + 1 .. t} log f_r = F_t - F_s <= 0
    y_t = W_o concat_h  sum_{s <= t} softmax_s(q_t . k_s / sqrt(K) + d_ts) v_s

It has no positions: the gates tell near from far. Time O(T^2 D), memory O(T^2 H) with the scores written out. The state
grows by (2 K + 1) H numbers a token: keys, values, and F, the sum of the log gates so far. The traps: the gate of s
itself does not weaken s, so F_t - F_s begins at s + 1. F also grows without bound. Near 10^5, a float32 sum by steps
loses log gates under 0.004, and the attention stops forgetting. So F is float64 here: only its differences are rounded.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, biased_causal_attention, empty_cache, query_positions, write
from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import at_least_float32, exact_dtype
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class ForgettingState(NamedTuple):
    """The past, slot s for position s. A step writes the caches in place while gradients are off."""

    cache: KeyValues
    sums: Tensor  # (B, H, S, 1), F of each slot, float64
    total: Tensor  # (B, H), F of the last token, float64


class ForgettingAttention(StatefulMixer[ForgettingState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: must divide `dim`.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, site: Site, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.dropout = dropout
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.forget = nn.Linear(site.dim, heads)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.forget)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value, log_gate = self._project(x)
        sums = log_gate.cumsum(1).transpose(1, 2)  # (B, H, T)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        bias = _decay(sums, sums, value)
        mixed = biased_causal_attention(query, key, value, bias, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> ForgettingState:
        like = self.out.weight
        return ForgettingState(
            empty_cache(like, batch_size, self.heads, max_length, self.head_dim),
            like.new_zeros(batch_size, self.heads, max_length, 1, dtype=torch.float64),
            like.new_zeros(batch_size, self.heads, dtype=torch.float64),
        )

    def step(self, x: Tensor, state: ForgettingState, context: Context) -> tuple[Tensor, ForgettingState]:
        mixed, state = self.prefill(x[:, None], state, context)
        return mixed[:, 0], state

    def prefill(self, x: Hidden, state: ForgettingState, context: Context) -> tuple[Hidden, ForgettingState]:
        query, key, value, log_gate = self._project(x)
        total = state.total[:, None] + log_gate.cumsum(1)  # (B, T, H)
        sums = write(state.sums, total[..., None], query_positions(context))
        bias = _decay(total.transpose(1, 2), sums[..., 0], value)
        mixed, cache = attend_cache(query, key, value, state.cache, context, bias)
        return self.out(mixed), ForgettingState(cache, sums, total[:, -1])

    def _project(self, x: Hidden) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value (B, T, H, K), and log f (B, T, H) in float64."""
        query, key, value = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim)).chunk(3, -2)
        return query, key, value, F.logsigmoid(at_least_float32(self.forget(x))).double()


def _decay(now: Tensor, past: Tensor, like: Tensor) -> Tensor:
    """d_ts up to a term that all s share, which a softmax ignores; meaningless where s > t.

    F at T tokens (B, H, T) and at S slots (B, H, S) -> (B, H, 1, T, S), in the precision of `like`, float32 at least.
    Two float32 numbers make up each F, so no matrix is float64.
    """
    exact = exact_dtype(like)
    coarse = past.to(exact)
    rest = (past - coarse).to(exact).detach()  # the gradient passes through `coarse`
    return (now.to(exact)[..., None] - coarse[..., None, :] - rest[..., None, :])[:, :, None]
