"""Branches with a learned size: LayerScale (CaiT, arXiv 2103.17239) and ReZero (arXiv 2003.04887).

    LayerScale   x + g * branch(norm(x)),   g (D), a number a channel, starting small
    ReZero       x + g branch(x),           g one number a branch, starting at 0, and no norm

Both start a deep stack near the identity, so that gradients pass it unchanged. They add 2 D parameters a layer, or 2,
almost no cost and no state. CaiT starts g at 0.1 up to depth 18, at 1e-5 up to 24 and at 1e-6 beyond. The traps: at
ReZero's start every branch is invisible, and the branches' own weights get no gradient at the first step. A leak or a
dead parameter inside a branch shows only once its weights have moved (the audits move them first). Without a norm the
embedding alone sets the size of the stream, so a standard deviation of 0.02 starves attention and head.
"""

import torch
from torch import Tensor, nn

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import NewNorm, RMSNorm
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class LayerScaleBlock(ResidualBlock):
    """Pre-norm, with a learned gain a channel for each branch.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        start: first value of the gains; 0.1 for depths up to 18 in the paper.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    def __init__(
        self,
        site: Site,
        mixer: NewMixer,
        feed_forward: NewFeedForward,
        norm: NewNorm = RMSNorm,
        start: float = 0.1,
        dropout: float = 0.0,
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_norm = norm(site.dim)
        self.mixer_gain = nn.Parameter(torch.full((site.dim,), start))
        self.feed_forward_norm = norm(site.dim)
        self.feed_forward_gain = nn.Parameter(torch.full((site.dim,), start))

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = x + self.mixer_gain * mix(self.mixer_norm(x))
        return x + self.feed_forward_gain * feed(self.feed_forward_norm(x))


class ReZeroBlock(ResidualBlock):
    """No norm, and one learned gain for each branch, which starts at 0.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    def __init__(self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, dropout: float = 0.0):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_gain = nn.Parameter(torch.zeros(()))
        self.feed_forward_gain = nn.Parameter(torch.zeros(()))

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = x + self.mixer_gain * mix(x)
        return x + self.feed_forward_gain * feed(x)
