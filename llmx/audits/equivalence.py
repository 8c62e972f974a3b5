"""The audit of forms: `forward`, `prefill` and `step` are one function, in outputs and in gradients.

What a network learns in its parallel form it has to do in its recurrent form too, or the text it generates is another
network's than the one that was measured. On a float64 copy with its weights moved, the logits of the parallel form are
held against those of several segmentations of the same tokens, pieces of one token going through `step`, longer ones
through `prefill`; and so are the gradients of all parameters. Where the window is longer than that takes, the outputs
alone are held against each other for more tokens, for rings and chunks that are longer. The trap: a state that is right
for the last token and wrong for continuing, which only a piece that follows another piece shows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmx.audits.copies import exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.errors import UserError
from llmx.protocol import Context, Logits, Network, Stateful, Tokens

TOLERANCE = 1e-9  # relative to the largest number: the same sums in another order, with room for long ones
MAX_LENGTH = 37  # tokens: chunked forms of 16 and 32 show a seam, and what is left over
MOST = 300  # tokens, without gradients
ROWS = 2


@dataclass(frozen=True)
class Divergence:
    """Two forms that differ.

    what:       "outputs", or "gradient of NAME"
    lengths:    the segmentation that differs from the parallel form
    component:  dotted name of the first mixer or feed-forward whose own forms differ, and its class; the network's
                class where each of them is right
    size:       the difference, relative to the largest number
    """

    what: str
    lengths: tuple[int, ...]
    component: str
    size: float

    def __str__(self) -> str:
        pieces = "step by step" if set(self.lengths) == {1} else f"in pieces of {', '.join(map(str, self.lengths))}"
        return f"{self.what} differ by {self.size:.2g} (relative) {pieces}; the first that differs is {self.component}"


@dataclass(frozen=True)
class EquivalenceReport:
    """What the audit of forms found; `skipped` says why it could not run."""

    divergences: tuple[Divergence, ...]
    skipped: str | None
    length: int
    seconds: float

    @property
    def failing(self) -> bool:
        return bool(self.divergences)

    def summary(self) -> str:
        """One line for people."""
        head = f"forms: length {self.length}, {self.seconds:.1f} s: "
        if self.skipped:
            return f"{head}skipped, {self.skipped}."
        if not self.failing:
            return f"{head}forward, prefill and step are one function."
        return f"{head}DIFFERENT: {'; '.join(map(str, self.divergences))}."

    def to_dict(self) -> dict[str, Any]:
        return {"failing": self.failing, **asdict(self)}


def audit_equivalence(network: Network, max_length: int, seed: int = 0) -> EquivalenceReport:
    """Holds the recurrent form of a network to its parallel form.

    The network and the caller's random state stay as they are.

    Args:
        network: in any mode, on any device.
        max_length: the window; no more than 37 tokens are tried, 300 without gradients.
        seed: of weights and tokens.

    Raises:
        UserError: for a state that is written in place while its gradient is wanted.
        Exception: whatever the network itself raises.
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
        divergences = _compare(copy, tokens, weights)
        if not divergences and max_length > length:
            length = min(max_length, MOST)
            tokens = torch.randint(copy.vocab_size, (ROWS, length), generator=generator)
            with torch.no_grad():
                divergences = _compare(copy, tokens, None)
    return EquivalenceReport(tuple(divergences), None, length, time.perf_counter() - started)


def segmentations(length: int) -> list[tuple[int, ...]]:
    """Ways to cut a sequence: step by step, at once, and continuing from both."""
    cuts = [(1,) * length, (length,), (1, length - 1), (length // 2, 1, length - length // 2 - 1)]
    return [cut for cut in dict.fromkeys(cuts) if min(cut) > 0]


def _compare(network: Network, tokens: Tokens, weights: Tensor | None) -> list[Divergence]:
    """The first difference, of outputs if there is one; of gradients of outputs times weights, if these are given."""
    parameters = {} if weights is None else dict(network.named_parameters())

    def differentiated(logits: Logits) -> tuple[Tensor, dict[str, Tensor]]:
        if weights is None or not parameters:
            return logits.detach(), {}
        gradients = torch.autograd.grad(
            (logits * weights).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return logits.detach(), dict(zip(parameters, gradients, strict=True))

    outputs, gradients = differentiated(network(tokens))
    scale = max((gradient.abs().max().item() for gradient in gradients.values()), default=1.0)
    for lengths in segmentations(tokens.shape[1]):
        try:
            outputs2, gradients2 = differentiated(_in_pieces(network, tokens, lengths))
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise UserError(
                "the recurrent form writes into a tensor that its gradient is made of; make a new state, or write in "
                "place only while gradients are off (torch.is_grad_enabled())"
            ) from error
        sizes = {"outputs": _difference(outputs, outputs2, outputs.abs().max().item())}
        sizes |= {f"gradients of {name}": _difference(gradients[name], gradients2[name], scale) for name in parameters}
        worst = max(sizes, key=lambda what: (sizes[what] > TOLERANCE and what == "outputs", sizes[what]))
        if sizes[worst] > TOLERANCE:
            return [Divergence(worst, lengths, _culprit(network, tokens, lengths), sizes[worst])]
    return []


def _in_pieces(network: Network, tokens: Tokens, lengths: Sequence[int]) -> Logits:
    state, outputs = network.init_state(len(tokens), tokens.shape[1]), []
    for piece in tokens.split(list(lengths), 1):
        if piece.shape[1] == 1:
            logits, state = network.step(piece[:, 0], state)
            outputs.append(logits[:, None])
        else:
            logits, state = network.prefill(piece, state)
            outputs.append(logits)
    return torch.cat(outputs, 1)


def _difference(one: Tensor, two: Tensor, scale: float) -> float:
    difference = (one - two).abs().max().item() / (scale or 1.0)
    return difference if difference == difference else float("inf")


@torch.no_grad()
def _culprit(network: Network, tokens: Tokens, lengths: Sequence[int]) -> str:
    """The first mixer or feed-forward that gives another output in pieces than its own parallel form gives."""
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
        state = part.init_state(len(x), x.shape[1])
        whole = Context(context.tokens, context.positions.expand(len(x), -1), context.embedding)
        whole.store = context.store
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            if length == 1:
                mixed, state = part.step(x[:, start], state, whole.at(start))
                mixed = mixed[:, None]
            else:
                mixed, state = part.prefill(x[:, piece], state, whole.at(piece))
            if _difference(output[:, piece], mixed, output.abs().max().item()) > TOLERANCE:
                return f"{names[part]} ({type(part).__name__})"
            start += length
    return type(network).__name__
