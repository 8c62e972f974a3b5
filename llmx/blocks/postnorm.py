"""The post-norm block of the first Transformer (arXiv 1706.03762): norm(x + mixer(x)), then norm(x + feed_forward(x)).

A norm follows every branch, so nothing grows with depth. But every path from the loss to a lower layer crosses norms:
deep stacks need warm-up (arXiv 2002.04745). The last norm of the decoder has to be `NoNorm`.
"""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import LayerNorm, NewNorm
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class PostNormBlock(ResidualBlock):
    """Norm after the addition of each branch.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    def __init__(
        self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, norm: NewNorm = LayerNorm, dropout: float = 0.0
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_norm = norm(site.dim)
        self.feed_forward_norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = self.mixer_norm(x + mix(x))
        return self.feed_forward_norm(x + feed(x))
