"""A pre-norm residual block without a feed-forward: x + mixer(norm(x)), as Mamba is stacked (arXiv 2312.00752).

It is for mixers that widen the stream and gate it themselves. A layer has one norm and one residual addition, and the
same parameters make twice the layers. State: the mixer's. The trap: a pre-norm block with nothing in its second slot
keeps a second norm, whose weights never get a gradient.
"""

from torch import Tensor

from llmx.blocks.residual import ResidualBlock
from llmx.feedforward.none import NoFeedForward
from llmx.parts.norm import NewNorm, RMSNorm
from llmx.protocol import Branch, NewMixer, Site


class MixerOnlyBlock(ResidualBlock):
    """Norm, mixer, residual.

    Args:
        mixer: factory of the token mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of the branch before it is added, in training.
    """

    def __init__(self, site: Site, mixer: NewMixer, norm: NewNorm = RMSNorm, dropout: float = 0.0):
        super().__init__(site, mixer, NoFeedForward, dropout)
        self.norm = norm(site.dim)

    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        return x + mix(self.norm(x))
