"""Networks for the tests of the causality audit: honest ones that look guilty, and cheating ones.

The mixers of `TIME_LEAKS` map to the module that the audit must name.
"""

import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.audits.causality_report import CausalityReport
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.protocol import Context, Mixer, Network, Site

VOCAB, DIM = 7, 8
ATTENTION = partial(Attention, heads=2)


def decoder(mixer=ATTENTION, **options) -> Decoder:
    block = partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=16))
    return Decoder(VOCAB, block, dim=DIM, depth=2, **options)


class Part(Mixer):
    """A mixer for one test; `linear` stands before its leak."""

    def __init__(self, site: Site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mix(self.linear(x))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------- honest, and easily accused
class RunningMean(Part):
    def mix(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class CausalConvolution(Part):
    def __init__(self, site):
        super().__init__(site)
        self.convolution = nn.Conv1d(site.dim, site.dim, 3, padding=2)  # its output is two longer than the input

    def mix(self, x):
        return self.convolution(x.mT)[..., : x.shape[1]].mT


class LongConvolution(Part):
    """By FFT, padded: every number in it is rounded with the future in it."""

    def mix(self, x):
        length = x.shape[1]
        kernel = 0.9 ** torch.arange(length, dtype=x.dtype)[:, None]
        product = torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        return torch.fft.irfft(product, 2 * length, dim=1)[:, :length]


class LongConvolutionInFloat32(LongConvolution):
    def mix(self, x):
        return super().mix(x.float()).to(x.dtype)


class Recurrence(Part):
    """Its cell is called once for each position."""

    def __init__(self, site):
        super().__init__(site)
        self.cell = nn.GRUCell(site.dim, site.dim)

    def mix(self, x):
        state, states = x[:, 0] * 0, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state)
        return torch.stack(states, 1)


class Flattening(Part):
    """Treats all tokens as one list, as mixtures of experts do."""

    def mix(self, x):
        flat = self.linear(x.flatten(0, 1))
        best = flat.argmax(-1)
        return (flat * (best % 2)[:, None]).view_as(x)


class CountingInTraining(Part):
    """A buffer and an attribute that every training pass changes, and that later passes read."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("passes", torch.zeros(()))
        self.calls = 0

    def mix(self, x):
        if self.training:
            self.passes += 1
            self.calls += 1
        return x * (1 + self.passes + self.calls)


class DroppingWithAllGenerators(Part):
    def mix(self, x):
        keep = random.random() + np.random.rand() if self.training else 1.0
        return F.dropout(x, 0.5, self.training) * keep


HONEST = [
    ATTENTION,
    RunningMean,
    CausalConvolution,
    LongConvolution,
    LongConvolutionInFloat32,
    Recurrence,
    Flattening,
    CountingInTraining,
    DroppingWithAllGenerators,
]


# ------------------------------------------------------------------------------------------------------------- leaking
class NormOverTime(nn.Module):
    def forward(self, x):
        return x * x.square().mean((1, 2), keepdim=True).rsqrt()


class WithNormOverTime(Part):
    def __init__(self, site):
        super().__init__(site)
        self.norm = NormOverTime()
        self.after = nn.Linear(site.dim, site.dim)

    def mix(self, x):
        return self.after(self.norm(x))


class CentredConvolution(Part):
    def __init__(self, site):
        super().__init__(site)
        self.convolution = nn.Conv1d(site.dim, site.dim, 3, padding=1)

    def mix(self, x):
        return self.convolution(x.mT).mT


class SumFromTheWrongEnd(Part):
    def mix(self, x):
        return x.flip(1).cumsum(1).flip(1)


class ExpertChoice(Part):
    """The expert takes the best half of the tokens of each row: no gradient tells on it."""

    def mix(self, x):
        score = x.detach().sum(-1) + torch.linspace(0, 1e-3, x.shape[1])  # equal tokens are no tie
        chosen = torch.zeros_like(score).scatter(1, score.topk((x.shape[1] + 1) // 2, 1).indices, 1.0)
        return x * chosen[..., None]


class OnlyInTraining(Part):
    def mix(self, x):
        return x + x.mean(1, keepdim=True) if self.training else x


class BehindZeros(Part):
    def __init__(self, site):
        super().__init__(site)
        self.out = nn.Linear(site.dim, site.dim)
        nn.init.zeros_(self.out.weight)

    def mix(self, x):
        return self.out(x.mean(1, keepdim=True).expand_as(x))


class AtOddLengths(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.shape[1] % 2 else x


class AtEvenLengths(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.shape[1] % 2 == 0 else x


class BeyondSixtyFour(Part):
    """The second chunk looks at its own end."""

    def mix(self, x):
        return torch.cat((x[:, :64], x[:, 64:] + x[:, 64:].mean(1, keepdim=True)), 1) if x.shape[1] > 64 else x


class Tiny(Part):
    def mix(self, x):
        return x + 1e-6 * x.mean(1, keepdim=True)


class InPlace(Part):
    def mix(self, x):
        x += x.mean(1, keepdim=True)
        return x


class KnowingTheLength(Part):
    """Replacing the future changes nothing, cutting it off does."""

    def mix(self, x):
        return x * x.shape[1]


TIME_LEAKS = {
    WithNormOverTime: "blocks.0.mixer.norm",
    CentredConvolution: "blocks.0.mixer.convolution",
    SumFromTheWrongEnd: "blocks.0.mixer",
    ExpertChoice: "blocks.0.mixer",
    OnlyInTraining: "blocks.0.mixer",
    BehindZeros: "blocks.0.mixer",
    AtOddLengths: "blocks.0.mixer",
    AtEvenLengths: "blocks.0.mixer",
    BeyondSixtyFour: "blocks.0.mixer",
    Tiny: "blocks.0.mixer",
    InPlace: "blocks.0.mixer",
    KnowingTheLength: "blocks.0.mixer",
}


class NormOverRows(Part):
    """Each position by itself, but over the rows."""

    def mix(self, x):
        return x - x.mean(0, keepdim=True)


class DependingOnTheBatchSize(Part):
    def mix(self, x):
        return x * len(x)


class Remembering(Part):
    """Adds what the last batch was to this one."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("last", torch.zeros(site.dim))

    def mix(self, x):
        mixed = x + self.last
        self.last = x.mean((0, 1)).detach()
        return mixed


class Overflowing(Part):
    def mix(self, x):
        return x / torch.zeros_like(x)


class Bare(Network):
    """Nothing but what `hidden` does."""

    def __init__(self, vocab_size: int = VOCAB):
        super().__init__()
        self.vocab_size = vocab_size

    def hidden(self, tokens):
        x = F.one_hot(tokens, self.vocab_size).double()
        return x, Context(tokens, torch.arange(tokens.shape[1])[None], x)

    def logits(self, hidden):
        return hidden


class LeakingByItself(Bare):
    """The leak stands between its modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(VOCAB, DIM), nn.Linear(DIM, VOCAB)

    def logits(self, hidden):
        x = self.first(hidden)
        return self.second(x + x.mean(1, keepdim=True))


def checks(report: CausalityReport) -> set[str]:
    return {breach.check for breach in report.breaches}
