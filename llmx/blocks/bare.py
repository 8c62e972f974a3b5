"""The block of the classical recurrent language model (arXiv 1409.2329): x = dropout(mixer(x)), and nothing else.

No residual, no norm, no feed-forward: what LSTMs were stacked with before residual streams, and what keeps a floor a
floor, for a residual around an LSTM is already another architecture.
"""

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from llmx.feedforward.none import NoFeedForward
from llmx.protocol import Block, Context, Hidden, Mixer, Site, State, Stateful


class BareBlock(Block):
    """The mixer alone. Its state is the mixer's.

    Args:
        site: where the block stands.
        mixer: factory of the token mixer.
        dropout: probability of dropping a number of the output, in training.
    """

    def __init__(self, site: Site, mixer: Callable[[Site], Mixer], dropout: float = 0.0):
        super().__init__()
        self.mixer = site.place(mixer)
        self.feed_forward = NoFeedForward(site)  # for whoever describes the network
        self.dropout = dropout

    @property
    def stateful(self) -> bool:
        return isinstance(self.mixer, Stateful)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return F.dropout(self.mixer(x, context), self.dropout, self.training and self.dropout > 0)

    def init_state(self, batch_size: int, max_length: int) -> State:
        return cast(Stateful, self.mixer).init_state(batch_size, max_length)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return cast(Stateful, self.mixer).step(x, state, context)

    def prefill(self, x: Hidden, state: State, context: Context) -> tuple[Hidden, State]:
        return cast(Stateful, self.mixer).prefill(x, state, context)
