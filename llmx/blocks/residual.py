"""The base of all residual blocks: their components, and one wiring for `forward`, `step` and `prefill`."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmx.protocol import Block, BlockCall, Branch, Context, Hidden, NewFeedForward, NewMixer, Site, State, Stateful

Advance = Callable[..., tuple[Tensor, State]]  # a `step` or `prefill`


class BlockState(NamedTuple):
    mixer: State
    feed_forward: State = ()  # stays empty in a block that never calls its feed-forward


class ResidualBlock(Block[BlockState]):
    """A block that defines its wiring once, in `connect`, for `forward`, `step` and `prefill` alike."""

    def __init__(self, site: Site, mixer: NewMixer, feed_forward: NewFeedForward, dropout: float = 0.0):
        super().__init__()
        self.mixer = site.place(mixer)
        self.feed_forward = site.place(feed_forward)
        self.dropout = dropout

    @abstractmethod
    def connect(self, x: Tensor, mix: Branch, feed: Branch) -> Tensor:
        """(..., D) -> (..., D): calls `mix` (the mixer) once, then `feed` (the feed-forward) at most once."""

    @property
    def stateful(self) -> bool:
        return isinstance(self.mixer, Stateful) and isinstance(self.feed_forward, Stateful)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self.connect(
            x, lambda h: self._drop(self.mixer(h, context)), lambda h: self._drop(self.feed_forward(h, context))
        )

    def init_state(self, batch_size: int, max_length: int) -> BlockState:
        mixer, feed_forward = self._components()
        return BlockState(mixer.init_state(batch_size, max_length), feed_forward.init_state(batch_size, max_length))

    def step(self, x: Tensor, state: BlockState, context: Context) -> tuple[Tensor, BlockState]:
        mixer, feed_forward = self._components()
        return self._advance(x, state, context, mixer.step, feed_forward.step)

    def prefill(self, x: Hidden, state: BlockState, context: Context) -> tuple[Hidden, BlockState]:
        mixer, feed_forward = self._components()
        return self._advance(x, state, context, mixer.prefill, feed_forward.prefill)

    def _advance(
        self, x: Tensor, state: BlockState, context: Context, mixer: Advance, feed_forward: Advance
    ) -> tuple[Tensor, BlockState]:
        after: list[State] = []
        mix = fill_in(mixer, state.mixer, context, after)
        feed = fill_in(feed_forward, state.feed_forward, context, after)
        return self.connect(x, mix, feed), BlockState(*after)

    def _components(self) -> tuple[Stateful, Stateful]:
        return cast(Stateful, self.mixer), cast(Stateful, self.feed_forward)

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


def kept(block: Block, context: Context) -> BlockCall:
    """Turns a block's `forward` into a function of x alone."""
    return lambda x: block(x, context)


def recomputed(block: Block, context: Context) -> BlockCall:
    """The same, but the backward pass computes the activations again instead of keeping them."""

    def run(x: Tensor, store: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        # the backward pass runs this again: with its own context it reads the same store and writes nothing
        own = Context(context.tokens, context.positions, context.embedding)
        own.store = dict(store)
        x = block(x, own)
        written = {name: value for name, value in own.store.items() if value is not store.get(name)}
        return x, written, own.auxiliary

    def call(x: Tensor) -> Tensor:
        x, written, auxiliary = checkpoint(run, x, dict(context.store), use_reentrant=False)
        context.store.update(written)
        context.add_loss(auxiliary)
        return x

    return call


def fill_in(advance: Advance, before: State, context: Context, after: list[State]) -> BlockCall:
    """Turns a `step` or `prefill` into a function of x alone, from the state `before`. Appends the next state."""

    def call(x: Tensor) -> Tensor:
        output, state = advance(x, before, context)
        after.append(state)
        return output

    return call
