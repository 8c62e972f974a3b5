"""Griffin's recurrent block with its RG-LRU (arXiv 2402.19427): a linear recurrence gated by its input.

    u = conv(W_u x),    r_t, i_t = sigmoid(W_r u_t + b_r), sigmoid(W_i u_t + b_i)      W_r, W_i block-diagonal, H blocks
    log a_t = -8 softplus(L) r_t                                                        L (F,) learned
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t)
    y_t = W_o (h_t * gelu(W_g x_t))

Between the projections each channel stands by itself. sqrt(1 - a^2) keeps the size of h at any decay. L starts where
a^8, the decay of a fully open gate, is uniform in 0.9 to 0.999, as in the paper. RecurrentGemma's code has a there.
Time O(T D F), memory O(T F). The state is h and the last 3 inputs of the convolution, 4 F numbers. The traps: near
a = 1, 1 - a^2 is all rounding, so it is -expm1(2 log a), whose root has an infinite slope at 0. The first token of a
text, with nothing to average, enters without the root, as in RecurrentGemma (the paper is silent), so positions matter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import check_sizes, head_width, hidden_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.scan import scan
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site

SHARPNESS = 8.0  # c in the paper: log a = -c softplus(L) r


class RGLRU(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        hidden: F, the channels of the recurrence; `dim` if not given, the paper takes 4/3 of it.
        heads: blocks of the gates' matrices; must divide `hidden`.
        convolution: tokens that the convolution sees, the current one among them.
    """

    def __init__(self, site: Site, hidden: int | None = None, heads: int = 4, convolution: int = 4):
        super().__init__()
        hidden = hidden_width(hidden, site.dim)
        check_sizes(convolution=convolution)
        block = head_width(hidden, heads, "hidden")
        self.project = nn.Linear(site.dim, 2 * hidden)  # u, and the input of the gelu gate
        self.convolution = ShortConvolution(hidden, convolution, bias=True)
        self.gates = nn.Parameter(torch.randn(heads, block, 2 * block) * block**-0.5)  # r and i
        self.gate_bias = nn.Parameter(torch.zeros(heads, 2 * block))
        rate = -torch.empty(hidden).uniform_(0.9, 0.999).log() / SHARPNESS
        self.decay = nn.Parameter(rate.expm1().log())  # L: softplus(L) is the rate
        self.out = nn.Linear(hidden, site.dim)
        normal_(self.project, site.dim**-0.5)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        hidden = exact_zeros(self.decay, batch_size, len(self.decay))
        return ConvolvedState(self.convolution.init_state(batch_size), hidden)  # (B, w - 1, F), (B, F)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        a, b = self._recurrence(u, context.positions)
        hidden = a * state.memory + b
        y = self.out(hidden.to(gate.dtype) * F.gelu(gate, approximate="tanh"))
        return y, ConvolvedState(convolution, hidden)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, start = state or (None, None)
        u, gate = self.project(x).chunk(2, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        hidden = scan(*self._recurrence(u, context.positions), start)
        y = self.out(hidden.to(gate.dtype) * F.gelu(gate, approximate="tanh"))
        return y, ConvolvedState(convolution, hidden[:, -1])

    def _recurrence(self, u: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and the added term, in float32 at least: u (B, T, F), positions (B or 1, T), without T in `step`."""
        blocks = u.unflatten(-1, (len(self.gates), -1))
        gates = torch.einsum("...hk,hkj->...hj", blocks, self.gates.to(u.dtype)) + self.gate_bias.to(u.dtype)
        r, i = at_least_float32(gates).sigmoid().chunk(2, -1)
        log_a = -SHARPNESS * F.softplus(self.decay.to(r.dtype)) * r.flatten(-2)
        square = -torch.expm1(2 * log_a)  # 1 - a^2
        root = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        scale = torch.where(positions[..., None] == 0, 1.0, root)
        return log_a.exp(), scale * i.flatten(-2) * u
