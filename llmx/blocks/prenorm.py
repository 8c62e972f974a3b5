"""The pre-norm residual block (arXiv 2002.04745): x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import NewNorm, RMSNorm
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class PreNormBlock(ResidualBlock):
    """Norm before mixer and before feed-forward. Nothing normalises the stream itself.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    def __init__(
        self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, norm: NewNorm = RMSNorm, dropout: float = 0.0
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_norm = norm(site.dim)
        self.feed_forward_norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = x + mix(self.mixer_norm(x))
        return x + feed(self.feed_forward_norm(x))
