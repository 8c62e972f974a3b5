"""RWKV-7, "Goose" (arXiv 2503.14456): a memory whose every step fades channels by a vector and rewrites along a key.

    x'_t = x_t + m * (x_{t-1} - x_t)                    token shift, m (D,) for each of r, w, k, v, a, g
    r, k, v = W x',   w = exp(-e^{-1/2} sigmoid(f_w(x'))),   a = sigmoid(f_a(x')),   g = W sigmoid(W x')
    v <- v + sigmoid(f_v(x')) * (v^(1) - v)             v^(1) the values of the first layer of this kind
    e = k * m_e / |k * m_e|,   k <- k * (1 + (a - 1) * m_a)
    S_t = S_{t-1} (diag(w_t) - e_t (a_t * e_t)^T) + v_t k_t^T        (K, K) a head
    y_t = W_o (g_t * (norm(S_t r_t) + (r_t . (m_r * k_t)) v_t))      the norm in each head, and the bonus of the token

The maps f are of low rank. exp(-exp(-softplus(-f) - 1/2)) is the same w, which stays above 0.545. Time O(T D (D + K))
in chunks, memory O(T (D + c H)). The state is S and the last x, D (K + 1) numbers. The traps: the erased value is read
from S_{t-1} before it fades. v^(1) has to be there in every form. The start decides: output 0, orthogonal maps, rates
spread over channels and layers. The rest of the paper is left to the network: a norm after the embedding, no weight
decay on the low-rank maps, twice the learning rate for the bias of w.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.parts.dplr import dplr
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.protocol import Context, Hidden, PrefillMixer, Site

FIRST_VALUE = "first value of RWKV-7"  # in the context's store: (B, T, D), without T in `step`
FASTEST = -math.exp(-0.5)  # the floor of every log decay


class RWKV7State(NamedTuple):
    last: Tensor  # (B, D), x of the token before
    memory: Tensor  # (B, H, K, K), S^T: keys by values


class Inputs(NamedTuple):
    """The inputs of the recurrence, each (..., H, K)."""

    receptance: Tensor  # r
    log_decay: Tensor  # log w, (FASTEST, 0)
    key: Tensor  # k
    value: Tensor  # v
    erase: Tensor  # e
    rate: Tensor  # a


class RWKV7(PrefillMixer[RWKV7State]):
    """(B, T, D) -> (B, T, D): the paper's time mixing. All layers need one width, so that the first's values fit.

    Args:
        site: where the mixer stands; the one with occurrence 0 is the first.
        heads: must divide `dim` into parts of 2 or more; the paper's heads are 64 wide.
        decay_rank: of the map to the decay; this rank and the others follow the paper for the width if not given.
        rate_rank: of the map to the learning rate a.
        value_rank: of the map to the share of the first layer's values.
        gate_rank: of the gate.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 4,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
    ):
        super().__init__()
        dim = site.dim
        if heads < 1 or dim % heads or dim == heads:
            raise ValueError(f"heads: {heads} heads must divide dim {dim} into parts of 2 or more")
        decay_rank = suggested_rank(dim, 2.5) if decay_rank is None else decay_rank
        rate_rank = suggested_rank(dim, 2.5) if rate_rank is None else rate_rank
        value_rank = suggested_rank(dim, 1.7) if value_rank is None else value_rank
        gate_rank = suggested_rank(dim, 5.0) if gate_rank is None else gate_rank
        check_sizes(decay_rank=decay_rank, rate_rank=rate_rank, value_rank=value_rank, gate_rank=gate_rank)
        self.heads = heads
        self.head_dim = dim // heads

        channel = torch.arange(dim) / (dim - 1)  # 0 to 1
        depth = site.layer / max(site.depth - 1, 1)  # 0 to 1
        within = torch.linspace(-1, 1, self.head_dim).repeat(heads)
        within = within * within.abs()
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * (1 - site.layer / site.depth)  # r, w, k, v, a, g
        self.shifts = nn.ParameterList(1 - (torch.arange(dim) / dim) ** power for power in powers)

        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.decay = LowRank(dim, decay_rank, nn.Tanh(), -5.5 + 6 * channel ** (1 + depth**0.3) + 2.5 * within)
        self.rate = LowRank(dim, rate_rank, nn.Identity(), -0.19 + 0.3 * within + 0.4 * (channel - 0.5))
        self.gate = LowRank(dim, gate_rank, nn.Sigmoid())
        self.share = None
        if site.occurrence > 0:
            self.share = LowRank(dim, value_rank, nn.Identity(), 0.73 - 0.4 * (channel - 0.5))
        self.erase_scale = nn.Parameter(0.71 - 0.1 * (channel - 0.5))  # m_e
        self.rate_scale = nn.Parameter(torch.full((dim,), 1.02))  # m_a
        self.bonus = nn.Parameter(torch.full((dim,), -0.04))  # m_r
        self.norm_weight = nn.Parameter(torch.full((dim,), ((site.layer + 1) / site.depth) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, 0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.out.weight)

    def init_state(self, batch_size: int, max_length: int) -> RWKV7State:
        last = self.out.weight.new_zeros(batch_size, self.heads * self.head_dim)
        return RWKV7State(last, exact_zeros(last, batch_size, self.heads, self.head_dim, self.head_dim))

    def step(self, x: Tensor, state: RWKV7State, context: Context) -> tuple[Tensor, RWKV7State]:
        inputs, gate = self._project(x, state.last.to(x.dtype), context)
        dtype = state.memory.dtype
        with torch.autocast(x.device.type, enabled=False):
            receptance, log_decay, key, value, erase, rate = (y.to(dtype)[..., None] for y in inputs)  # (B, H, K, 1)
            removed = (state.memory * erase).sum(-2)[..., None, :]  # e^T S^T, (B, H, 1, K)
            memory = log_decay.exp() * state.memory - rate * erase * removed + key * value.mT
            read = (memory * receptance).sum(-2)  # (B, H, K)
        return self._read(read, inputs, gate), RWKV7State(x, memory)

    def prefill(self, x: Hidden, state: RWKV7State | None, context: Context) -> tuple[Hidden, RWKV7State]:
        if state is None:
            memory, shifted = None, F.pad(x, (0, 0, 1, -1))
        else:
            memory, shifted = state.memory, torch.cat((state.last.to(x.dtype)[:, None], x[:, :-1]), 1)
        inputs, gate = self._project(x, shifted, context)
        receptance, log_decay, key, value, erase, rate = inputs
        read, memory = dplr(receptance, key, value, log_decay, -erase, erase * rate, FASTEST, memory)
        return self._read(read, inputs, gate), RWKV7State(x[:, -1], memory)

    def _project(self, x: Tensor, shifted: Tensor, context: Context) -> tuple[Inputs, Tensor]:
        """The inputs and the gate (..., D), from x and the x of the token before, both (..., D)."""
        change = shifted - x
        for_r, for_w, for_k, for_v, for_a, for_g = (torch.addcmul(x, change, m.to(x.dtype)) for m in self.shifts)
        key, value = self.key(for_k), self.value(for_v)
        if self.share is None:
            context.store[FIRST_VALUE] = value
        else:
            value = value + self.share(for_v).sigmoid() * (context.store[FIRST_VALUE] - value)
        rate = self.rate(for_a).sigmoid()
        log_decay = FASTEST * at_least_float32(self.decay(for_w)).sigmoid()
        erase = F.normalize(self._heads(key * self.erase_scale), dim=-1)
        key = key * (1 + (rate - 1) * self.rate_scale)
        heads = self._heads
        inputs = Inputs(heads(self.receptance(for_r)), heads(log_decay), heads(key), heads(value), erase, heads(rate))
        return inputs, self.gate(for_g)

    def _read(self, read: Tensor, inputs: Inputs, gate: Tensor) -> Tensor:
        """S r, (..., H, K), and the token's own bonus -> (..., D)."""
        eps = 1e-5 * self.head_dim  # 64e-5 at the paper's width
        normed = F.layer_norm(at_least_float32(read), read.shape[-1:], eps=eps)
        mixed = normed.flatten(-2) * self.norm_weight + self.norm_bias
        bonus = (inputs.receptance * inputs.key * self._heads(self.bonus)).sum(-1, keepdim=True) * inputs.value
        return self.out((mixed + bonus.flatten(-2)).to(gate.dtype) * gate)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))


class LowRank(nn.Module):
    """bias + U f(V x), with U and V of a rank, f the activation; at the start the bias alone."""

    def __init__(self, dim: int, rank: int, activation: nn.Module, bias: Tensor | None = None):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.activation = activation
        self.up = nn.Linear(rank, dim, bias=bias is not None)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, 0.1)
        if bias is not None:
            self.up.bias.data = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


def suggested_rank(dim: int, factor: float) -> int:
    """factor sqrt(D), rounded to a multiple of 32 that is not 0."""
    return max(32, round(factor * dim**0.5 / 32) * 32)
