"""The protocol that every architecture implements.

A `Mixer` maps (B, T, D) to (B, T, D) in parallel form, for training. A `StatefulMixer` also has the recurrence. Its
`step` is the paper's equation for one token and defines the mixer. Its `prefill` takes many tokens from any state, and
any segmentation of a sequence gives the same outputs. A `Block` combines mixer, feed-forward, norm and residual. A
`Network` maps tokens to logits. Both have the same methods.

Dimensions:
    B  batch                     sequences in a batch
    T  time                      positions of a sequence
    S  slots                     positions that a preallocated state has room for
    D  dim                       width of the residual stream
    H  heads                     query heads
    G  kv_heads                  key/value heads (G divides H)
    K  head_dim                  width of one head's query and key
    V  vocabulary                distinct tokens (in a mixer: width of one head's value)
    F  hidden                    width inside a feed-forward
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = Tensor  # (B, T) int64; this and the next three document a signature, and nothing checks them
Hidden = Tensor  # (B, T, D)
Logits = Tensor  # (B, T, V)
Losses = Tensor  # (B, T) float32, nats
State = tuple[Any, ...]  # a pytree of tensors, batch first; each component defines its own NamedTuple beside it
BlockCall = Callable[[Tensor], Tensor]  # a block of the stack, its context and state filled in
Branch = Callable[[Tensor], Tensor]  # the mixer or feed-forward of a block, its context and state filled in
Run = Branch  # the former name, which users' own blocks import
IGNORE = -100  # a target that the loss does not count: padding, or a character that another window counts
Built = TypeVar("Built")
S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Site:
    """Where in a network a component stands.

    `occurrence` counts the components of the same kind below this one: "the first attention" of a hybrid has
    occurrence 0, whatever its layer. All sites of a network share `census`, the components of each kind so far.
    """

    dim: int
    layer: int = 0
    depth: int = 1
    occurrence: int = 0
    census: Counter[Any] = field(default_factory=Counter, compare=False, repr=False)

    def place(self, factory: Callable[[Site], Built]) -> Built:
        """Builds a component here, and tells it its occurrence."""
        kind = factory.func if isinstance(factory, partial) else factory
        self.census[kind] += 1
        return factory(replace(self, occurrence=self.census[kind] - 1))


class Context:
    """What crosses layers during one forward pass. The network makes it, and the components read and fill it.

    tokens:     (B, T), or (B,) in `step`
    positions:  (B, T), or (1, T) where all rows agree, or (B,) in `step`; counted from 0
    embedding:  (B, T, D), or (B, D) in `step`: the stream that enters the first block
    store:      named tensors for other layers (value residual, rotary tables): (B or 1, T, ...), or no T in `step`
    auxiliary:  scalar, the sum of the auxiliary losses (nats per token) that the components add in `forward`
    """

    def __init__(self, tokens: Tensor, positions: Tensor, embedding: Tensor):
        self.tokens, self.positions, self.embedding = tokens, positions, embedding
        self.store: dict[str, Tensor] = {}
        self.auxiliary: Tensor = embedding.new_zeros((), dtype=torch.float32)

    def add_loss(self, loss: Tensor) -> None:
        self.auxiliary = self.auxiliary + loss

    def at(self, where: int | slice | None) -> Context:
        """The context of one token for `step`, or of a slice. None turns the context of a `step` into one of T = 1."""
        piece = Context(self.tokens[:, where], self.positions[:, where], self.embedding[:, where])
        piece.store = {name: value[:, where] for name, value in self.store.items()}
        return piece


class Component(nn.Module):
    """Any module of a network that decides how the optimizer treats it."""

    undecayed: ClassVar[tuple[str, ...]] = ()  # matrices without weight decay: rates, for which zero is not neutral

    def after_optimizer_step(self) -> None:
        """Runs after every optimizer step: renormalises a weight, or moves a bias that has no gradient."""


class Mixer(Component, ABC):
    """Mixes information along time. A factory builds it from its `Site`."""

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden:
        """(B, T, D) -> (B, T, D); the output at t depends on inputs up to t only."""


class FeedForward(Component, ABC):
    """Mixes information along channels. A factory builds it from its `Site`."""

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden:
        """(B, T, D) -> (B, T, D); the output at t depends on inputs up to t only."""


NewMixer = Callable[[Site], Mixer]  # factories, as blocks take them
NewFeedForward = Callable[[Site], FeedForward]


class Stateful(ABC, Generic[S]):
    """The methods with which a mixer or feed-forward goes token by token."""

    @abstractmethod
    def init_state(self, batch_size: int, max_length: int) -> S:
        """The state before the first token. A state that grows has room for `max_length` tokens."""

    @abstractmethod
    def step(self, x: Tensor, state: S, context: Context) -> tuple[Tensor, S]:
        """One token, (B, D) -> (B, D): the recurrence, which defines the component."""

    def prefill(self, x: Hidden, state: S, context: Context) -> tuple[Hidden, S]:
        """Many tokens from any state, (B, T, D) -> (B, T, D). This is a loop over `step`: override it to be fast."""
        outputs, written = list[Tensor](), dict[str, list[Tensor]]()
        for t in range(x.shape[1]):
            here = context.at(t)
            output, state = self.step(x[:, t], state, here)
            outputs.append(output)
            for name in here.store.keys() - context.store.keys():
                written.setdefault(name, []).append(here.store[name])
        context.store.update({name: torch.stack(values, 1) for name, values in written.items()})
        return torch.stack(outputs, 1), state


class StatefulMixer(Mixer, Stateful[S]):
    """A mixer that can also go token by token."""


class PrefillMixer(StatefulMixer[S]):
    """A stateful mixer whose parallel form is its `prefill` from the start of a text, where the state is None."""

    @abstractmethod
    def prefill(self, x: Hidden, state: S | None, context: Context) -> tuple[Hidden, S]: ...

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return self.prefill(x, None, context)[0]


class StatefulFeedForward(FeedForward, Stateful[S]):
    """A feed-forward that looks at earlier tokens, such as RWKV's channel mix, and can go token by token."""


