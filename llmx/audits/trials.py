"""How the causality audit runs a network: a copy in float64 under equal conditions, one length and mode at a time, and
the search for the module that leaks first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmx.audits.causality_report import TOLERANCE, Breach
from llmx.audits.copies import copy_network, exact_copy, perturbed_copy, seed_cpu
from llmx.protocol import Logits, Network, Tokens

CAST_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}  # where a network casts down inside
SAME_SHAPE_TOLERANCE = 1e-6  # of these, but for FFTs: what has the same shape is rounded in the same way
LEAST = -100.0  # nats; logarithms of probabilities are not told apart below
MAX_ROWS = 32
MAX_TOKENS = 2048  # in one pass
MAX_WORK = 1e10  # parameters times tokens in one pass


class Call(NamedTuple):
    """One call of a module: its input and output tensors as they were."""

    module: str
    module_class: str
    inputs: list[Tensor]
    outputs: list[Tensor]


Calls = dict[tuple[str, int], Call]  # in the order in which the calls end; the int tells calls of one module apart
Pass = Callable[..., Logits]  # Probe.run with all but `calls` given
View = Callable[[Tensor], list[Tensor]]  # the part that must not change; several readings where axes are ambiguous


class Probe:
    """A copy of a network that can be run again and again under equal conditions, and what was found with it."""

    def __init__(self, network: Network, max_length: int, seed: int, text: Tensor | None):
        self.text = text
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab_size = network.vocab_size
        self.breaches: dict[tuple[str, str], Breach] = {}  # by check and mode
        self.skipped: dict[str, str] = {}  # reasons by check
        self.name = type(network).__name__
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.budget = min(MAX_TOKENS, int(MAX_WORK / max(parameters, 1)))  # tokens in one pass
        longest = min(max_length, max(97, self.budget // 3))
        middle = _prime(min(longest, 97)) if longest > 64 else longest
        self.lengths = tuple(sorted({_prime(min(longest, 13)), middle, longest}))
        exact = exact_copy(network)
        for scale in (0.1, 0.01, 0.0):  # less where the network cannot stand it
            self.source = perturbed_copy(exact, scale, self.generator)
            with Casts() as casts:
                outputs = self.run(self.tokens(2, longest), training=True)
            if outputs.isfinite().all():
                break
        self.tolerance = casts.tolerance
        # where shapes are equal
        self.same_tolerance = self.tolerance if casts.transforms else min(self.tolerance, SAME_SHAPE_TOLERANCE)

    def network(self, training: bool) -> Network:
        """The copy in its first state: parameters are shared, and buffers, counters and caches are new."""
        return copy_network(self.source, share_parameters=True).train(training)

    def run(
        self, tokens: Tokens, training: bool, after: Tokens | None = None, draw: int = 0, calls: Calls | None = None
    ) -> Logits:
        """(B, T) -> (B, T, V) in float64.

        `after` goes through the same copy before; `draw` seeds what the network draws; `calls` receives the calls of
        all modules.
        """
        network = self.network(training)
        if after is not None:
            network(after)
        if calls is not None:
            _record(network, calls)
        seed_cpu(draw)
        outputs = network(tokens.clone()).double()
        return outputs.log_softmax(-1).clamp(min=LEAST) if outputs.isfinite().all() else outputs

    def tokens(self, rows: int, length: int) -> Tokens:
        """Every other row is text."""
        tokens = torch.randint(self.vocab_size, (rows, length), generator=self.generator)
        if self.text is not None and len(self.text) >= length:
            tokens[1::2] = windows(self.text, rows // 2, length, self.generator)
        return tokens

    def replaced(self, tokens: Tokens) -> Tokens:
        """Another token everywhere; needs a vocabulary of 2."""
        shift = torch.randint(1, self.vocab_size, tokens.shape, generator=self.generator)
        other = self.tokens(*tokens.shape)
        return torch.where(other == tokens, (tokens + shift) % self.vocab_size, other)

    def cuts(self, length: int) -> Tensor:
        """Positions from 1 on where the future may begin, as many as there are rows to try (R,): all, or a sample."""
        rows = max(2, min(MAX_ROWS, self.budget // length))
        if length - 1 <= rows:
            return torch.arange(rows) % (length - 1) + 1
        strata = torch.linspace(1, length - 1, rows - rows // 2).long()  # one cut in each, and the last position
        strata[:-1] += (torch.rand(len(strata) - 1, generator=self.generator) * strata.diff()).long()
        return torch.cat((strata, torch.tensor(seams(length, rows // 2))))


class Trial:
    """One length in one mode: a few rows of random tokens, and what the network makes of them."""

    def __init__(self, probe: Probe, length: int, training: bool):
        self.probe = probe
        self.length = length
        self.training = training
        self.mode = "train" if training else "eval"
        self.run = partial(probe.run, training=training)
        self.rows = 3 if length != 3 else 4  # so that the axes of rows and of time can be told apart
        self.tokens = probe.tokens(self.rows, length)
        self.outputs = self.run(self.tokens)

    @cached_property
    def draws(self) -> bool:
        """Whether the network draws random numbers: other ones for every shape, so shapes cannot be compared."""
        return not torch.equal(self.outputs, self.run(self.tokens, draw=1))

    def found(self, check: str) -> bool:
        return (check, self.mode) in self.probe.breaches

    def skip(self, check: str, reason: str) -> None:
        self.probe.skipped.setdefault(check, reason)

    def judge(
        self, check: str, change: Tensor, changed: int, first: Pass, second: Pass, view: View, view2: View | None = None
    ) -> bool:
        """Records a breach if two passes differ by `change` (rows, positions, V) in what they must share. They are of
        the same shape where there is no second view."""
        tolerance = self.probe.same_tolerance if view2 is None else self.probe.tolerance
        if change.max() <= tolerance:
            return False
        culprit = self.locate(first, second, view, view2 or view, tolerance)
        self.breach(check, culprit, int(change.amax((0, 2)).argmax()), changed, change.max().item())
        return True

    def breach(self, check: str, culprit: Call | None, position: int, changed: int, size: float) -> None:
        module, kind = (culprit.module, culprit.module_class) if culprit else ("", self.probe.name)
        self.probe.breaches[check, self.mode] = Breach(
            check, self.mode, self.length, module or kind, kind, position, changed, size
        )

    def locate(self, first: Pass, second: Pass, view: View, view2: View, tolerance: float) -> Call | None:
        """The first module whose output differs between two passes although its inputs agree."""
        calls, calls2 = Calls(), Calls()
        first(calls=calls)
        second(calls=calls2)

        def differ(tensors: list[Tensor], tensors2: list[Tensor]) -> bool:
            for one, two in zip(tensors, tensors2, strict=False):
                pairs = [(a, b) for a, b in product(view(one), view2(two)) if a.shape == b.shape and a.numel()]
                # differ however the axes are read: a wrong reading sees what may change
                if pairs and min(change_of(a, b).max().item() for a, b in pairs) > tolerance:
                    return True
            return False

        both = [(call, calls2[key]) for key, call in calls.items() if key in calls2]
        return next((a for a, b in both if differ(a.outputs, b.outputs) and not differ(a.inputs, b.inputs)), None)


# ------------------------------------------------------------------------------------------------------ tokens to try
def seams(length: int, count: int) -> list[int]:
    """Positions below `length` that are multiples of the sizes which chunks have: powers of two first, 8s and 10s."""
    sizes = {size: 4 if size.bit_count() == 1 else 1 for size in range(2, length)}
    missing = {size: weight for size, weight in sizes.items() if weight > 1 or size % 8 == 0 or size % 10 == 0}
    found: list[int] = []
    for _ in range(count):
        weights = np.zeros(length, np.int64)
        for size, weight in missing.items():
            weights[size::size] += weight
        found.append(int(weights[1:].argmax()) + 1)
        missing = {size: weight for size, weight in missing.items() if found[-1] % size}
    return found


def windows(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tokens:
    starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def _prime(limit: int) -> int:
    """The largest prime up to a limit; 1 below 2."""
    return next((n for n in range(limit, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1))), 1)


# -------------------------------------------------------------------------------------------------- what has changed
def change_of(first: Tensor, second: Tensor) -> Tensor:
    """Differences relative to the largest number of all; inf where only one of the two is finite."""
    difference = torch.where(first == second, 0, (first - second).abs().nan_to_num(nan=math.inf))
    scale = first.abs().nan_to_num(0, 0, 0).max()
    return difference / torch.where(scale > 0, scale, 1)


def _record(network: Network, calls: Calls) -> None:
    """Makes every module of a network write down its calls."""
    names = {module: name for name, module in network.named_modules()}
    entered: list[list[Tensor]] = []
    count: Counter[str] = Counter()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(_tensors((args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        calls[name, count[name]] = Call(name, type(module).__name__, entered.pop(), _tensors(output))
        count[name] += 1

    for module in names:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)


def _tensors(value: Any) -> list[Tensor]:
    """Copies of the tensors in nested containers, real and in float64."""
    if isinstance(value, Tensor):
        real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return [real.detach().to(torch.float64, copy=True)]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


class Casts(TorchFunctionMode):
    """Watches for operations that take float64 to a lower precision: their rounding is no leak. And for Fourier
    transforms, by which all numbers are in the rounding of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tolerance = TOLERANCE
        self.transforms = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        self.transforms |= "fft" in name
        target = args[0] if name in ("__setitem__", "copy_") else output
        exact = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
        if exact and isinstance(target, Tensor) and not (name.startswith("new_") or name.endswith("_like")):
            self.tolerance = max(self.tolerance, CAST_TOLERANCE.get(target.dtype, 0))
        return output
