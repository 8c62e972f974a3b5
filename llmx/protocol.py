"""The protocol every architecture is written to.

A `Mixer` maps (B, T, D) to (B, T, D) in parallel form, for training. A `StatefulMixer` also has the recurrence: `step`
is the paper's equation for one token and the definition of the mixer; `prefill` takes many tokens from any state, and
any segmentation of a sequence gives the same outputs. A `Block` combines mixer, feed-forward, norm and residual, a
`Network` maps tokens to logits; both have the same methods.

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

The aliases `Tokens`, `Hidden`, `Logits` and `Losses` document a signature; they are not checked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = Tensor  # (B, T) int64
Hidden = Tensor  # (B, T, D)
Logits = Tensor  # (B, T, V)
Losses = Tensor  # (B, T) float32, nats
State = tuple[Any, ...]  # a pytree of tensors, batch first; every mixer defines its own NamedTuple beside itself
IGNORE = -100  # a target that is not counted: padding, or a character that another window counts

Built = TypeVar("Built")
S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Site:
    """Where in a network a component stands.

    `occurrence` is how many components of the same kind stand below: "the first attention" of a hybrid is the one
    with occurrence 0, whatever its layer.
    """

    dim: int
    layer: int = 0
    depth: int = 1
    occurrence: int = 0
    census: Counter[Any] = field(default_factory=Counter, compare=False, repr=False)

    def place(self, factory: Callable[[Site], Built]) -> Built:
        """Builds a component here and tells it its occurrence among those of its kind."""
        kind = factory.func if isinstance(factory, partial) else factory
        occurrence = self.census[kind]
        self.census[kind] += 1
        return factory(replace(self, occurrence=occurrence))


class Context:
    """What crosses layers during one forward pass: made by the network, read and filled by the components.

    tokens:     (B, T), or (B,) in `step`
    positions:  (B, T), or (1, T) where all rows agree, or (B,) in `step`; counted from 0
    embedding:  (B, T, D), or (B, D) in `step`: the stream that enters the first block
    store:      named tensors for other layers (the value residual, rotary tables), each (B, T, ...) or (1, T, ...),
                and without T in `step`
    auxiliary:  scalar, the sum of the auxiliary losses (nats per token) that the components added; for training,
                where `forward` runs
    """

    def __init__(self, tokens: Tensor, positions: Tensor, embedding: Tensor):
        self.tokens = tokens
        self.positions = positions
        self.embedding = embedding
        self.store: dict[str, Tensor] = {}
        self.auxiliary: Tensor = embedding.new_zeros((), dtype=torch.float32)

    def add_loss(self, loss: Tensor) -> None:
        self.auxiliary = self.auxiliary + loss

    def at(self, where: int | slice) -> Context:
        """The context of the single token at an index, for `step`, or of a piece."""
        part = Context(self.tokens[:, where], self.positions[:, where], self.embedding[:, where])
        part.store = {name: value[:, where] for name, value in self.store.items()}
        return part


class Component(nn.Module):
    """Any part of a network that has a say in how the optimizer treats it.

    undecayed: names of its parameters that weight decay on matrices leaves alone although they have two dimensions:
        rates and frequencies, which zero is no neutral value of
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    def after_optimizer_step(self) -> None:
        """Called after every update: the place to renormalise a weight, or to move a bias that has no gradient."""


class Mixer(Component, ABC):
    """Mixes information along time. Built by a factory from its `Site`."""

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden:
        """(B, T, D) -> (B, T, D); the output at t depends on inputs up to t only."""


class FeedForward(Component, ABC):
    """Mixes information along channels. Built by a factory from its `Site`."""

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden:
        """(B, T, D) -> (B, T, D); the output at t depends on inputs up to t only."""


class Stateful(ABC, Generic[S]):
    """What a mixer or feed-forward adds to go token by token."""

    @abstractmethod
    def init_state(self, batch_size: int, max_length: int) -> S:
        """The state before the first token, with room for `max_length` tokens where the state grows."""

    @abstractmethod
    def step(self, x: Tensor, state: S, context: Context) -> tuple[Tensor, S]:
        """One token, (B, D) -> (B, D): the recurrence, which defines the component."""

    def prefill(self, x: Hidden, state: S, context: Context) -> tuple[Hidden, S]:
        """Many tokens from any state, (B, T, D) -> (B, T, D). Here a loop over `step`; override it with a fast form."""
        outputs = []
        written: dict[str, list[Tensor]] = {}
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


class StatefulFeedForward(FeedForward, Stateful[S]):
    """A feed-forward that looks at the tokens before, such as RWKV's channel mix, and can go token by token."""


class Stateless(StatefulFeedForward[tuple[()]]):
    """A feed-forward that treats each position alone, as most do: `forward` is all there is to write."""

    def init_state(self, batch_size: int, max_length: int) -> tuple[()]:
        return ()

    def step(self, x: Tensor, state: tuple[()], context: Context) -> tuple[Tensor, tuple[()]]:
        whole = Context(context.tokens[:, None], context.positions[:, None], context.embedding[:, None])
        whole.store = {name: value[:, None] for name, value in context.store.items()}
        output = self(x[:, None], whole)[:, 0]
        context.store.update({name: value[:, 0] for name, value in whole.store.items()})
        return output, state

    def prefill(self, x: Hidden, state: tuple[()], context: Context) -> tuple[Hidden, tuple[()]]:
        return self(x, context), state


class Pointwise(Stateless):
    """One whose `forward` takes any (..., D), and looks at nothing else than x: a step is the same call."""

    def step(self, x: Tensor, state: tuple[()], context: Context) -> tuple[Tensor, tuple[()]]:
        return self(x, context), state


