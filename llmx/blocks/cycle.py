"""A hybrid stack: layer n takes the n-th of a list of blocks, over and over."""

from collections.abc import Callable

from torch import Tensor

from llmx.protocol import Block, Context, FeedForward, Hidden, Mixer, Site, State


class Cycle(Block):
    """Holds one block of the list, chosen by its layer.

    Args:
        blocks: factories of blocks; at least one, and their number must divide the depth.
    """

    def __init__(self, site: Site, blocks: list[Callable[[Site], Block]]):
        super().__init__()
        if not blocks or site.depth % len(blocks):
            raise ValueError(f"blocks: a cycle of {len(blocks)} blocks must divide depth {site.depth}")
        self.block = site.place(blocks[site.layer % len(blocks)])

    @property
    def mixer(self) -> Mixer:  # type: ignore[override]  # the inner block registers the module
        return self.block.mixer

    @property
    def feed_forward(self) -> FeedForward:  # type: ignore[override]  # as above
        return self.block.feed_forward

    @property
    def stateful(self) -> bool:
        return self.block.stateful

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self.block(x, context)

    def init_state(self, batch_size: int, max_length: int) -> State:
        return self.block.init_state(batch_size, max_length)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return self.block.step(x, state, context)

    def prefill(self, x: Hidden, state: State, context: Context) -> tuple[Hidden, State]:
        return self.block.prefill(x, state, context)
