"""Wirings of a decoder's blocks: one after the other, with skips across the middle or from the embedding, or in rounds.

    Sequential      x_{l+1} = f_l(x_l)
    UNet            x_{l+1} = f_l(x_l + w_l y_{L-1-l}) in the upper half, y_l = f_l(x_l) the output of block l
    Looped          x_{r+1} = f(x_r), f the whole stack of L blocks, r < times
    EmbeddingSkip   x_{l+1} = f_l(a_l x_l + b_l x_0), x_0 the embedding

A stack says in `order` which block is called when. Each call has its own state, not each block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmx.parts.checks import check_sizes
from llmx.protocol import BlockCall, Site, Stack


class Sequential(Stack):
    """One block after the other."""

    def forward(self, x: Tensor, blocks: Sequence[BlockCall]) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


class UNet(Stack):
    """Each block of the upper half also reads the output of its mirror image below, times a learned number.

    These are the skips of U-ViT (arXiv 2209.12152), as modded-nanogpt has them in a language model: a sum with one
    weight a skip, 1 at the start. Block l of the lower half belongs to block L - 1 - l. With an odd depth the middle
    block has no skip. No cost, no state. The trap: the upper half meets the outputs in reverse, so the innermost skip
    comes first. With an even depth that skip adds the stream to itself, and is a learned gain. The depth is at least 2.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        if site.depth < 2:
            raise ValueError(f"depth: {site.depth} has no two halves for a U")
        self.weights = nn.Parameter(torch.ones(site.depth // 2))  # from the innermost skip outwards

    def forward(self, x: Tensor, blocks: Sequence[BlockCall]) -> Tensor:
        half = len(self.weights)
        outputs = []
        for block in blocks[:half]:
            x = block(x)
            outputs.append(x)
        for block in blocks[half:-half]:
            x = block(x)
        for block, weight in zip(blocks[-half:], self.weights.to(x.dtype).unbind(), strict=True):
            x = block(x + weight * outputs.pop())
        return x


class Looped(Stack):
    """The whole stack in several rounds with the same weights: depth without parameters.

    This is the plain form of arXiv 2502.17416: Universal Transformers (arXiv 1807.03819) without their signal of the
    round and without halting. It does not add the input again before each round, as arXiv 2409.15647 does. It has the
    parameters of L blocks, and the time, memory and state of L x times. The trap: the rounds share weights and nothing
    else. A shared cache would hold, for every token, the keys of the last round.

    Args:
        times: rounds; at least 1.
    """

    def __init__(self, site: Site, times: int = 2):
        super().__init__(site)
        check_sizes(times=times)
        self.times = times

    def order(self) -> Sequence[int]:
        return [*range(self.depth)] * self.times

    def forward(self, x: Tensor, blocks: Sequence[BlockCall]) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


class EmbeddingSkip(Stack):
    """Every block reads a learned mix of the stream and the embedding (modded-nanogpt), a = 1 and b = 0 at the start.

    Two parameters a block, and no state: `step` has the embedding of its token. The upper layers know the token at a
    position even if the stream does not carry it. Not for hyper-connections, whose stream is wider than the embedding.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(site.depth, 1))  # (L, 2)

    def forward(self, x: Tensor, blocks: Sequence[BlockCall]) -> Tensor:
        embedding = x
        for block, mix in zip(blocks, self.mix.to(x.dtype), strict=True):
            x = block(mix[0] * x + mix[1] * embedding)
        return x
