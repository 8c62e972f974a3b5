"""The equivalence audit: `forward`, `prefill` and `step` are one function, in outputs and in gradients.

A network learns in its parallel form and generates in its recurrent form. If the two differ, another network writes
the text than the one that was measured. The audit takes a float64 copy with moved weights and compares the logits of
the parallel form with those of several segmentations of the same tokens: pieces of one token go through `step`, longer
ones through `prefill`. It compares the gradients of all parameters too. For longer windows it compares the outputs
alone over more tokens, to reach longer rings and chunks. The trap: a state can be right for the last token and wrong
for continuing. Only a piece that follows another piece shows that.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmx.audits.network_copies import exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.errors import UserError
from llmx.protocol import Context, Logits, Network, Stateful, Tokens

TOLERANCE = 1e-9  # relative to the largest number: the same sums in another order, with room for long ones
MAX_LENGTH = 37  # tokens: chunks of 16 and 32 have a boundary inside, and a remainder
MAX_LENGTH_WITHOUT_GRADIENTS = 300  # tokens
ROWS = 2


@dataclass(frozen=True)
class Divergence:
    """Two forms that differ. `component` is the dotted name and class of the first mixer or feed-forward whose own
    forms differ; the network's class if each of them is right."""

    what: str  # "outputs", or "gradients of NAME"
    lengths: tuple[int, ...]  # the segmentation that differs from the parallel form
    component: str
    size: float  # the difference, relative to the largest number

    def __str__(self) -> str:
        pieces = "step by step" if set(self.lengths) == {1} else f"in pieces of {', '.join(map(str, self.lengths))}"
        return f"{self.what} differ by {self.size:.2g} (relative) {pieces}; the first that differs is {self.component}"


class Culprit(NamedTuple):
    """The component whose own forms differ, or the network."""

    part: Any
    name: str  # dotted name and class; the network's class
    error: Exception | None = None  # what it raises in pieces
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # (B, T, D) of a piece, and of the parallel form


@dataclass(frozen=True)
class EquivalenceReport:
    """What the equivalence audit found; `skipped` says why it could not run."""

    divergences: tuple[Divergence, ...]
    skipped: str | None
    length: int
    seconds: float

    @property
    def failing(self) -> bool:
        return bool(self.divergences)

    def summary(self) -> str:
        """One line for people."""
        verdict = f"skipped, {self.skipped}" if self.skipped else "forward, prefill and step are one function"
        if self.failing:
            verdict = f"DIFFERENT: {'; '.join(map(str, self.divergences))}"
        return f"forms: length {self.length}, {self.seconds:.1f} s: {verdict}."


def audit_equivalence(network: Network, max_length: int, seed: int = 0) -> EquivalenceReport:
    """Compares the recurrent form of a network with its parallel form, over at most `max_length` tokens, the window.

    The network, in any mode and on any device, and the caller's random state stay as they are. `seed` seeds weights and
    tokens. Raises UserError if the network writes into its state in place while gradients are on, and whatever the
    network raises.
    """
    started = time.perf_counter()
    length = min(max_length, MAX_LENGTH)
    if not network.stateful:
        return EquivalenceReport((), "the network has no recurrent form: it generates by recomputing", length, 0.0)
    with preserve_rng_state():
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            copy = perturbed_copy(exact_copy(network), 0.1, generator).eval().requires_grad_(True)
        seed_cpu(seed)
        tokens = torch.randint(copy.vocab_size, (ROWS, length), generator=generator)
        weights = torch.randn(*tokens.shape, copy.vocab_size, generator=generator, dtype=torch.float64)
        divergences = compare(copy, tokens, weights)
        if not divergences and max_length > length:
            length = min(max_length, MAX_LENGTH_WITHOUT_GRADIENTS)
            tokens = torch.randint(copy.vocab_size, (ROWS, length), generator=generator)
            with torch.no_grad():
                divergences = compare(copy, tokens, None)
    return EquivalenceReport(divergences, None, length, time.perf_counter() - started)


