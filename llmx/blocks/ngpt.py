"""The block of the normalized Transformer, nGPT (arXiv 2410.01131): each branch turns a unit vector towards its output.

    h <- unit(h + a_A * (unit(mixer(h)) - h))           unit(x) = x / |x|
    h <- unit(h + a_M * (unit(feed_forward(h)) - h))

The stream stays on the sphere, and each layer steps along it. The "eigen learning rates" a_A and a_M (D,) are learned
and not negative, start at 0.05 and are stored as 1 / sqrt(D). There is no other norm, not even the network's last one.
Time O(T D), no state beside its components'. The traps: normalise the branch before the difference, or its length sets
the step. h has length 1 from the embedding on, so embedding, head, mixer and feed-forward have to be made for it.
Dropout of the embedding breaks it. Weight decay and warm-up control lengths, fixed here: the paper has neither.
"""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.checks import check_positive
from llmx.parts.norm import LearnedScale, unit_norm
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class NGPTBlock(ResidualBlock):
    """(B, T, D) -> (B, T, D), from unit vectors to unit vectors.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        rate: start of the eigen learning rates; positive.
        dropout: probability of dropping a number of either branch before it is normalised, in training.
    """

    def __init__(
        self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, rate: float = 0.05, dropout: float = 0.0
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        check_positive(rate=rate)
        self.mixer_rate = LearnedScale(site.dim, rate, site.dim**-0.5)
        self.feed_forward_rate = LearnedScale(site.dim, rate, site.dim**-0.5)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = step_towards(x, mix(x), self.mixer_rate())
        return step_towards(x, feed(x), self.feed_forward_rate())


def step_towards(x: Tensor, branch: Tensor, rate: Tensor) -> Tensor:
    """unit(x + |rate| (unit(branch) - x)), all (..., D)."""
    return unit_norm(x + rate.abs() * (unit_norm(branch) - x))
