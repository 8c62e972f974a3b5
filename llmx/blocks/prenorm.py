"""The pre-norm residual block (arXiv 2002.04745): x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from collections.abc import Callable

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import Branch, FeedForward, Mixer, Site


class PreNormBlock(ResidualBlock):
    """Norm before mixer and before feed-forward. Nothing normalises the stream itself.

    Args:
        site: where the block stands.
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    def __init__(
        self,
        site: Site,
        mixer: Callable[[Site], Mixer],
        feed_forward: Callable[[Site], FeedForward],
        norm: Callable[[int], Norm] = RMSNorm,
        dropout: float = 0.0,
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_norm = norm(site.dim)
        self.feed_forward_norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = x + mix(self.mixer_norm(x))
        return x + feed(self.feed_forward_norm(x))
