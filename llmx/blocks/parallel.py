"""Mixer and feed-forward side by side (GPT-J; PaLM, arXiv 2204.02311): x + mixer(h) + feed_forward(h), h = norm(x).

One norm and one residual addition a layer, and the two branches can run at once; the feed-forward does not see what
the mixer of its own layer found.
"""

from collections.abc import Callable

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import FeedForward, Mixer, Run, Site


class ParallelBlock(ResidualBlock):
    """Both branches read the same normalised stream.

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
        self.norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Run, feed: Run) -> Tensor:
        h = self.norm(x)
        return x + mix(h) + feed(h)
