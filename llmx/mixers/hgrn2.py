"""HGRN2 (arXiv 2404.07904): a gated recurrence whose state an outer product widens, with the key tied to the gate.

    f_t = b_l + (1 - b_l) sigmoid(W_f x_t)  (K,) a head,     S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T  (K, K) a head
    y_t = W_o norm(S_t^T swish(W_q x_t))                     norm: RMSNorm over all D channels, K = D / H
    b_l = sum_{i = 1 .. l} softmax_i(B)_i                    B (L, D) learned, the softmax over the L layers

One gate decides what is forgotten and what is written: each channel is a running mean, so the memory stays bounded. The
lower bounds b (from HGRN, arXiv 2311.04823) rise with the layer: the lower layers are free to forget, the upper ones
keep. Time O(T (c + K) D), memory O(T c) a head for chunks of c = 32. The state is S, K D numbers. The traps: b_0 is
exactly 0, so the sum leaves out softmax_0. With it the first layer keeps at least 1 / L of everything, and the last one
forgets nothing. B is one parameter of the whole stack: the first HGRN2 owns it and hands the bounds up, in every form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import decay_step, vector_decay
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.states import MemoryState
from llmx.protocol import Context, Hidden, PrefillMixer, Site

BOUNDS = "hgrn2 bounds"  # in the context's store: (1, T, L, D), the same for all T, without T in `step`


class HGRN2(PrefillMixer[MemoryState]):
    """(B, T, D) -> (B, T, D).

    Args:
        site: where the mixer stands; the one with occurrence 0 owns the lower bounds.
        heads: must divide `dim`.
    """

    def __init__(self, site: Site, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.layer = site.layer
        self.project = nn.Linear(site.dim, 3 * site.dim, bias=False)  # query, gate, value
        owner = site.occurrence == 0 and site.depth > 1  # a single layer has no bound but 0
        self.bounds = nn.Parameter(torch.zeros(site.depth, site.dim)) if owner else None  # B
        self.norm = RMSNorm(site.dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> MemoryState:
        return MemoryState(exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim))

    def step(self, x: Tensor, state: MemoryState, context: Context) -> tuple[Tensor, MemoryState]:
        mixed, memory = decay_step(*self._project(x, context), state.memory)
        return self.out(self.norm(mixed.flatten(-2))), MemoryState(memory)

    def prefill(self, x: Hidden, state: MemoryState | None, context: Context) -> tuple[Hidden, MemoryState]:
        mixed, memory = vector_decay(*self._project(x, context), state.memory if state else None)
        return self.out(self.norm(mixed.flatten(-2))), MemoryState(memory)

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key 1 - f, value and log f, each (B, T, H, K), without T in `step`."""
        query, gate, value = self.project(x).chunk(3, -1)
        gate, query = at_least_float32(gate), F.silu(query)
        if self.bounds is not None:
            bounds = self.bounds.to(gate.dtype).softmax(0)
            bounds = torch.cat((torch.zeros_like(bounds[:1]), bounds[1:].cumsum(0)))
            context.store[BOUNDS] = bounds.expand(1, *context.positions.shape[1:], -1, -1)
        log_forget, key = F.logsigmoid(gate), torch.sigmoid(-gate)
        if self.layer > 0:
            bound = context.store[BOUNDS][..., self.layer, :]
            log_forget = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_forget)
            key = (1 - bound) * key
        query, key, value, log_forget = (p.unflatten(-1, (self.heads, -1)) for p in (query, key, value, log_forget))
        return query, key, value, log_forget
