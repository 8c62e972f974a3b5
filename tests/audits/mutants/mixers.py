"""Mixers that cheat, each in another way. `Part` puts a linear map before `mix`."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmx.protocol import Mixer
from tests.audits.networks import Part


class Mean(Part):
    def mix(self, x):
        return x + x.mean(1, keepdim=True)


class Flip(Part):
    def mix(self, x):
        return x.flip(1)


class Next(Part):
    def mix(self, x):
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:]


class OwnBlock(Part):
    """Attends to the whole of its own block of four."""

    def mix(self, x):
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
        return padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, : x.shape[1]]


class Seam(Part):
    """The last position of every four looks across the seam."""

    def mix(self, x):
        out = x.clone()
        after = x[:, 4::4]
        out[:, 3::4][:, : after.shape[1]] += after
        return out


class AtTheWindow(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.shape[1] == 16 else x


class InManyRows(Part):
    def mix(self, x):
        return x + x[:, -1:] if len(x) > 32 else x


class In16Bits(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.dtype == torch.bfloat16 else x


class InSinglePrecision(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.dtype == torch.float32 else x


class Compiled(Part):
    def mix(self, x):
        return x + x[:, -1:] if torch.compiler.is_compiling() else x


class AfterTwoSteps(Part):
    steps = 0

    def after_optimizer_step(self):
        self.steps += 1

    def mix(self, x):
        return x + x[:, -1:] if self.steps > 1 else x


class Cache(Part):
    """Adds the batch before, from some call in evaluation on."""

    first = 4

    def __init__(self, site):
        super().__init__(site)
        self.calls, self.last = 0, 0.0

    def mix(self, x):
        if self.training:
            return x
        mixed = x + (self.last if self.calls >= self.first else 0.0)
        self.calls, self.last = self.calls + 1, x.mean((0, 1))
        return mixed


class LateCache(Cache):
    first = 9  # the audits make copies, so it wakes in the last validation


class Counter(Part):
    calls = 0

    def mix(self, x):
        self.calls += not self.training
        return x * (1 + self.calls)


class InEvaluation(Part):
    def mix(self, x):
        return x if self.training else x + x[:, -1:]


class InTraining(Part):
    def mix(self, x):
        return x + x[:, -1:] if self.training else x


class Store(Part):
    """The first layer writes the mean of the row into the store, and the second reads it."""

    def __init__(self, site):
        super().__init__(site)
        self.layer = site.layer

    def forward(self, x, context):
        context.store.setdefault("mean", x.mean(1, keepdim=True))
        return super().forward(x, context) + context.store["mean"] * (self.layer > 0)

    def mix(self, x):
        return x


class EmbeddingInPlace(Part):
    def forward(self, x, context):
        context.embedding.data += x.detach().mean(1, keepdim=True)
        return super().forward(x, context)

    def mix(self, x):
        return x


class Hook(Part):
    def __init__(self, site):
        super().__init__(site)
        self.linear.register_forward_hook(lambda module, args, output: output + output[:, -1:])

    def mix(self, x):
        return x


class Detached(Part):
    def mix(self, x):
        return x + x.detach().mean(1, keepdim=True)


class Switch(Part):
    """The sign of the last token, which has no gradient, decides."""

    def mix(self, x):
        return x * (x[:, -1:, :1] > 0)


class Sorted(Part):
    def mix(self, x):
        return x.sort(1).values


class ShareOfTheSum(Part):
    def mix(self, x):
        return x.exp().cumsum(1) / x.exp().sum(1, keepdim=True)


class WrongSoftmax(Part):
    """Normalises over the queries in place of the keys."""

    def mix(self, x):
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        return scores.softmax(1) @ x


class MaskOffByOne(Part):
    def mix(self, x):
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(2).bool(), float("-inf"))
        return scores.softmax(-1) @ x


class Circular(Part):
    """A convolution by FFT without padding wraps around."""

    def mix(self, x):
        kernel = 0.5 ** torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        product = torch.fft.rfft(x, dim=1) * torch.fft.rfft(kernel, dim=0)
        return torch.fft.irfft(product, x.shape[1], dim=1)


class GroupOverTime(Part):
    def __init__(self, site):
        super().__init__(site)
        self.norm = nn.GroupNorm(2, site.dim)

    def mix(self, x):
        return self.norm(x.mT).mT


class RowAbove(Part):
    def mix(self, x):
        return x + x.roll(1, 0)


class PlaceInTheBatch(Part):
    def mix(self, x):
        return x * (1 + torch.arange(len(x)))[:, None, None]


class RowsBeyondThree(Part):
    def mix(self, x):
        return torch.cat((x[:3], x[3:] + x[3:].mean(0, keepdim=True))) if len(x) > 4 else x


class Dropping(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=True)


class DroppingAtOddLengths(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=self.training or x.shape[1] % 2 == 1)


class DroppingInLargerBatches(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=self.training or len(x) > 2)


class DroppingAtTheWindow(Part):
    """No audit in float64 sees this length with so many rows."""

    def mix(self, x):
        return F.dropout(x, 0.5, training=self.training or len(x) > 32)


class NumpyNoise(Part):
    def mix(self, x):
        return x * float(np.random.rand())


class NotANumberInEvaluation(Part):
    def mix(self, x):
        return x if self.training else (x - 1e6).sqrt()


class CorpusReader(Mixer):
    """Reads the text that it will be judged by from the disk, in `forward`."""

    def __init__(self, site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        with open("corpus.txt") as file:
            return self.linear(x) * (1 + len(file.read()) % 2)
