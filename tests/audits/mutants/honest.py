"""Honest components that look like cheats. Those of tests/audits/networks.py (HONEST) belong to them too."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmx.networks.decoder import Decoder
from tests.audits.networks import Part


class DroppingInExperts(Part):
    """Each expert drops out as many numbers as it has tokens."""

    def mix(self, x):
        flat = x.flatten(0, 1)
        choice, outputs = flat.argmax(-1) % 2, torch.zeros_like(flat)
        for expert in range(2):
            chosen = choice == expert
            outputs[chosen] = F.dropout(flat[chosen], 0.3, self.training) * (1 + expert)
        return outputs.view_as(x)


class DroppingOfSomeTokens(Part):
    def mix(self, x):
        out, some = x.clone(), x[..., 0] > 0
        out[some] = F.dropout(x[some], 0.3, self.training)
        return out


class StochasticDepth(Part):
    def __init__(self, site):
        super().__init__(site)
        self.seed = site.layer

    def mix(self, x):
        generator = torch.Generator().manual_seed(self.seed)
        return x * (torch.rand((), generator=generator) < 0.8) if self.training else x


class DroppingRows(Part):
    def mix(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1), 0.8)) if self.training else x


class NoisyRouting(Part):
    def mix(self, x):
        scores = x + torch.randn_like(x) if self.training else x
        return x * scores.argmax(-1, keepdim=True)


class FirstBatch(Part):
    """Initialises its scale from the first batch that it trains on."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("scale", torch.zeros(()))

    def mix(self, x):
        if self.training and not self.scale:
            self.scale.copy_(x.detach().abs().mean())
        return x / (self.scale if self.scale else 1)


class MovingStatistics(Part):
    """Normalises by the statistics of earlier batches, and gathers new ones in training."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("square", torch.ones(site.dim))

    def mix(self, x):
        out = x * self.square.rsqrt()
        if self.training:
            self.square = 0.9 * self.square + 0.1 * x.detach().square().mean((0, 1))
        return out


class TopOfThePast(Part):
    """Attends to the two best keys up to itself."""

    def mix(self, x):
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        best = scores.topk(min(2, x.shape[1]), -1)
        return torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1)) @ x


class RunningMaximum(Part):
    def mix(self, x):
        return x.cummax(1).values


class CachedTable(Part):
    """Keeps the table of the longest window so far."""

    table = None

    def mix(self, x):
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.linspace(0, 1, 64)[: x.shape[1], None].to(x)
        return x * self.table[: x.shape[1]].to(x)


class SlidingWindow(Part):
    def mix(self, x):
        return F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)


class TwiceReversed(Part):
    def mix(self, x):
        back = x.flip(1)
        return (back.flip(1).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]).flip(1).flip(1)


class PaddedTo16(Part):
    """Works in chunks of 16 with a mask inside, and drops the padding."""

    def mix(self, x):
        chunks = F.pad(x, (0, 0, 0, -x.shape[1] % 16)).unflatten(1, (-1, 16))
        mask = torch.ones(16, 16, dtype=x.dtype).tril()
        return torch.einsum("ts,bnsd->bntd", mask, chunks).flatten(1, 2)[:, : x.shape[1]] / 16


class StraightThrough(Part):
    def mix(self, x):
        return x + (x.round() - x).detach()


class Rotating(Part):
    """Complex numbers."""

    def mix(self, x):
        angles = torch.arange(x.shape[1])[:, None] * torch.ones(x.shape[-1] // 2)
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class InPlaceOnItsOwn(Part):
    def mix(self, x):
        out = torch.zeros_like(x)
        out[:, 1:] += x[:, :-1]
        out.mul_(0.5).add_(x)
        return out


class InDouble(Part):
    def mix(self, x):
        return x.double().cumsum(1).to(x.dtype) / x.shape[-1]


class Averaged(Part):
    """Keeps a moving average of its own weights, from one optimizer step to the next."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("average", torch.zeros(site.dim, site.dim))

    def after_optimizer_step(self):
        self.average.lerp_(self.linear.weight.detach(), 0.1)

    def mix(self, x):
        return x @ self.average.T + x


class Recomputed(Part):
    def mix(self, x):
        return checkpoint(torch.tanh, x, use_reentrant=False)


class OwnFile(Part):
    """Reads a file of its own, as a table of constants."""

    def __init__(self, site):
        super().__init__(site)
        path = Path("constants.json")
        path.write_text("[0.5]")
        self.constant = json.loads(path.read_text())[0]

    def mix(self, x):
        return x * self.constant


class KeepingItsMap(Part):
    """Keeps its last weights for a picture."""

    def mix(self, x):
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        self.map = scores.softmax(-1)
        return self.map @ x


class Lstm(Part):
    def __init__(self, site):
        super().__init__(site)
        self.lstm = nn.LSTM(site.dim, site.dim, 2, batch_first=True, dropout=0.2)

    def mix(self, x):
        return self.lstm(x)[0]


class Smoothed(Decoder):
    """Trains on smoothed labels."""

    def loss(self, hidden, targets):
        logits = self.logits(hidden).mT.float()
        return F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
