"""Hyena of order 2 (arXiv 2302.10866): a convolution as long as the text between two gates, its filter computed.

    q, k, v = short(W x)                                    causal convolutions over 3 tokens, a channel by itself
    u_t = k_t * v_t,    z_t = sum_{s <= t} h_{t-s} * u_s + b * u_t,    y_t = W_o (q_t * z_t)
    h_l = N(phi(l / L)) * (exp(-r l / L) + 0.05)            (D,) for the lag l; r (D,) fixed, fast to slow channels

N is a small network with sines between its layers. It reads phi, the lag and sines and cosines of it. L is
`max_length`: no lag beyond it has a filter. As in the paper's own code the short convolution replaces the filter before
the first gate. Time O(T log T D), memory O(T D). The state grows: a step is a product of the filter with all past u,
O(S D) for a cache of S slots. With the filter, which is cached because N is slow, it is 2 S D + 6 D numbers. The trap:
a product of spectra is a circular convolution, where the end of the text wraps round to its beginning and every
position sees the future. Both sides are padded with zeros to 2 T. Only rounding is left of it, 1e-7 in fp32.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.parts.attention import write
from llmx.parts.checks import check_sizes
from llmx.parts.init import normal_, residual_std
from llmx.parts.long_convolution import long_convolution
from llmx.parts.precision import exact_dtype
from llmx.parts.short_convolution import ShortConvolution
from llmx.protocol import Context, Hidden, Site, StatefulMixer

FASTEST, SLOWEST = math.log(100) / 0.3, math.log(100) / 1.5  # a channel's window is at 1/100 after 0.3 L to 1.5 L
FLOOR = 0.05  # the least of the window


class HyenaState(NamedTuple):
    short: Tensor  # of the short convolution
    past: Tensor  # (B, 1, S, D), u, slot s for position s; written in place while gradients are off
    taps: Tensor  # (B, S, D), h, the same for all rows


class Hyena(StatefulMixer[HyenaState]):
    """(B, T, D) -> (B, T, D). Every form raises ValueError for a sequence longer than `max_length`.

    Args:
        max_length: L, the longest sequence and the unit of lags: weights learned with one L fit no other.
        filter_hidden: width of the network that computes the filter.
        bands: frequencies of the sines and cosines that it reads.
        frequency: where the slopes of its sines start.
    """

    def __init__(
        self, site: Site, max_length: int = 1024, filter_hidden: int = 64, bands: int = 16, frequency: float = 10.0
    ):
        super().__init__()
        check_sizes(max_length=max_length, filter_hidden=filter_hidden, bands=bands)
        self.max_length = max_length
        self.project = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.short = ShortConvolution(3 * site.dim, 3)
        self.filter = ImplicitFilter(site.dim, max_length, filter_hidden, bands, frequency)
        self.skip = nn.Parameter(torch.randn(site.dim))
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project, site.dim**-0.5)  # the output is a product of three: smaller factors would start it near 0
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        self._check(x.shape[1])
        query, u = self._gate(self.short(self.project(x)))
        return self._read(query, u, long_convolution(u, self.filter(x.shape[1])))

    def init_state(self, batch_size: int, max_length: int) -> HyenaState:
        self._check(max_length)
        past = self.out.weight.new_zeros(batch_size, 1, max_length, self.out.in_features)
        taps = self.filter(max_length).expand(batch_size, -1, -1)
        return HyenaState(self.short.init_state(batch_size), past, taps)

    def step(self, x: Tensor, state: HyenaState, context: Context) -> tuple[Tensor, HyenaState]:
        projected, short = self.short.step(self.project(x), state.short)
        query, u = self._gate(projected)
        past = write(state.past, u[:, None, None], context.positions[:, None])
        lags = context.positions[:, None] - torch.arange(past.shape[2], device=x.device)  # (B, S)
        taps = state.taps.gather(1, lags.clamp(min=0)[..., None].expand_as(state.taps))
        mixed = (taps * past[:, 0]).masked_fill(lags[..., None] < 0, 0.0).sum(1)
        return self._read(query, u, mixed), HyenaState(short, past, state.taps)

    def prefill(self, x: Hidden, state: HyenaState, context: Context) -> tuple[Hidden, HyenaState]:
        projected, short = self.short.prefill(self.project(x), state.short)
        query, u = self._gate(projected)
        past = write(state.past, u[:, :, None], context.positions)
        mixed = long_convolution(past[:, 0], state.taps[0])  # (B, S, D)
        here = context.positions[..., None].expand_as(u)
        return self._read(query, u, mixed.gather(1, here)), HyenaState(short, past, state.taps)

    def _gate(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """query and u (..., D)"""
        query, key, value = projected.chunk(3, -1)
        return query, key * value

    def _read(self, query: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        return self.out(query * (mixed + self.skip * u).to(query.dtype))

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"max_length: {length} tokens, and no filter beyond {self.max_length}")


class ImplicitFilter(nn.Module):
    """The taps of all lags from 0 on, from a network that reads the lag; arguments as in `Hyena`."""

    def __init__(self, dim: int, max_length: int, hidden: int, bands: int, frequency: float):
        super().__init__()
        self.max_length = max_length
        self.bands = bands
        self.layers = nn.ModuleList(nn.Linear(width, hidden) for width in (2 * bands + 1, hidden, hidden))
        self.slopes = nn.Parameter(torch.full((hidden,), frequency))
        self.last = nn.Linear(hidden, dim, bias=False)

    def forward(self, length: int) -> Tensor:
        """The lags below `length` -> (length, D), in float32 at least."""
        weight = self.last.weight
        exact = exact_dtype(weight)
        with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):  # meta has no autocast
            lag = torch.arange(length, device=weight.device, dtype=exact)[:, None] / self.max_length
            angle = 2 * math.pi * torch.arange(1, self.bands + 1, device=weight.device, dtype=exact) * lag
            hidden = torch.cat((lag, angle.cos(), angle.sin()), 1)
            for layer in self.layers:
                hidden = torch.sin(self.slopes * layer(hidden))
            rate = torch.linspace(SLOWEST, FASTEST, len(weight), device=weight.device, dtype=exact)
            return self.last(hidden) * (torch.exp(-rate * lag) + FLOOR)
