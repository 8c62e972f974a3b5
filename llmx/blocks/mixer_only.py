"""A pre-norm residual block without a feed-forward: x + mixer(norm(x)), as Mamba is stacked (arXiv 2312.00752).

For mixers that widen the stream and gate it themselves: one norm and one residual addition a layer, and twice the
layers for the same parameters. State: the mixer's. The trap: the usual block with nothing in its second slot keeps a
second norm, whose weights no gradient ever reaches.
"""

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from llmx.feedforward.none import NoFeedForward
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import Block, Context, Hidden, Mixer, Site, State, Stateful


class MixerOnlyBlock(Block):
    """Norm, mixer, residual. Its state is the mixer's.

    Args:
        site: where the block stands.
        mixer: factory of the token mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of the branch before it is added, in training.
    """

    def __init__(
        self,
        site: Site,
        mixer: Callable[[Site], Mixer],
        norm: Callable[[int], Norm] = RMSNorm,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.mixer = site.place(mixer)
        self.feed_forward = NoFeedForward(site)  # for whoever describes the network
        self.norm = norm(site.dim)
        self.dropout = dropout

    @property
    def stateful(self) -> bool:
        return isinstance(self.mixer, Stateful)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return x + F.dropout(self.mixer(self.norm(x), context), self.dropout, self.training and self.dropout > 0)

    def init_state(self, batch_size: int, max_length: int) -> State:
        return cast(Stateful, self.mixer).init_state(batch_size, max_length)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        branch, state = cast(Stateful, self.mixer).step(self.norm(x), state, context)
        return x + branch, state

    def prefill(self, x: Hidden, state: State, context: Context) -> tuple[Hidden, State]:
        branch, state = cast(Stateful, self.mixer).prefill(self.norm(x), state, context)
        return x + branch, state