class Block(Component, ABC):
    """Mixer, feed-forward, norm and residual: one layer of a stack. Its state is the pair of its components' states."""

    mixer: Mixer
    feed_forward: FeedForward

    @property
    def stateful(self) -> bool:
        """Whether `init_state`, `prefill` and `step` exist."""
        return False

    @abstractmethod
    def forward(self, x: Hidden, context: Context) -> Hidden: ...

    def init_state(self, batch_size: int, max_length: int) -> State:
        raise TypeError(f"{type(self).__name__} has no state")

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        raise TypeError(f"{type(self).__name__} has no state")

    def prefill(self, x: Hidden, state: State, context: Context) -> tuple[Hidden, State]:
        raise TypeError(f"{type(self).__name__} has no state")


class Embedding(Component, ABC):
    """Tokens to vectors. Built by a factory from `vocab_size` and `dim`."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """(V, D), which a tied head uses too."""

    @abstractmethod
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) or (B,), positions that broadcast to them -> (..., D)"""


class Head(Component, ABC):
    """Vectors to logits. Built by a factory from `dim` and `vocab_size`."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""

    @abstractmethod
    def tie(self, weight: Tensor) -> None:
        """Uses the embedding's weights (V, D)."""

    def auxiliary(self, hidden: Hidden, targets: Tokens) -> Tensor | None:
        """A loss in nats per token beside that of the next token, for training alone; None where there is none."""
        return None

    @property
    def drafts(self) -> int:
        """How many tokens after the next one it predicts too."""
        return 0

    def ahead(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., 1 + drafts, V): the logits of the next token and of those after it."""
        return self(hidden)[..., None, :]


Run = Callable[[Tensor], Tensor]


def advancing(form: Callable[..., tuple[Tensor, State]], before: State, context: Context, after: list[State]) -> Run:
    """A `step` or `prefill` as a function of x alone, from the state `before`; appends the state that follows."""

    def run(x: Tensor) -> Tensor:
        output, state = form(x, before, context)
        after.append(state)
        return output

    return run


class Stack(Component, ABC):
    """How the blocks are wired. Built by a factory from the `Site` of the ground, which has `dim` and `depth`."""

    def __init__(self, site: Site):
        super().__init__()
        self.depth = site.depth

    def order(self) -> Sequence[int]:
        """The indices of the blocks in the order in which they run; a block may run more than once."""
        return range(self.depth)

    @abstractmethod
    def forward(self, x: Tensor, runs: Sequence[Run]) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, D) -> (B, D) in `step`: calls every one of `runs` once, in their order.

        A run is a block at its turn, in whatever form the network is in.
        """


class Network(nn.Module, ABC):
    """Maps tokens to logits, and owns its loss. The first constructor argument is `vocab_size`."""

    vocab_size: int

    @property
    def stateful(self) -> bool:
        """Whether `init_state`, `prefill` and `step` exist; generation recomputes the prefix otherwise."""
        return False

    @property
    def layers(self) -> Sequence[Block]:
        """The blocks from bottom to top, for whoever describes the network."""
        return ()

    @abstractmethod
    def hidden(self, tokens: Tokens) -> tuple[Hidden, Context]:
        """(B, T) -> what the head reads, (B, T, D), and the context of this pass."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V)."""

    def forward(self, tokens: Tokens) -> Logits:
        """(B, T) -> (B, T, V)"""
        return self.logits(self.hidden(tokens)[0])

    def loss(self, hidden: Hidden, targets: Tokens) -> Losses:
        """The negative log-likelihood of every target, (B, T) in nats, float32; 0 where the target is IGNORE."""
        logits = self.logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(targets.shape)

    def losses(self, tokens: Tokens, targets: Tokens) -> tuple[Losses, Tensor]:
        """What training and evaluation call: the losses of all positions, and the scalar auxiliary loss."""
        hidden, context = self.hidden(tokens)
        return self.loss(hidden, targets), context.auxiliary

    def init_state(self, batch_size: int, max_length: int) -> State:
        raise TypeError(f"{type(self).__name__} has no state")

    def prefill(self, tokens: Tokens, state: State) -> tuple[Logits, State]:
        """(B, T) -> (B, T, V), continuing from any state."""
        raise TypeError(f"{type(self).__name__} has no state")

    @property
    def drafts(self) -> int:
        """How many tokens after the next one `prefill_ahead` predicts too."""
        return 0

    def prefill_ahead(self, tokens: Tokens, state: State, last: int) -> tuple[Tensor, State]:
        """`prefill` that also looks further: (B, T) -> (B, last, 1 + drafts, V), for the last positions alone."""
        raise TypeError(f"{type(self).__name__} predicts no further than the next token")

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """(B,) -> (B, V)"""
        raise TypeError(f"{type(self).__name__} has no state")

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them (arXiv 1604.06174)."""
        raise ValueError(f"{type(self).__name__} has no blocks to checkpoint")

    def after_optimizer_step(self) -> None:
        """Tells every component that the optimizer has made a step."""
        for module in self.modules():
            if isinstance(module, Component):
                module.after_optimizer_step()


class CountingNetwork(Network):
    """A network that learns by counting a text, once, and has neither parameters nor an optimizer."""

    @property
    @abstractmethod
    def learned(self) -> bool:
        """Whether it has counted."""

    @abstractmethod
    def learn(self, tokens: Tensor) -> None:
        """Counts a text, (L,) int64, in place of what was counted before."""


class Schedule(ABC):
    """A learning-rate schedule. Built by a factory from the number of optimizer steps in the run."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The factor on the optimizer's rates at optimizer step `step`, counted from 0."""
