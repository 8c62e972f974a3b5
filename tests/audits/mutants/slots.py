"""Norms, embeddings, heads, stacks, feed-forwards and blocks that cheat."""

import torch
import torch.nn.functional as F
from torch import nn

from llmx.blocks.prenorm import PreNormBlock
from llmx.networks.embeddings import TokenEmbedding
from llmx.networks.heads import LinearHead
from llmx.parts.norm import Norm
from llmx.protocol import Stack, Stateless


# ---------------------------------------------------------------------------------------------------------------- norms
class OverTime(Norm):
    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean((-2, -1), keepdim=True) + 1e-6).rsqrt()


class OverRows(OverTime):
    def forward(self, x):
        return x * (x.square().mean((0, -1), keepdim=True) + 1e-6).rsqrt()


class OverBoth(OverTime):
    def forward(self, x):
        return x * (x.square().mean() + 1e-6).rsqrt()


class BatchStatistics(Norm):
    """Batch normalisation with the statistics of the batch, in evaluation too."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, track_running_stats=False)

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).view_as(x)


class MovingInEvaluation(Norm):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, x):
        out = x - self.mean
        if not self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.flatten(0, -2).mean(0)
        return out


# ----------------------------------------------------------------------------------------------------------- embeddings
class NextEmbedding(TokenEmbedding):
    def forward(self, tokens, positions):
        x = super().forward(tokens, positions)
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:] if tokens.ndim > 1 else x


class FromTheEnd(TokenEmbedding):
    """Counts positions from the end of the window."""

    def forward(self, tokens, positions):
        x = super().forward(tokens, positions)
        return x * (1 + torch.arange(tokens.shape[1]).flip(0))[:, None] if tokens.ndim > 1 else x


class HashOfTheNext(TokenEmbedding):
    """An n-gram table that begins one token too late."""

    def forward(self, tokens, positions):
        x = super().forward(tokens, positions)
        if tokens.ndim < 2:
            return x
        pairs = (tokens * 31 + tokens.roll(-1, 1)) % self.table.num_embeddings
        return x + self.table(pairs)


class MeanEmbedding(TokenEmbedding):
    def forward(self, tokens, positions):
        x = super().forward(tokens, positions)
        return x - x.mean(1, keepdim=True) if tokens.ndim > 1 else x


# ---------------------------------------------------------------------------------------------------------------- heads
class MeanHead(LinearHead):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-2, keepdim=True))


class ShiftedHead(LinearHead):
    """The logits of the next position, which has seen the answer."""

    def forward(self, hidden):
        return super().forward(hidden).roll(-1, 1)


class HeadOverTime(LinearHead):
    def forward(self, hidden):
        return super().forward(hidden).softmax(1)


# --------------------------------------------------------------------------------------------------------------- stacks
class FeedBack(Stack):
    """A second round reads the mean of the first."""

    def forward(self, x, blocks):
        out = x
        for block in blocks:
            out = block(out)
        for block in blocks:
            x = block(x + out.mean(1, keepdim=True))
        return x


class ByContent(Stack):
    """Sorts the positions by their length before the blocks, and back after them."""

    def forward(self, x, blocks):
        order = x.norm(dim=-1).argsort(1)[..., None].expand_as(x)
        x = x.gather(1, order)
        for block in blocks:
            x = block(x)
        return torch.zeros_like(x).scatter(1, order, x)


class SkipFromTheNext(Stack):
    def forward(self, x, blocks):
        for block in blocks:
            x = block(x) + F.pad(x, (0, 0, 0, 1))[:, 1:]
        return x


# ----------------------------------------------------------------------------------------------- feed-forward and block
class TimeFeedForward(Stateless):
    def __init__(self, site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        return self.linear(x) + x.mean(1, keepdim=True)


class Capacity(TimeFeedForward):
    """Each expert drops the weakest tokens beyond its capacity: later tokens decide."""

    def forward(self, x, context):
        score = x.sum(-1)
        kept = score >= score.median(1, keepdim=True).values
        return self.linear(x) * kept[..., None]


class LeakingResidual(PreNormBlock):
    def connect(self, x, mix, feed):
        return super().connect(x, mix, feed) + (x.mean(1, keepdim=True) if x.ndim > 2 else 0)
