"""TTT-Linear (arXiv 2407.04620): the state is a linear model, trained on the text while it is read.

    q_t, k_t, v_t = W x_t,  q and k rotated by position mod b;   r_t = base_rate sigmoid(W_r x_t + c) / K    a head
    f(z; S) = z + LN([z, 1] S),     l_t(S) = |f(k_t; S) - v_t|^2 / 2          S (K + 1, K): weights, and a row of bias
    S_t = S' - m_j sum_{s in the mini-batch, s <= t} r_s grad l_s(S')         m_j = max(0, 1 / j + learned)
    y_t = W_o norm(f(q_t; S_t))                                               norm: LayerNorm over all D channels

S' is S at the end of the mini-batch before, j = 1 .. b the place in this one. All its gradients are taken at S', so
those of b = 16 tokens are one matrix product, and a query reads q_t S' less a masked attention over the gradients (the
dual form). Between mini-batches there is no shortcut, as S' is inside LN: the method takes T / b dependent steps. Time
O(T (b + K) D), memory O(T K D / b) for the S' that backward needs. The state is S' and the sum of gradients so far, 2
(K + 1) D numbers. The first S' is learned. The traps: with the S of the mini-batch's end instead of S_t, a token reads
the gradients of later ones. Mini-batches count from the start of the text, or the outputs depend on how it was cut.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.mini_batches import MiniBatches
from llmx.parts.norm import LayerNorm
from llmx.parts.precision import at_least_float32, exact_dtype
from llmx.parts.rotary import rotary_table, rotate
from llmx.protocol import Context, Hidden, PrefillMixer, Site

EPS = 1e-6  # of the LayerNorms


class TTTLinearState(NamedTuple):
    weights: Tensor  # (B, H, K + 1, K), S' of the last token's mini-batch
    gradient: Tensor  # (B, H, K + 1, K), the sum of r grad l over that mini-batch so far


class Inputs(NamedTuple):
    """The inputs of the recurrence, each (B, T, H, ...), without T in `step`."""

    query: Tensor  # (..., K + 1), a 1 at its end
    key: Tensor  # (..., K + 1), with a 1 too
    target: Tensor  # (..., K), v - k, which LN learns to give
    rate: Tensor  # (...), r


class TTTLinear(PrefillMixer[TTTLinearState]):
    """(B, T, D) -> (B, T, D), as in the paper's Transformer backbone.

    Args:
        heads: H; must divide `dim` into parts of even width.
        mini_batch: b, tokens whose gradients are taken at the same weights.
        base_rate: the inner learning rate, before the token's own share of it; above 0.
        rotary_base: of the angles of query and key.
    """

    def __init__(
        self, site: Site, heads: int = 4, mini_batch: int = 16, base_rate: float = 1.0, rotary_base: float = 10000.0
    ):
        super().__init__()
        check_sizes(mini_batch=mini_batch)
        if base_rate <= 0:
            raise ValueError(f"base_rate: {base_rate} is not above 0")
        self.heads = heads
        self.head_dim = head_width(site.dim, heads, even=True)
        self.mini_batch = mini_batch
        self.base_rate = base_rate
        self.rotary_base = rotary_base
        self.widths = (3 * site.dim, heads)  # q, k, v; r
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.rate_bias = nn.Parameter(torch.zeros(heads))  # c
        self.step_size = nn.Parameter(torch.zeros(mini_batch))  # the learned part of m
        self.weights = nn.Parameter(torch.empty(heads, self.head_dim, self.head_dim))  # the first S'
        self.bias = nn.Parameter(torch.zeros(site.dim))
        self.inner_weight = nn.Parameter(torch.ones(site.dim))  # of LN, a head after the other
        self.inner_bias = nn.Parameter(torch.zeros(site.dim))
        self.norm = LayerNorm(site.dim, EPS)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        nn.init.normal_(self.weights, std=0.02)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> TTTLinearState:
        first = torch.cat((self.weights, self.bias.view(self.heads, 1, -1)), 1)
        first = at_least_float32(first).repeat(batch_size, 1, 1, 1)
        return TTTLinearState(first, torch.zeros_like(first))

    def step(self, x: Tensor, state: TTTLinearState, context: Context) -> tuple[Tensor, TTTLinearState]:
        query, key, target, rate = self._project(x, context)
        with torch.autocast(x.device.type, enabled=False):
            place = context.positions % self.mini_batch  # (B,)
            weights, gradient = self._begin(state, (place == 0)[:, None, None, None])
            known = (key[..., None, :] @ weights).squeeze(-2)  # (B, H, K)
            slope = self._slope(known[..., None, :], target[..., None, :])  # (B, H, 1, K)
            gradient = gradient + (rate[..., None] * key)[..., None] * slope
            here = weights - self._step_sizes()[place][:, None, None, None] * gradient  # S_t
            read = (query[..., None, :] @ here).squeeze(-2)
        return self._read(query, read, x.dtype), TTTLinearState(weights, gradient)

    def prefill(self, x: Hidden, state: TTTLinearState | None, context: Context) -> tuple[Hidden, TTTLinearState]:
        """The dual form, one mini-batch after the other."""
        positions = None if state is None else context.positions.expand(len(x), -1)
        state = state or self.init_state(len(x), 0)
        inputs = self._project(x, context)
        with torch.autocast(x.device.type, enabled=False):
            batches = MiniBatches(x.shape[1], self.mini_batch, positions, inputs.rate)
            query, key, target, rate = (batches.cut(part) for part in inputs)  # (B, N, H, b, ...)
            sizes = self._step_sizes()[:, None]  # (b, 1)
            weighed = rate[..., None] * key
            scores = sizes * (query @ weighed.mT).tril()  # (B, N, H, b, b): a query reads up to its own token
            both = torch.cat((key, query), -2)  # (B, N, H, 2 b, K + 1)
            begins = batches.begins[..., None, None, None]  # (B, N, 1, 1, 1)
            held = None if positions is None else sizes * query[:, 0]  # reads earlier gradients of its mini-batch
            reads = []
            # unbound: the gradient of an index is as long as the whole text, at each mini-batch
            parts = (part.unbind(1) for part in (begins, both, target, scores, weighed.mT))
            for begin, known_and_read, wanted, score, write in zip(*parts, strict=True):
                weights, gradient = state = self._begin(state, begin)
                known, read = (known_and_read @ weights).chunk(2, -2)  # (B, H, b, K)
                slope = self._slope(known, wanted)
                if held is not None:
                    read, held = read - held @ gradient, None
                reads.append(read - score @ slope)
                state = TTTLinearState(weights, gradient + write @ slope)
            read = batches.join(torch.stack(reads, 1))
        return self._read(inputs.query, read, x.dtype), state

    def _project(self, x: Tensor, context: Context) -> Inputs:
        """In float32 at least."""
        exact = exact_dtype(x)
        qkv, rate = (part.to(exact) for part in self.project(x).split(self.widths, -1))
        query, key, value = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        name = f"rotary {self.rotary_base} {self.head_dim} of {self.mini_batch}"
        if name not in context.store:
            places = context.positions % self.mini_batch
            context.store[name] = rotary_table(places, self.head_dim, self.rotary_base, exact)[..., None, :, :]
        query, key = rotate(query, context.store[name]), rotate(key, context.store[name])
        rate = (rate + self.rate_bias.to(exact)).sigmoid() * (self.base_rate / self.head_dim)
        return Inputs(F.pad(query, (0, 1), value=1.0), F.pad(key, (0, 1), value=1.0), value - key, rate)

    def _begin(self, state: TTTLinearState, begins: Tensor) -> TTTLinearState:
        """At the beginning of a mini-batch, the one before moves the weights."""
        moved = state.weights - self._step_sizes()[-1] * state.gradient
        return TTTLinearState(torch.where(begins, moved, state.weights), state.gradient.masked_fill(begins, 0.0))

    def _step_sizes(self) -> Tensor:
        """(b,), m."""
        exact = at_least_float32(self.step_size)
        places = torch.arange(1, self.mini_batch + 1, device=exact.device, dtype=exact.dtype)
        return (1 / places + exact).clamp(min=0)

    def _slope(self, known: Tensor, target: Tensor) -> Tensor:
        """The gradient of |LN(z) - target|^2 / 2 at z = known: (B, H, b, K) -> (B, H, b, K)."""
        weight, bias = (part.to(known.dtype).view(self.heads, 1, -1) for part in (self.inner_weight, self.inner_bias))
        centred = known - known.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed = centred * scale
        error = weight * (weight * normed + bias - target)
        along = (error * normed).mean(-1, keepdim=True)
        return scale * (error - error.mean(-1, keepdim=True) - normed * along)

    def _read(self, query: Tensor, read: Tensor, dtype: torch.dtype) -> Tensor:
        """q (B, T, H, K + 1) and [q, 1] S (B, T, H, K) -> (B, T, D), without T in `step`."""
        normed = F.layer_norm(read, read.shape[-1:], eps=EPS).flatten(-2)
        mixed = torch.addcmul(self.inner_bias.to(read.dtype), normed, self.inner_weight.to(read.dtype))
        return self.out(self.norm((query[..., :-1].flatten(-2) + mixed).to(dtype)))
