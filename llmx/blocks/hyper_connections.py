"""Hyper-connections (arXiv 2409.19606): n residual streams in place of one, and learned weights between them.

    h   = sum_i a_i S_i                          the input of a branch, (D), from the streams S (n, D)
    S_j = sum_i A_ij S_i + b_j branch(norm(h))   the streams mix, and the branch writes to each of them

Mixer and feed-forward have a table (n, n + 2) each: a row a stream, the columns a, A and b. It starts as a = e_k with k
the number of the branch modulo n, A = 1, b = 1. The first layer of the stack copies x into the n streams, the last adds
them up. Between the layers tensors are (..., n, D), so all blocks of a stack have to be of this kind. This is the
dynamic form, which the paper recommends: each position adds s tanh(norm(S_i) W) to row i of its table, W (D, n + 2)
from 0. All but the branches treats each position alone: time O(n^2 D) a token, no state, n times the memory of the
stream. The trap: at the start all streams are equal and the network is the pre-norm one. They part only because
different branches read different streams: with more streams than branches, 2 L, some stay copies of each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmx.blocks.residual import ResidualBlock
from llmx.parts.checks import check_sizes
from llmx.parts.norm import NewNorm, RMSNorm
from llmx.parts.precision import at_least_float32
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class Connection(nn.Module, ABC):
    """The weights between the streams and one branch. A factory builds it from `dim`, `streams` and `index`."""

    @abstractmethod
    def forward(self, streams: Tensor) -> Tensor:
        """Streams (..., n, D) -> a table that broadcasts to (..., n, n + 2): the columns a, A and b."""


def first_table(streams: int, index: int) -> Tensor:
    """a = e_k, A = 1, b = 1 as (n, n + 2): the pre-norm residual."""
    read = torch.zeros(streams, 1)
    read[index % streams] = 1.0
    return torch.cat((read, torch.eye(streams), torch.ones(streams, 1)), 1)


class DynamicConnection(Connection):
    """A learned table, to which each position adds s tanh(norm(S_i) W).

    The norm is by root mean square. It has no weights: W would absorb them.

    Args:
        streams: n.
        index: number of the branch, counted through the stack.
        scale: first value of s, which has one number for the columns a and A and one for b.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, streams: int, index: int, scale: float = 0.01, eps: float = 1e-5):
        super().__init__()
        self.streams = streams
        self.eps = eps
        self.table = nn.Parameter(first_table(streams, index).flatten())  # flat: weight decay is for matrices
        self.weigh = nn.Linear(dim, streams + 2, bias=False)
        self.scale = nn.Parameter(torch.full((2,), scale))
        nn.init.zeros_(self.weigh.weight)

    def forward(self, streams: Tensor) -> Tensor:
        exact = at_least_float32(streams)
        size = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)  # (..., n, 1)
        scale = torch.cat((self.scale[:1].expand(self.streams + 1), self.scale[1:]))
        moved = torch.tanh(self.weigh(streams) * size) * scale  # (..., n, n + 2)
        return (self.table.view(self.streams, -1) + moved).to(streams.dtype)


class HyperConnectionBlock(ResidualBlock):
    """Pre-norm branches that read from and write to n residual streams.

    x is (..., D) where it enters the first layer and leaves the last, (..., n, D) between them.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        connection: factory of the weights between streams and branch.
        streams: n; at least 1.
        dropout: probability of dropping a number of either branch before it is written, in training.
    """

    def __init__(
        self,
        site: Site,
        mixer: NewMixer,
        feed_forward: NewFeedForward,
        norm: NewNorm = RMSNorm,
        connection: Callable[[int, int, int], Connection] = DynamicConnection,
        streams: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        check_sizes(streams=streams)
        self.streams = streams
        self.first = site.layer == 0
        self.last = site.layer == site.depth - 1
        self.mixer_norm = norm(site.dim)
        self.mixer_connection = connection(site.dim, streams, 2 * site.layer)
        self.feed_forward_norm = norm(site.dim)
        self.feed_forward_connection = connection(site.dim, streams, 2 * site.layer + 1)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        if self.first:
            x = x[..., None, :].expand(*x.shape[:-1], self.streams, -1)
        x = through(x, self.mixer_connection, lambda h: mix(self.mixer_norm(h)))
        x = through(x, self.feed_forward_connection, lambda h: feed(self.feed_forward_norm(h)))
        return x.sum(-2) if self.last else x


def through(streams: Tensor, connection: Connection, branch: Branch) -> Tensor:
    """Passes streams (..., n, D) through one branch, and returns the streams after it."""
    n = streams.shape[-2]
    read, write = connection(streams).split((n + 1, 1), -1)
    if torch.compiler.is_compiling():  # Inductor fuses a sum, but leaves tiny products to a library
        taken = (read[..., None] * streams[..., None, :]).sum(-3)
    else:
        with torch.autocast(streams.device.type, enabled=False):
            taken = read.transpose(-1, -2) @ streams
    h, mixed = taken.split((1, n), -2)  # (..., 1, D), (..., n, D)
    return mixed + write * branch(h.squeeze(-2))[..., None, :]
