"""The long-term memory of Titans (arXiv 2501.00663) as a layer: gradient descent with momentum and weight decay.

    [q; k; v]_t = silu(conv(W x))_t,   q, k of length 1 in each head;    (a, e, r)_t = W_r x_t + c    a head
    alpha_t = sigmoid(a_t),    eta_t = sigmoid(e_t),    theta_t = (1 - eta_t) sigmoid(r_t) / b
    S_t = eta_t S_{t-1} - theta_t k_t (M'^T k_t - v_t)^T                 the gradient of |M'^T k_t - v_t|^2 / 2
    M_t = (1 - alpha_t) M_{t-1} + S_t                                    (K, K) a head
    y_t = W_o (norm(M_t^T q_t) * silu(W_g x_t))                          norm: RMSNorm over the K channels of a head

M' is M at the end of the mini-batch before, of b = 8 tokens. Within one, a query reads a masked attention over errors,
whose weights are a product of two triangles of decays, eta's and 1 - alpha's. T / b dependent steps of matrix products,
time O(T (b + K) D), memory O(T K D / b). The state is M', M, S and the last 3 inputs of the convolution, 3 K D + 9 D
numbers. The first M is learned. The memory is linear, the paper's shallowest. The paper leaves open how the rates
depend on x. The traps: b gradients at one M' overshoot b times over where keys agree, and momentum 1 / (1 - eta) times
more; theta divides both out. S moves M at each token, written or not, so padding in a mini-batch must hold M still.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.delta import l2_norm
from llmx.parts.init import normal_, residual_std
from llmx.parts.mini_batches import MiniBatches
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_dtype
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class TitansState(NamedTuple):
    convolution: Tensor  # (B, w - 1, 3 D)
    start: Tensor  # (B, H, K, K), M' of the last token's mini-batch
    memory: Tensor  # (B, H, K, K), M
    momentum: Tensor  # (B, H, K, K), S


class Inputs(NamedTuple):
    """The inputs of the recurrence, each (B, T, H, ...), without T in `step`."""

    query: Tensor  # (..., K)
    key: Tensor  # (..., K)
    value: Tensor  # (..., K)
    rate: Tensor  # (...), theta
    log_keep: Tensor  # (...), log(1 - alpha)
    log_momentum: Tensor  # (...), log eta


class Titans(PrefillMixer[TitansState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H; must divide `dim`.
        mini_batch: b, tokens whose gradients are taken at the same memory.
        convolution: tokens that the convolution sees, the current one among them.
    """

    def __init__(self, site: Site, heads: int = 4, mini_batch: int = 8, convolution: int = 4):
        super().__init__()
        check_sizes(mini_batch=mini_batch)
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.mini_batch = mini_batch
        self.widths = (3 * site.dim, site.dim, 3 * heads)  # q, k, v; gate; a, e, r
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(3 * site.dim, convolution)
        forgets = torch.linspace(math.log(0.001), math.log(0.1), heads).exp()  # alpha at the start, from head to head
        self.rates = nn.Parameter(torch.cat((forgets.logit(), torch.zeros(2 * heads))))  # c
        self.memory = nn.Parameter(torch.empty(heads, self.head_dim, self.head_dim))  # the first M
        self.norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        nn.init.normal_(self.memory, std=0.02)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> TitansState:
        memory = at_least_float32(self.memory).repeat(batch_size, 1, 1, 1)
        return TitansState(self.convolution.init_state(batch_size), memory, memory.clone(), torch.zeros_like(memory))

    def step(self, x: Tensor, state: TitansState, context: Context) -> tuple[Tensor, TitansState]:
        u, gate, rates = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        query, key, value, rate, log_keep, log_momentum = (y[..., None] for y in self._inputs(u, rates))
        with torch.autocast(x.device.type, enabled=False):
            begins = (context.positions % self.mini_batch == 0)[:, None, None, None]
            start = torch.where(begins, state.memory, state.start)
            error = key.mT @ start - value.mT  # (B, H, 1, K)
            momentum = log_momentum[..., None].exp() * state.momentum - rate[..., None] * key * error
            memory = log_keep[..., None].exp() * state.memory + momentum
            read = (query.mT @ memory).squeeze(-2)
        y = self.out((self.norm(read).flatten(-2) * F.silu(gate)).to(gate.dtype))
        return y, TitansState(convolution, start, memory, momentum)

    def prefill(self, x: Hidden, state: TitansState | None, context: Context) -> tuple[Hidden, TitansState]:
        """One mini-batch after the other."""
        positions = None if state is None else context.positions.expand(len(x), -1)
        convolution, start, memory, momentum = state or (None, *self.init_state(len(x), 0)[1:])
        u, gate, rates = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        inputs = self._inputs(u, rates)
        with torch.autocast(x.device.type, enabled=False):
            batches = MiniBatches(x.shape[1], self.mini_batch, positions, inputs.rate)
            query, key, value, rate, log_keep, log_momentum = (batches.cut(y) for y in inputs)  # (B, N, H, b, ...)
            kept, moved = _faded(log_keep), _faded(log_momentum)  # (B, N, H, b, b + 1)
            moves = kept[..., 1:] * batches.present[:, :, :, None]  # the share of each S in each M: 0 after padding
            memory_keeps, momentum_keeps = kept[..., :1], moved[..., :1]  # of the earlier M and S
            memory_moves = moves @ moved
            carried, written = memory_moves.split((1, self.mini_batch), -1)  # of the earlier S, and of each gradient
            written = written * rate[..., None, :]
            scores = (query @ key.mT) * written  # (B, N, H, b, b)
            into_memory = written[..., -1, :, None] * key  # each gradient in the last M, (B, N, H, b, K)
            into_momentum = (moved[..., -1, 1:] * rate)[..., None] * key
            into = torch.cat((into_memory, into_momentum), -1).mT  # (B, N, H, 2 K, b)
            from_memory, from_momentum = memory_keeps * query, carried * query
            last_kept, last_carried, last_moved = (y[..., -1:, :] for y in (memory_keeps, carried, momentum_keeps))
            begins = batches.begins[..., None, None, None]  # (B, N, 1, 1, 1)
            reads = []
            # unbound: the gradient of an index is as long as the whole text, at each mini-batch
            parts = (begins, key, value, from_memory, from_momentum, scores, into, last_kept, last_carried, last_moved)
            for begin, k, v, of_memory, of_momentum, score, write, keep, carry, move in zip(
                *(part.unbind(1) for part in parts), strict=True
            ):
                start = torch.where(begin, memory, start)
                error = k @ start - v
                reads.append(of_memory @ memory + of_momentum @ momentum - score @ error)
                to_memory, to_momentum = (write @ error).chunk(2, -2)
                memory = keep * memory + carry * momentum - to_memory
                momentum = move * momentum - to_momentum
            read = batches.join(torch.stack(reads, 1))
        y = self.out((self.norm(read).flatten(-2) * F.silu(gate)).to(gate.dtype))
        return y, TitansState(convolution, start, memory, momentum)

    def _inputs(self, u: Tensor, rates: Tensor) -> Inputs:
        """From conv(W x) (B, T, 3 D) and W_r x (B, T, 3 H), without T in `step`; in float32 at least."""
        exact = exact_dtype(u)
        query, key, value = F.silu(u).to(exact).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        decay, momentum, rate = (rates.to(exact) + self.rates.to(exact)).chunk(3, -1)
        rate = (-momentum).sigmoid() * rate.sigmoid() / self.mini_batch
        return Inputs(l2_norm(query), l2_norm(key), value, rate, F.logsigmoid(-decay), F.logsigmoid(momentum))


def _faded(log_decay: Tensor) -> Tensor:
    """(..., b) -> (..., b, b + 1): how much is left at each place (row) of the value before the first place and of the
    value added at each place (columns).

    Each sum is taken by itself, of numbers with one sign: the difference of two long sums has lost the short one.
    """
    size = log_decay.shape[-1]
    return (log_decay[..., None] * log_decay.new_ones(size, size + 1).tril()).cumsum(-2).exp().tril(1)
