"""How the causality audit runs a network, a copy in float64 under equal conditions, and finds the module that leaks."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmx.audits.causality_report import Breach
from llmx.audits.draws import LabDraws
from llmx.audits.inputs import chunk_boundaries, largest_prime, random_windows, token_budget
from llmx.audits.network_copies import copy_network, exact_copy, perturbed_copy, seed_cpu
from llmx.audits.rounding import MIN_LOG_PROBABILITY, SAME_SHAPE_TOLERANCE, RoundingWatch, relative_change
from llmx.protocol import Context, Logits, Network, Tokens

MAX_TOKENS = 2048  # in one pass
MAX_WORK = 3e9  # parameters times tokens in one pass
ROWS = 3  # at least
LEVELS = (0.4, 0.1, 0.9)  # of the lab's draws in training, for each length from the longest: some draws may open a leak


class ModuleCall(NamedTuple):
    """One call of a module: its input and output tensors as they were."""

    module: str
    module_class: str
    inputs: list[Tensor]
    outputs: list[Tensor]


Calls = dict[tuple[str, int], ModuleCall]  # by module and number of its call, in the order in which calls end
Pass = Callable[..., Logits]  # AuditedNetwork.run with all arguments but `calls` given
Part = Callable[[Tensor], list[Tensor]]  # what must not change in a tensor; several readings if axes are ambiguous


def record_calls(network: Network, calls: Calls) -> None:
    """Makes every module of a network write its calls into `calls`."""
    names = {module: name for name, module in network.named_modules()}
    entered: list[list[Tensor]] = []
    count: Counter[str] = Counter()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(_tensors((args, kwargs)))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[module]
        outputs = _tensors(output)
        for value in (*args, *kwargs.values()):  # a writer into the context leaks, not its reader
            outputs += _tensors(value) if isinstance(value, Context) else []
        calls[name, count[name]] = ModuleCall(name, type(module).__name__, entered.pop(), outputs)
        count[name] += 1

    for module in names:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)


def _tensors(value: Any) -> list[Tensor]:
    """Copies of the tensors in nested containers and contexts, real and in float64."""
    if isinstance(value, Context):
        return [*_tensors(value.embedding), *_stored(value)]
    if isinstance(value, Tensor):
        real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return [real.detach().to(torch.float64, copy=True)]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


def _stored(context: Context) -> list[Tensor]:
    """Copies of the tensors in the store of a forward pass, which all have a time axis."""
    time = context.tokens.shape[-1]
    stored = _tensors(context.store)
    return [x.expand(len(x), time, *x.shape[2:]) if x.ndim > 1 and x.shape[1] == 1 else x for x in stored]


def first_leaking_module(first: Pass, second: Pass, part: Part, part2: Part, tolerance: float) -> ModuleCall | None:
    """The first module whose output differs between two passes although its inputs agree."""
    calls, calls2 = Calls(), Calls()
    first(calls=calls)
    second(calls=calls2)

    def differ(tensors: list[Tensor], tensors2: list[Tensor]) -> bool:
        for one, two in zip(tensors, tensors2, strict=False):
            pairs = [(a, b) for a, b in product(part(one), part2(two)) if a.shape == b.shape and a.numel()]
            # tensors differ only if every reading does: a wrong reading includes what may change
            if pairs and min(relative_change(a, b).max().item() for a, b in pairs) > tolerance:
                return True
        return False

    both = [(call, calls2[key]) for key, call in calls.items() if key in calls2]
    return next((a for a, b in both if differ(a.outputs, b.outputs) and not differ(a.inputs, b.inputs)), None)


def time_parts(tensor: Tensor, rows: int, length: int, keep: int) -> list[Tensor]:
    """The first `keep` positions of a tensor, time in front; none if it has no time axis."""
    readings = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == length]
    if tensor.ndim and tensor.shape[0] == rows * length:
        readings.append(tensor.unflatten(0, (rows, length)).movedim(1, 0))
    return [reading[:keep] for reading in readings]


def row_parts(tensor: Tensor, rows: int, keep: list[int]) -> list[Tensor]:
    """The rows `keep` of a tensor, rows in front; none if it has no batch axis."""
    readings = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == rows]
    if tensor.ndim and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        readings.append(tensor.unflatten(0, (rows, -1)))
    return [reading[keep] for reading in readings]


class AuditedNetwork:
    """A copy of a network that runs again and again under equal conditions, and what the audit found with it."""

    def __init__(self, network: Network, max_length: int, seed: int, text: Tensor | None):
        self.text = text
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab_size = network.vocab_size
        self.breaches: dict[tuple[str, str], Breach] = {}  # by check and mode
        self.skipped: dict[str, str] = {}  # check -> reason
        self.name = type(network).__name__
        self.budget = token_budget(network, MAX_TOKENS, MAX_WORK)  # tokens in one pass
        longest = min(max_length, max(97, self.budget // 3))
        middle = largest_prime(min(longest, 97)) if longest > 64 else longest
        self.lengths = tuple(sorted({largest_prime(min(longest, 13)), middle, longest}))
        exact = exact_copy(network)
        for scale in (0.1, 0.01, 0.0):  # some networks only stay finite with smaller moves
            self.source = perturbed_copy(exact, scale, self.generator)
            with RoundingWatch() as rounding:
                outputs = self.run(self.tokens(2, longest), LEVELS[0])
            if outputs.isfinite().all():
                break
        self.tolerance = rounding.tolerance
        with LabDraws(LEVELS[0]):  # what initialises itself from its first batch has done so in every copy
            self.source.train()(self.tokens(ROWS, longest))
        # for two passes of equal shape
        self.same_tolerance = self.tolerance if rounding.transforms else min(self.tolerance, SAME_SHAPE_TOLERANCE)

    def fresh_copy(self, training: bool) -> Network:
        """The copy in its first state: it shares the parameters, its buffers, counters and caches are new."""
        return copy_network(self.source, share_parameters=True).train(training)

    def run(
        self,
        tokens: Tokens,
        level: float | None = None,
        after: Sequence[Tokens] = (),
        draw: int = 0,
        calls: Calls | None = None,
    ) -> Logits:
        """(B, T) -> (B, T, V) log probabilities in float64; the logits themselves if some are not finite.

        In training mode with the lab's draws at a level, in evaluation mode without a level. The copy reads the batches
        `after` first. `draw` seeds its random numbers. `calls` receives all modules' calls.
        """
        network = self.fresh_copy(training=level is not None)
        for batch in after:
            network(batch)
        if calls is not None:
            record_calls(network, calls)
        seed_cpu(draw)
        with nullcontext() if level is None else LabDraws(level):
            outputs = network(tokens.clone()).double()
        return outputs.log_softmax(-1).clamp(min=MIN_LOG_PROBABILITY) if outputs.isfinite().all() else outputs

    def tokens(self, rows: int, length: int) -> Tokens:
        """Random tokens; every other row is text."""
        tokens = torch.randint(self.vocab_size, (rows, length), generator=self.generator)
        if self.text is not None and len(self.text) >= length:
            tokens[1::2] = random_windows(self.text, rows // 2, length, self.generator)
        return tokens

    def replaced(self, tokens: Tokens) -> Tokens:
        """Another token at every place; needs a vocabulary of 2."""
        shift = torch.randint(1, self.vocab_size, tokens.shape, generator=self.generator)
        other = self.tokens(*tokens.shape)
        return torch.where(other == tokens, (tokens + shift) % self.vocab_size, other)

    def cuts(self, length: int, most: int) -> Tensor:
        """Positions from 1 on where the future may begin, one a row (R,), R <= most: all positions, or a sample."""
        rows = max(ROWS, min(most, self.budget // length))
        if length - 1 <= rows:
            return torch.arange(rows) % (length - 1) + 1
        strata = torch.linspace(1, length - 1, rows - rows // 2).long()  # one cut in each, and the last position
        strata[:-1] += (torch.rand(len(strata) - 1, generator=self.generator) * strata.diff()).long()
        return torch.cat((strata, torch.tensor(chunk_boundaries(length, rows // 2))))


class AuditCase:
    """One length in one mode: a few rows of tokens, and the network's outputs for them."""

    def __init__(self, network: AuditedNetwork, length: int, training: bool):
        self.network = network
        self.length = length
        self.training = training
        self.mode = "train" if training else "eval"
        levels = dict(zip(reversed(network.lengths), LEVELS, strict=False))
        self.run = partial(network.run, level=levels[length] if training else None)
        self.rows = ROWS if length != ROWS else ROWS + 1  # rows and time must differ in size, to tell their axes apart
        self.tokens = network.tokens(self.rows, length)
        self.outputs = self.run(self.tokens)

    @cached_property
    def draws(self) -> bool:
        """Whether the network draws random numbers that are not the lab's: a pass of another shape draws others."""
        return not torch.equal(self.outputs, self.run(self.tokens, draw=1))

    def found(self, check: str) -> bool:
        return (check, self.mode) in self.network.breaches

    def skip(self, check: str, reason: str) -> None:
        self.network.skipped.setdefault(check, reason)

    def breached(
        self,
        check: str,
        change: Tensor,
        changed: int,
        first: Pass,
        second: Pass,
        part: Part,
        part2: Part | None = None,
        tolerance: float | None = None,
    ) -> bool:
        """Whether `change` (rows, positions, V) is a breach. Records it then. Without `part2` the shapes are equal."""
        if tolerance is None:
            tolerance = self.network.same_tolerance if part2 is None else self.network.tolerance
        if change.max() <= tolerance:
            return False
        culprit = first_leaking_module(first, second, part, part2 or part, tolerance)
        self.record(check, culprit, int(change.amax((0, 2)).argmax()), changed, change.max().item())
        return True

    def record(self, check: str, culprit: ModuleCall | None, position: int, changed: int, size: float) -> None:
        module, kind = (culprit.module, culprit.module_class) if culprit else ("", self.network.name)
        self.network.breaches[check, self.mode] = Breach(
            check, self.mode, self.length, module or kind, kind, position, changed, size
        )
