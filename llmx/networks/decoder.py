"""The decoder: embedding, a stack of blocks, norm, head. Its components make it one architecture or another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.blocks.residual import Advance, fill_in, kept, recomputed
from llmx.networks.embeddings import TokenEmbedding
from llmx.networks.heads import LinearHead
from llmx.networks.stacks import Sequential
from llmx.parts.checks import check_sizes
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import Block, Context, Embedding, Head, Hidden, Logits, Losses, Network, Site, Stack, State, Tokens


class DecoderState(NamedTuple):
    position: Tensor  # (B,) int64, of the next token
    blocks: tuple[State, ...]  # one a call of a block


class Decoder(Network[DecoderState]):
    """Tokens (B, T) -> logits (B, T, V).

    Args:
        block: factory of one block. The decoder calls it once a layer, with its `Site`.
        dim: width of the residual stream; at least 1.
        depth: number of blocks; at least 1.
        embedding: factory of the embedding, from `vocab_size` and `dim`.
        stack: factory of the wiring of the blocks, from a `Site` with `dim` and `depth`.
        norm: factory of the last norm, from `dim`.
        head: factory of the head, from `dim` and `vocab_size`.
        tied: the head uses the embedding's weights.
        dropout: probability of dropping a number of the embedding, in training.
    """

    def __init__(
        self,
        vocab_size: int,
        block: Callable[[Site], Block],
        dim: int = 128,
        depth: int = 4,
        embedding: Callable[[int, int], Embedding] = TokenEmbedding,
        stack: Callable[[Site], Stack] = Sequential,
        norm: Callable[[int], Norm] = RMSNorm,
        head: Callable[[int, int], Head] = LinearHead,
        tied: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(dim=dim, depth=depth)
        self.vocab_size = vocab_size
        self.dropout = dropout
        self.gradient_checkpointing = False
        self.embedding = embedding(vocab_size, dim)
        whole = Site(dim=dim, depth=depth)
        self.blocks = nn.ModuleList(replace(whole, layer=layer).place(block) for layer in range(depth))
        self.stack = stack(whole)
        self.norm = norm(dim)
        self.head = head(dim, vocab_size)
        if tied:
            self.head.tie(self.embedding.weight)

    @property
    def layers(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.blocks)

    @property
    def stateful(self) -> bool:
        return all(block.stateful for block in self.layers)

    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        context = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])
        fill = recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else kept
        x = self.stack(context.embedding, [fill(block, context) for block in self._in_order])
        return self.norm(x), context

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def losses(self, tokens: Tokens, targets: Tokens) -> tuple[Losses, Tensor]:
        hidden, context = self.hidden(tokens)
        auxiliary = self.head.auxiliary(hidden, targets) if self.training else None
        if auxiliary is not None:
            context.add_loss(auxiliary)
        return self.loss(hidden, targets), context.auxiliary

    def init_state(self, batch_size: int, max_length: int) -> DecoderState:
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.embedding.weight.device)
        return DecoderState(position, tuple(block.init_state(batch_size, max_length) for block in self._in_order))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        hidden, states = self._advance(tokens, state.position, [block.step for block in self._in_order], state)
        return self.logits(hidden), DecoderState(state.position + 1, states)

    def prefill(self, tokens: Tokens, state: DecoderState) -> tuple[Logits, DecoderState]:
        hidden, state = self._prefill(tokens, state)
        return self.logits(hidden), state

    @property
    def drafts(self) -> int:
        return self.head.drafts

    def prefill_ahead(self, tokens: Tokens, state: DecoderState, last: int) -> tuple[Tensor, DecoderState]:
        hidden, state = self._prefill(tokens, state)
        return self.head.ahead(hidden[:, -last:]), state

    def _prefill(self, tokens: Tokens, state: DecoderState) -> tuple[Hidden, DecoderState]:
        time = tokens.shape[1]
        positions = state.position[:, None] + torch.arange(time, device=tokens.device)
        hidden, states = self._advance(tokens, positions, [block.prefill for block in self._in_order], state)
        return hidden, DecoderState(state.position + time, states)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    @property
    def _in_order(self) -> list[Block]:
        return [self.layers[index] for index in self.stack.order()]

    def _advance(
        self, tokens: Tensor, positions: Tensor, advances: Sequence[Advance], state: DecoderState
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Embedding, stack and norm, each block in its `step` or `prefill`."""
        context = self._embed(tokens, positions)
        after: list[State] = []
        calls = [fill_in(*pair, context, after) for pair in zip(advances, state.blocks, strict=True)]
        return self.norm(self.stack(context.embedding, calls)), tuple(after)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Context:
        x = F.dropout(self.embedding(tokens, positions), self.dropout, self.training and self.dropout > 0)
        return Context(tokens, positions, x)
