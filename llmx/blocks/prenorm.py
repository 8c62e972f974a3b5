"""The pre-norm residual block (arXiv 2002.04745): x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import Block, Context, Mixer, Site, State, StatefulMixer
from llmx.shapes import Hidden


class BlockState(NamedTuple):
    mixer: State
    feed_forward: State


class PreNormBlock(Block):
    """Norm before each of mixer and feed-forward, the stream itself is never normalised.

    Args:
        site: where the block stands.
        mixer: factory of the token mixer.
        feed_forward: factory of the channel mixer.
        norm: factory of a norm, from `dim`.
        dropout: probability of dropping a number of either branch before it is added, in training.
    """

    mixer: StatefulMixer
    feed_forward: StatefulMixer

    def __init__(
        self,
        site: Site,
        mixer: Callable[[Site], Mixer],
        feed_forward: Callable[[Site], Mixer],
        norm: Callable[[int], Norm] = RMSNorm,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.mixer_norm = norm(site.dim)
        self.mixer = site.place(mixer)  # type: ignore[assignment] # a plain Mixer has forward alone, see Block.stateful
        self.feed_forward_norm = norm(site.dim)
        self.feed_forward = site.place(feed_forward)  # type: ignore[assignment]
        self.dropout = dropout

    @property
    def stateful(self) -> bool:
        return isinstance(self.mixer, StatefulMixer) and isinstance(self.feed_forward, StatefulMixer)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        x = x + self._drop(self.mixer(self.mixer_norm(x), context))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x), context))

    def init_state(self, batch_size: int, max_length: int) -> BlockState:
        return BlockState(
            self.mixer.init_state(batch_size, max_length), self.feed_forward.init_state(batch_size, max_length)
        )

    def step(self, x: Tensor, state: BlockState, context: Context) -> tuple[Tensor, BlockState]:  # type: ignore[override]
        mixed, mixer = self.mixer.step(self.mixer_norm(x), state.mixer, context)
        x = x + mixed
        fed, feed_forward = self.feed_forward.step(self.feed_forward_norm(x), state.feed_forward, context)
        return x + fed, BlockState(mixer, feed_forward)

    def prefill(self, x: Hidden, state: BlockState, context: Context) -> tuple[Hidden, BlockState]:  # type: ignore[override]
        mixed, mixer = self.mixer.prefill(self.mixer_norm(x), state.mixer, context)
        x = x + mixed
        fed, feed_forward = self.feed_forward.prefill(self.feed_forward_norm(x), state.feed_forward, context)
        return x + fed, BlockState(mixer, feed_forward)

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
