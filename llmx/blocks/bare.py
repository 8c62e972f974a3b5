"""The block of the classical recurrent language model (arXiv 1409.2329): x = dropout(mixer(x)), and nothing else.

It has no residual, no norm and no feed-forward. LSTMs were stacked this way before residual streams, and this block
keeps that baseline as it was: a residual around an LSTM is already another architecture.
"""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.feedforward.none import NoFeedForward
from llmx.protocol import Branch, NewMixer, Site


class BareBlock(ResidualBlock):
    """The mixer alone.

    Args:
        mixer: factory of the token mixer.
        dropout: probability of dropping a number of the output, in training.
    """

    def __init__(self, site: Site, mixer: NewMixer, dropout: float = 0.0):
        super().__init__(site, mixer, NoFeedForward, dropout)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        return mix(x)
