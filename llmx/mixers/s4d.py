"""S4D (arXiv 2206.11893): a diagonal state space a channel, the same at all times, hence a long convolution.

    h'(t) = A h(t) + u(t),   v(t) = 2 Re(C . h(t)) + E u(t)          h complex, N / 2 modes a channel
    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t                  exact where u stands still for dt (ZOH)
    K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(l dt A_n),   v = K * u + E u,   y_t = GLU(W gelu(v_t) + b)

Start (S4D-Lin): A_n = -1/2 + i pi n, dt log-uniform over channels in 0.001 to 0.1, C normal, B = 1, absorbed by C. Time
O(T (log T + N) D) by transforms padded to 2 T, memory O(T D + T^0.5 N D). The state is h, N D numbers. The traps:
unpadded transforms wrap the text's end to its beginning. exp(dt A) - 1 loses its digits at small dt, so it is expm1.
Half the modes stand for conjugates, hence the 2. The authors train A and dt at a smaller rate. All share one here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.init import log_time_steps, normal_
from llmx.parts.long_convolution import long_convolution
from llmx.parts.precision import exact_dtype
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class S4DState(NamedTuple):
    modes: Tensor  # (B, D, N / 2), h, complex


class S4D(StatefulMixer[S4DState]):
    """(B, T, D) -> (B, T, D).

    Args:
        state: N, real numbers of state a channel; even.
    """

    undecayed = ("log_decay", "frequency")

    def __init__(self, site: Site, state: int = 64):
        super().__init__()
        if state < 2 or state % 2:
            raise ValueError(f"state: {state} must be even and 2 at least")
        modes = state // 2
        self.log_step = nn.Parameter(log_time_steps(site.dim))  # of dt
        self.log_decay = nn.Parameter(torch.full((site.dim, modes), math.log(0.5)))  # of -Re A
        self.frequency = nn.Parameter(math.pi * torch.arange(modes).float().repeat(site.dim, 1))  # Im A
        self.read = nn.Parameter(torch.randn(site.dim, modes, 2) * 0.5**0.5)  # C, real and imaginary
        self.skip = nn.Parameter(torch.randn(site.dim))  # E
        self.out = nn.Linear(site.dim, 2 * site.dim)
        normal_(self.out, site.dim**-0.5)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        exponent, write, read = self._discrete()
        return self._mix(x, long_convolution(x, _kernel(read * write, exponent, x.shape[1])))

    def init_state(self, batch_size: int, max_length: int) -> S4DState:
        dtype = torch.promote_types(self.log_decay.dtype, torch.complex64)
        return S4DState(self.log_decay.new_zeros(batch_size, *self.log_decay.shape, dtype=dtype))

    def step(self, x: Tensor, state: S4DState, context: Context) -> tuple[Tensor, S4DState]:
        exponent, write, read = self._discrete()
        modes = exponent.exp() * state.modes + write * x[..., None]
        return self._mix(x, 2 * (read * modes).real.sum(-1)), S4DState(modes)

    def prefill(self, x: Hidden, state: S4DState, context: Context) -> tuple[Hidden, S4DState]:
        exponent, write, read = self._discrete()
        powers = _powers(exponent, x.shape[1])
        mixed = long_convolution(x, _kernel(read * write, exponent, x.shape[1]))
        kept = exponent.exp() * state.modes  # the state that the first token finds
        mixed = mixed + 2 * torch.einsum("bdn,dnt->btd", read * kept, powers).real
        written = write * torch.einsum("btd,dnt->bdn", x.to(powers.dtype), powers.flip(-1))
        return self._mix(x, mixed), S4DState(powers[..., -1] * kept + written)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt A, (exp(dt A) - 1) / A and C, (D, N / 2) each, complex."""
        exact = exact_dtype(self.log_decay)
        rate = torch.complex(-self.log_decay.to(exact).exp(), self.frequency.to(exact))
        exponent = rate * self.log_step.to(exact).exp()[:, None]
        return exponent, exponent.expm1() / rate, torch.view_as_complex(self.read.to(exact))

    def _mix(self, x: Tensor, v: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(v + self.skip * x).to(x.dtype)))


def _kernel(weights: Tensor, exponent: Tensor, time: int) -> Tensor:
    """2 Re sum_n weights_n exp(l exponent_n), (T, D), from (D, N / 2) each.

    Lags are l = c i + j, and exp(l e) = exp(c i e) exp(j e): 2 sqrt(T) powers a mode and a product of real matrices.
    """
    size = math.isqrt(max(time - 1, 0)) + 1  # c, and as many i
    near = torch.view_as_real(_powers(exponent.conj(), size))  # (D, N / 2, c, 2): Re(a b) is a . conj(b)
    far = torch.view_as_real(weights[..., None] * _powers(size * exponent, size))
    with torch.autocast(weights.device.type, enabled=False):
        kernel = 2 * torch.einsum("dnir,dnjr->ijd", far, near)
    return kernel.flatten(0, 1)[:time]


def _powers(exponent: Tensor, count: int) -> Tensor:
    """exp(l exponent) for l below a count, (..., count)."""
    return torch.exp(exponent[..., None] * torch.arange(count, device=exponent.device))
