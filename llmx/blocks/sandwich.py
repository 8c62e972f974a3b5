"""Norms on both sides of each branch (peri-norm, arXiv 2502.02732; Gemma 2, arXiv 2408.00118):
x + norm(mixer(norm(x))), then x + norm(feed_forward(norm(x))).

The norm before a branch fixes the size of its input, and the norm after it the size of its output. So the stream grows
at most linearly with depth, whatever the weights do. The trap: behind a zero-initialised output projection, the second
norm divides by rounding errors.
"""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.parts.norm import NewNorm, RMSNorm
from llmx.protocol import Branch, NewFeedForward, NewMixer, Site


class SandwichBlock(ResidualBlock):
    """Norm before and after each branch.

    Args:
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of either branch before its second norm, in training.
    """

    def __init__(
        self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, norm: NewNorm = RMSNorm, dropout: float = 0.0
    ):
        super().__init__(site, mixer, feed_forward, dropout)
        self.mixer_norm = norm(site.dim)
        self.mixer_out_norm = norm(site.dim)
        self.feed_forward_norm = norm(site.dim)
        self.feed_forward_out_norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        x = x + self.mixer_out_norm(mix(self.mixer_norm(x)))
        return x + self.feed_forward_out_norm(feed(self.feed_forward_norm(x)))