class Stateless(StatefulFeedForward[tuple[()]]):
    """A feed-forward that treats each position alone, as most do. It only has to define `forward`."""

    def init_state(self, batch_size: int, max_length: int) -> tuple[()]:
        return ()

    def step(self, x: Tensor, state: tuple[()], context: Context) -> tuple[Tensor, tuple[()]]:
        whole = context.at(None)
        output = self(x[:, None], whole)[:, 0]
        context.store.update({name: value[:, 0] for name, value in whole.store.items()})
        return output, state

    def prefill(self, x: Hidden, state: tuple[()], context: Context) -> tuple[Hidden, tuple[()]]:
        return self(x, context), state


class Pointwise(Stateless):
    """One whose `forward` takes any (..., D) and reads x alone, so that a step is the same call."""

    def step(self, x: Tensor, state: tuple[()], context: Context) -> tuple[Tensor, tuple[()]]:
        return self(x, context), state


class Block(Component, ABC, Generic[S]):
    """One layer of a stack: mixer, feed-forward, norm and residual."""

    mixer: Mixer
    feed_forward: FeedForward

    @property
    def stateful(self) -> bool:
        """Whether `init_state`, `prefill` and `step` exist."""
        return False

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden: ...

    def init_state(self, batch_size: int, max_length: int) -> S:
        raise TypeError(f"{type(self).__name__} has no state")

    def step(self, x: Tensor, state: S, context: Context) -> tuple[Tensor, S]:
        raise TypeError(f"{type(self).__name__} has no state")

    def prefill(self, x: Hidden, state: S, context: Context) -> tuple[Hidden, S]:
        raise TypeError(f"{type(self).__name__} has no state")


