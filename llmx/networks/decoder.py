"""The decoder: embedding, a stack of blocks, norm, head. Everything that makes it one architecture or another is in
the components that are given to it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmx.networks.embeddings import TokenEmbedding
from llmx.networks.heads import LinearHead
from llmx.networks.stacks import Sequential
from llmx.parts.norm import Norm, RMSNorm
from llmx.protocol import (
    Block,
    Context,
    Embedding,
    Head,
    Hidden,
    Logits,
    Losses,
    Network,
    Run,
    Site,
    Stack,
    State,
    Tokens,
    advancing,
)


class DecoderState(NamedTuple):
    position: Tensor  # (B,) int64, of the next token
    blocks: tuple[State, ...]  # one a run of a block


class Decoder(Network):
    """Tokens (B, T) -> logits (B, T, V).

    Args:
        vocab_size: V, given by the tokenizer.
        block: factory of one block, called once a layer with its `Site`.
        dim: width of the residual stream.
        depth: number of blocks.
        embedding: factory of the embedding, from `vocab_size` and `dim`.
        stack: factory of the wiring of the blocks, from the `Site` of the ground.
        norm: factory of the last norm, from `dim`.
        head: factory of the head, from `dim` and `vocab_size`.
        tied: the head uses the embedding's weights.
        dropout: probability of dropping a number of the embedding, in training.

    Raises:
        ValueError: for a width or depth below 1.
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
        if dim < 1 or depth < 1:
            raise ValueError(f"{'dim' if dim < 1 else 'depth'}: {min(dim, depth)} is below 1")
        self.vocab_size = vocab_size
        self.dropout = dropout
        self.gradient_checkpointing = False
        self.embedding = embedding(vocab_size, dim)
        ground = Site(dim=dim, depth=depth)
        sites = (Site(dim=dim, layer=layer, depth=depth, census=ground.census) for layer in range(depth))
        self.blocks = nn.ModuleList(site.place(block) for site in sites)
        self.stack = stack(ground)
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
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self._embed(tokens, positions)
        context = Context(tokens, positions, x)
        x = self.stack(x, [self._run(block, context) for block in self._turns])
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
        return DecoderState(position, tuple(block.init_state(batch_size, max_length) for block in self._turns))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:  # type: ignore[override]
        x = self._embed(tokens, state.position)
        context = Context(tokens, state.position, x)
        x, states = self._advance(x, [block.step for block in self._turns], state, context)
        return self.logits(self.norm(x)), DecoderState(state.position + 1, states)

    def prefill(self, tokens: Tokens, state: DecoderState) -> tuple[Logits, DecoderState]:  # type: ignore[override]
        hidden, state = self._prefill(tokens, state)
        return self.logits(hidden), state

    @property
    def drafts(self) -> int:
        return self.head.drafts

    def prefill_ahead(  # type: ignore[override]
        self, tokens: Tokens, state: DecoderState, last: int
    ) -> tuple[Tensor, DecoderState]:
        hidden, state = self._prefill(tokens, state)
        return self.head.ahead(hidden[:, -last:]), state

    def _prefill(self, tokens: Tokens, state: DecoderState) -> tuple[Hidden, DecoderState]:
        time = tokens.shape[1]
        positions = state.position[:, None] + torch.arange(time, device=tokens.device)
        x = self._embed(tokens, positions)
        context = Context(tokens, positions, x)
        x, states = self._advance(x, [block.prefill for block in self._turns], state, context)
        return self.norm(x), DecoderState(state.position + time, states)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    @property
    def _turns(self) -> list[Block]:
        """The blocks in the order in which they run."""
        return [self.layers[index] for index in self.stack.order()]

    def _run(self, block: Block, context: Context) -> Run:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return lambda x: block(x, context)

        def alone(x: Tensor, store: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            # a context of its own: run again in the backward pass, the block reads what it read, and writes nothing
            own = Context(context.tokens, context.positions, context.embedding)
            own.store = dict(store)
            x = block(x, own)
            written = {name: value for name, value in own.store.items() if value is not store.get(name)}
            return x, written, own.auxiliary

        def run(x: Tensor) -> Tensor:
            x, written, auxiliary = checkpoint(alone, x, dict(context.store), use_reentrant=False)
            context.store.update(written)
            context.add_loss(auxiliary)
            return x

        return run

    def _advance(
        self, x: Tensor, forms: Sequence[Callable[..., tuple[Tensor, State]]], state: DecoderState, context: Context
    ) -> tuple[Tensor, tuple[State, ...]]:
        """The stack, its blocks in their `step` or `prefill` form."""
        after: list[State] = []
        runs = [advancing(form, before, context, after) for form, before in zip(forms, state.blocks, strict=True)]
        x = self.stack(x, runs)
        return x, tuple(after)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return F.dropout(self.embedding(tokens, positions), self.dropout, self.training and self.dropout > 0)