def segmentations(length: int) -> list[tuple[int, ...]]:
    """Ways to cut a sequence: step by step, at once, and continuing from both."""
    cuts = [(1,) * length, (length,), (1, length - 1), (length // 2, 1, length - length // 2 - 1)]
    return [cut for cut in dict.fromkeys(cuts) if min(cut) > 0]


def compare(
    network: Network, tokens: Tokens, weights: Tensor | None, tolerance: float = TOLERANCE
) -> tuple[Divergence, ...]:
    """The first difference in outputs; else, given weights, in the gradients of the outputs times the weights."""
    parameters = {} if weights is None else dict(network.named_parameters())

    def differentiated(logits: Logits) -> tuple[Tensor, dict[str, Tensor]]:
        if weights is None or not parameters:
            return logits.detach(), {}
        total, wanted = (logits * weights).sum(), tuple(parameters.values())
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        return logits.detach(), dict(zip(parameters, gradients, strict=True))

    outputs, gradients = differentiated(network(tokens))
    scale = max((gradient.abs().max().item() for gradient in gradients.values()), default=1.0)
    for lengths in segmentations(tokens.shape[1]):
        try:
            pieces = torch.cat([logits for _, logits in _in_pieces(network, tokens, lengths)], 1)
            outputs2, gradients2 = differentiated(pieces)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise UserError(
                "the recurrent form writes into a tensor that its gradient needs; make a new state, or write in "
                "place only while gradients are off (torch.is_grad_enabled())"
            ) from error
        sizes = {"outputs": _difference(outputs, outputs2, outputs.abs().max().item())}
        sizes |= {f"gradients of {name}": _difference(gradients[name], gradients2[name], scale) for name in parameters}
        worst = max(sizes, key=lambda what: (sizes[what] > tolerance and what == "outputs", sizes[what]))
        if sizes[worst] > tolerance:
            culprit = find_culprit(network, tokens, lengths, tolerance)
            return (Divergence(worst, lengths, culprit.name, sizes[worst]),)
    return ()


def _in_pieces(
    part: Any, x: Tensor, lengths: Sequence[int], context: Context | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The recurrent form of a network, or of a component with its context: each piece of x (B, T, ...), its outputs."""
    state, start = part.init_state(len(x), x.shape[1]), 0
    for length in lengths:
        piece = slice(start, start + length)
        form, where = (part.step, start) if length == 1 else (part.prefill, piece)
        output, state = form(x[:, where], state, *(() if context is None else (context.at(where),)))
        yield piece, output[:, None] if length == 1 else output
        start += length


def _difference(one: Tensor, two: Tensor, scale: float) -> float:
    """The largest difference, relative to `scale`. Equal infinities differ too, unlike in `relative_change`."""
    if one.shape != two.shape:
        return float("inf")
    difference = (one - two).abs().max().item() / (scale or 1.0)
    return difference if difference == difference else float("inf")


@torch.no_grad()
def find_culprit(network: Network, tokens: Tokens, lengths: Sequence[int], tolerance: float) -> Culprit:
    """The first mixer or feed-forward whose output in pieces differs from its own parallel form, or that fails in
    pieces; the network if each of them is right."""
    calls: list[tuple[Any, Tensor, Context, Tensor]] = []
    handles = [
        part.register_forward_hook(lambda part, args, output: calls.append((part, args[0], args[1], output)))
        for block in network.layers
        for part in (block.mixer, block.feed_forward)
        if isinstance(part, Stateful)
    ]
    network(tokens)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in network.named_modules()}
    for part, x, context, output in calls:
        whole = Context(context.tokens, context.positions.expand(len(x), -1), context.embedding)
        whole.store = context.store
        scale, name = output.abs().max().item(), f"{names[part]} ({type(part).__name__})"
        try:
            for at, own in _in_pieces(part, x, lengths, whole):
                if _difference(output[:, at], own, scale) > tolerance:
                    shapes = (tuple(own.shape), tuple(output[:, at].shape))
                    return Culprit(part, name, shapes=None if shapes[0] == shapes[1] else shapes)
        except Exception as error:
            return Culprit(part, name, error=error)
    return Culprit(network, type(network).__name__)