class Embedding(Component, ABC):
    """Maps tokens to vectors. A factory builds it from `vocab_size` and `dim`."""

    @property
    def weight(self) -> Tensor:
        """(V, D), which a tied head uses too. An embedding without a `table` overrides it."""
        return cast(nn.Embedding, self.table).weight

    @abstractmethod
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) or (B,), and positions that broadcast to them -> (..., D)"""


class Head(Component, ABC):
    """Maps vectors to logits. A factory builds it from `dim` and `vocab_size`."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""

    def tie(self, weight: Tensor) -> None:
        """Uses the embedding's weights (V, D). A head without a `linear` overrides it."""
        cast(nn.Linear, self.linear).weight = cast(nn.Parameter, weight)

    def auxiliary(self, hidden: Hidden, targets: Tokens) -> Tensor | None:
        """A further loss for training alone, in nats per token, or None."""
        return None

    @property
    def drafts(self) -> int:
        """How many tokens after the next one it also predicts."""
        return 0

    def ahead(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., 1 + drafts, V): the logits of the next token and of those after it."""
        return self(hidden)[..., None, :]


class Stack(Component, ABC):
    """Wires the blocks of a decoder. A factory builds it from a `Site` with the decoder's `dim` and `depth`."""

    def __init__(self, site: Site):
        super().__init__()
        self.depth = site.depth

    def order(self) -> Sequence[int]:
        """The indices of the blocks in the order of their calls. A block may be called more than once."""
        return range(self.depth)

    @abstractmethod
    def forward(self, x: Tensor, blocks: Sequence[BlockCall]) -> Tensor:
        """(..., D) -> (..., D). Calls each of `blocks` once, in this order; each runs forward, prefill or step."""


class Network(nn.Module, ABC, Generic[S]):
    """Maps tokens to logits. The first constructor argument is `vocab_size`, from the tokenizer."""

    normalized: ClassVar[bool] = False  # whether `forward` gives log-probabilities, which the score checks
    vocab_size: int

    @property
    def stateful(self) -> bool:
        """Whether `init_state`, `prefill` and `step` exist. Without them generation recomputes the prefix."""
        return False

    @property
    def layers(self) -> Sequence[Block]:
        """The blocks from bottom to top, for descriptions of the network."""
        return ()

    @abstractmethod
    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        """(B, T) -> the vectors that the head reads, (B, T, D), and the context of this pass."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V)."""

    def forward(self, tokens: Tokens) -> Logits:
        return self.logits(self.hidden(tokens)[0])

    def loss(self, hidden: Hidden, targets: Tokens) -> Losses:
        """The negative log-likelihood of each target, (B, T) in nats, float32. It is 0 where the target is IGNORE."""
        logits = self.logits(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)

    def losses(self, tokens: Tokens, targets: Tokens) -> tuple[Losses, Tensor]:
        """The objective of training, not a score: the losses of all positions, and the scalar auxiliary loss."""
        hidden, context = self.hidden(tokens)
        return self.loss(hidden, targets), context.auxiliary

    def init_state(self, batch_size: int, max_length: int) -> S:
        raise TypeError(f"{type(self).__name__} has no state")

    def prefill(self, tokens: Tokens, state: S) -> tuple[Logits, S]:
        """(B, T) -> (B, T, V), continuing from any state."""
        raise TypeError(f"{type(self).__name__} has no state")

    @property
    def drafts(self) -> int:
        """How many tokens after the next one `prefill_ahead` also predicts."""
        return 0

    def prefill_ahead(self, tokens: Tokens, state: S, last: int) -> tuple[Tensor, S]:
        """A `prefill` that also predicts the drafts: (B, T) -> (B, last, 1 + drafts, V), for the last positions."""
        raise TypeError(f"{type(self).__name__} predicts no further than the next token")

    def step(self, tokens: Tensor, state: S) -> tuple[Tensor, S]:
        """(B,) -> (B, V)"""
        raise TypeError(f"{type(self).__name__} has no state")

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each block's activations in the backward pass instead of keeping them (arXiv 1604.06174)."""
        raise ValueError(f"{type(self).__name__} has no blocks to checkpoint")

    def after_optimizer_step(self) -> None:
        """Tells every component that the optimizer has made a step."""
        for module in self.modules():
            if isinstance(module, Component):
                module.after_optimizer_step()


class CountingNetwork(Network[S]):
    """A network that learns by counting a text once. It has neither parameters nor an optimizer."""

    @property
    @abstractmethod
    def learned(self) -> bool:
        """Whether it has counted."""

    @abstractmethod
    def learn(self, tokens: Tensor) -> None:
        """Counts a text, (L,) int64, and drops earlier counts."""


class Schedule(ABC):
    """A learning-rate schedule. A factory builds it from the number of optimizer steps in the run."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The factor on the optimizer's rates at optimizer step `step`, counted from 0."""
