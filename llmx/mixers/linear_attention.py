"""Linear attention (arXiv 2006.16236): a product of features replaces the softmax kernel.

    phi(x) = elu(x) + 1 > 0,     S_t = S_{t-1} + phi(k_t) v_t^T  (K, K),     z_t = z_{t-1} + phi(k_t)  (K,),   K = D / H
    y_t = W_o concat_h  S_t^T phi(q_t) / (z_t . phi(q_t))

There are no positions: the sums know which tokens came before, not in which order, so the embedding has to say it. Time
O(T K D), memory O(T c) a head for chunks of c = 32. The state is S and z, K (K + 1) H numbers. Nothing is forgotten:
the weight of each token shrinks as 1 / t. The traps: both sums include t itself, else the first token divides 0 by 0. z
is carried like S: a normaliser over the current piece alone is right in training and wrong in a continued text.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import scalar_decay
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.protocol import Context, Hidden, PrefillMixer, Site

EPS = 1e-6  # added to the normaliser, whose features may round to 0


class SumsState(NamedTuple):
    memory: Tensor  # (B, H, K, K), S
    normalizer: Tensor  # (B, H, K), z


class LinearAttention(PrefillMixer[SumsState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: must divide `dim`.
    """

    def __init__(self, site: Site, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.qkv)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> SumsState:
        memory = exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim)
        return SumsState(memory, memory[..., 0].clone())

    def step(self, x: Tensor, state: SumsState, context: Context) -> tuple[Tensor, SumsState]:
        query, key, value = (heads.to(state.memory.dtype) for heads in self._project(x))  # (B, H, K)
        memory = state.memory + key[..., None] * value[..., None, :]
        normalizer = state.normalizer + key
        read = (memory * query[..., None]).sum(-2)  # (B, H, K)
        weight = (normalizer * query).sum(-1, keepdim=True)
        mixed = (read / (weight + EPS)).flatten(1).to(x.dtype)
        return self.out(mixed), SumsState(memory, normalizer)

    def prefill(self, x: Hidden, state: SumsState | None, context: Context) -> tuple[Hidden, SumsState]:
        both = None  # [S, z], (B, H, K, K + 1): z is the memory of a value that is always 1
        if state is not None:
            both = torch.cat((state.memory, state.normalizer[..., None]), -1)
        query, key, value = self._project(x)
        no_decay = query.new_zeros(1, x.shape[1], self.heads)
        sums, both = scalar_decay(query, key, F.pad(value, (0, 1), value=1.0), no_decay, both)
        read, weight = sums.split((self.head_dim, 1), -1)
        mixed = (read / (weight + EPS)).flatten(2).to(x.dtype)
        return self.out(mixed), SumsState(both[..., :-1], both[..., -1])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(query), phi(key) and value (B, T, H, K), without T in `step`, in float32 at least."""
        query, key, value = at_least_float32(self.qkv(x)).unflatten(-1, (-1, self.head_dim)).chunk(3, -2)
        return F.elu(query) + 1, F.elu(key) + 1, value
