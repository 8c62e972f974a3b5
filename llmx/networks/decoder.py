"""The decoder: embedding, a stack of blocks, norm, head. Everything that makes it one architecture or another is in
the block that is given to it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmx.parts.init import normal_
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import Block, Context, Network, Site, State
from llmx.shapes import Hidden, Logits, Tokens


class DecoderState(NamedTuple):
    position: Tensor  # (B,) int64, of the next token
    blocks: tuple[State, ...]


class Decoder(Network):
    """Tokens (B, T) -> logits (B, T, V).

    Args:
        vocab_size: V, given by the tokenizer.
        dim: width of the residual stream.
        depth: number of blocks.
        block: factory of one block, called once a layer with its `Site`.
        norm: factory of the last norm, from `dim`.
        dropout: probability of dropping a number of the embedding, in training.
        tied: the head uses the embedding's weights.
        head_bias: the head has a bias.

    Raises:
        ValueError: for a width or depth below 1.
    """

    def __init__(
        self,
        vocab_size: int,
        block: Callable[[Site], Block],
        dim: int = 128,
        depth: int = 4,
        norm: Callable[[int], Norm] = RMSNorm,
        dropout: float = 0.0,
        tied: bool = False,
        head_bias: bool = False,
    ):
        super().__init__()
        if dim < 1 or depth < 1:
            raise ValueError(f"{'dim' if dim < 1 else 'depth'}: {min(dim, depth)} is below 1")
        self.vocab_size = vocab_size
        self.dropout = dropout
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(vocab_size, dim)
        normal_(self.embedding)
        ground = Site(dim=dim, depth=depth)
        sites = (Site(dim=dim, layer=layer, depth=depth, census=ground.census) for layer in range(depth))
        self.blocks = nn.ModuleList(site.place(block) for site in sites)
        self.norm = norm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=head_bias)
        normal_(self.head)
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def layers(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.blocks)

    @property
    def stateful(self) -> bool:
        return all(block.stateful for block in self.layers)

    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        x = self._embed(tokens)
        context = Context(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], x)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.norm(x), context

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def init_state(self, batch_size: int, max_length: int) -> DecoderState:
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.embedding.weight.device)
        return DecoderState(position, tuple(block.init_state(batch_size, max_length) for block in self.layers))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:  # type: ignore[override]
        x = self._embed(tokens)
        context = Context(tokens, state.position, x)
        states = []
        for block, block_state in zip(self.layers, state.blocks, strict=True):
            x, block_state = block.step(x, block_state, context)
            states.append(block_state)
        return self.logits(self.norm(x)), DecoderState(state.position + 1, tuple(states))

    def prefill(self, tokens: Tokens, state: DecoderState) -> tuple[Logits, DecoderState]:  # type: ignore[override]
        time = tokens.shape[1]
        x = self._embed(tokens)
        context = Context(tokens, state.position[:, None] + torch.arange(time, device=tokens.device), x)
        states = []
        for block, block_state in zip(self.layers, state.blocks, strict=True):
            x, block_state = block.prefill(x, block_state, context)
            states.append(block_state)
        return self.logits(self.norm(x)), DecoderState(state.position + time, tuple(states))

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.embedding(tokens), self.dropout, self.training and self.dropout > 0)
