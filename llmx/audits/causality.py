"""The causality audit: no output may depend on a later token, nor on another row of the batch.

It works on a copy of the network in float64 on the CPU, where a leak of 1e-9 stands out from rounding, with weights
moved away from their initialisation, because a projection that starts at zero hides whatever leaks behind it. In
training and in evaluation mode, at several lengths (a prime one, and one with more than 64 positions where the window
allows, so that chunked forms show their seams), on random tokens and on text, it asks:

    losses    in evaluation: is the loss what the logits give, the cross-entropy? (for it is logits that are looked at)
    suffix    replace all tokens from some position on: does an output before them change? (leaks without a gradient)
    prefix    cut all tokens off from some position on: does an output before them change? (leaks of the length)
    batch     replace one row, or leave the others out: does an output of another row change?
    memory    in evaluation: does an output depend on the batches that went before, of the same text or another?
    gradient  in evaluation: does an output have a gradient with respect to a later embedding? (tiny, smooth leaks)

and whether all outputs are `finite`. An output is the logarithm of a probability: as a logit, one huge number for what
is no token would make all changes look small. Each pass begins with the same state and the same random draws, so
dropout needs no exception and a counter in training is no leak. The trap: a batch whose rows are changed at different
positions confuses rows with time, so a suspected leak is confirmed on rows that are all changed at the same one.

What a copy in float64 cannot show, `audit_run` looks for: in llmx/audits/running.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmx.audits.probes import copied, exact_copy, perturbed_copy, seed_all, undisturbed
from llmx.errors import UserError
from llmx.protocol import Network
from llmx.shapes import Logits, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKS = ("finite", "losses", "suffix", "prefix", "gradient", "batch", "memory", "run")
TOLERANCE = 1e-9  # relative to the largest output; a convolution by FFT has 4e-16
CAST_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}  # where a network casts down inside
SAME_SHAPE_TOLERANCE = 1e-6  # of these, but for FFTs: what has the same shape is rounded in the same way
LOSS_TOLERANCE = 1e-4  # nats, between a loss in float32 and the cross-entropy
LEAST = -100.0  # nats; logarithms of probabilities are not told apart below
MAX_ROWS = 32
MAX_TOKENS = 2048  # in one pass
MAX_WORK = 1e10  # parameters times tokens in one pass


@dataclass(frozen=True)
class Breach:
    """One way in which the network cheats (or fails, for `finite`).

    check:         one of CHECKS
    mode:          "train" or "eval"
    length:        tokens in a sequence
    module:        dotted name of the first module in forward order that turns unchanged inputs into a changed output;
                   the network's class where it is none of its parts, or not looked for (`losses`, `run`)
    module_class:  its class
    position:      the output position that changed most
    changed:       the first input position that was replaced, cut off, or differentiated by
    size:          the change, relative to the largest output; in nats for `losses`, inf for `finite`
    """

    check: str
    mode: str
    length: int
    module: str
    module_class: str
    position: int
    changed: int
    size: float

    def __str__(self) -> str:
        what = {
            "finite": f"the output at position {self.position} is not finite",
            "losses": f"the loss at position {self.position} is {self.size:.2g} nats away from the cross-entropy of "
            "the logits",
            "run": f"the loss at position {self.position} changed by {self.size:.2g} (relative)",
            "gradient": f"the output at position {self.position} has a gradient of {self.size:.2g} (relative to the "
            f"largest) with respect to the embedding at position {self.changed}",
        }.get(self.check, f"the output at position {self.position} changed by {self.size:.2g} (relative)")
        when = {
            "suffix": f" when only positions from {self.changed} on were replaced",
            "prefix": f" when only positions from {self.changed} on were cut off",
            "batch": " when only other rows of the batch were replaced or left out",
            "memory": " when only the batch before it was another",
            "run": f" when only text from {self.changed} on was replaced, in the run's own precision and on its device",
        }.get(self.check, "")
        where = f"{self.check}, {self.mode} mode, length {self.length}"
        if self.check in ("losses", "run"):  # which look at the whole network alone
            return f"{what}{when} ({where})"
        module = self.module if self.module == self.module_class else f"{self.module} ({self.module_class})"
        fault = "is not finite" if self.check == "finite" else "leaks"
        return f"{what}{when} ({where}); the first module that {fault} is {module}"


@dataclass(frozen=True)
class CausalityReport:
    """What the audit found.

    breaches:   in the order of CHECKS, the first length alone for each check and mode; empty for an honest network
    skipped:    checks that could not run, each with its reason
    lengths:    tokens in the sequences tried
    tolerance:  relative size up to which a change counts as rounding
    influence:  (T, T), norm of the gradient of output t with respect to the embedding at s; None where it was skipped
    seconds:    what the audit took
    """

    breaches: tuple[Breach, ...]
    skipped: tuple[str, ...]
    lengths: tuple[int, ...]
    tolerance: float
    influence: Tensor | None = field(repr=False)
    seconds: float

    @property
    def leaking(self) -> bool:
        return bool(self.breaches)

    def summary(self) -> str:
        """A short paragraph for people."""
        lengths = ", ".join(map(str, self.lengths))
        parts = [f"causality: lengths {lengths}, train and eval, {self.seconds:.1f} s: "]
        parts.append(f"LEAKING: {self.describe()}" if self.leaking else "no leak.")
        if self.skipped:
            parts.append(f" Skipped: {'; '.join(self.skipped)}.")
        if self.tolerance > TOLERANCE:
            parts.append(
                f" The network casts to a lower precision: changes below {self.tolerance:g} count as rounding."
            )
        return "".join(parts)

    __str__ = summary

    def describe(self) -> str:
        """The first breach as a sentence, and who else saw it."""
        others = [f"{breach.check} ({breach.mode})" for breach in self.breaches[1:]]
        return f"{self.breaches[0]}{'; seen too by ' + ', '.join(others) if others else ''}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the record of a run; all but the influence map."""
        return {
            "leaking": self.leaking,
            "breaches": [
                {**asdict(breach), "size": breach.size if math.isfinite(breach.size) else None}
                for breach in self.breaches
            ],
            "skipped": list(self.skipped),
            "lengths": list(self.lengths),
            "tolerance": self.tolerance,
            "seconds": round(self.seconds, 2),
        }


class CausalityError(UserError):
    """A leaking network; carries the `report`."""

    def __init__(self, report: CausalityReport):
        fault = {"finite": "fails", "losses": "cheats"}.get(report.breaches[0].check, "leaks")
        super().__init__(
            f"the network {fault}: {report.describe()} Mend that, or train the network all the same with "
            "`--model.audit warn`, which marks the run as LEAKING."
        )
        self.report = report


def audit_causality(network: Network, max_length: int, seed: int = 0, text: Tensor | None = None) -> CausalityReport:
    """Looks for outputs that depend on later tokens, on other rows, or on earlier batches.

    The network and the caller's random state stay as they are. A network of 10 M parameters takes some seconds.

    Args:
        network: in any mode, on any device.
        max_length: the longest sequence tried; the window. Large networks are tried at less, see the report's lengths.
        seed: of weights, tokens and cuts.
        text: token ids (L,), from which half the rows are taken, for what random tokens never are (a word again, the
            end of a paragraph).

    Raises:
        UserError: for a length below 1.
        Exception: whatever the network's own forward raises.
    """
    if max_length < 1:
        raise UserError(f"data.window: {max_length} tokens are too few to audit a network; give at least 1")
    started = time.perf_counter()
    with undisturbed(), torch.no_grad():
        probe = Probe(network, max_length, seed, text)
        for length in probe.lengths:
            for training in (False, True):
                _audit(Trial(probe, length, training))
        influence = check_gradient(probe)
        return CausalityReport(
            breaches=tuple(sorted(probe.breaches.values(), key=lambda breach: CHECKS.index(breach.check))),
            skipped=tuple(f"{check}: {reason}" for check, reason in probe.skipped.items()),
            lengths=probe.lengths,
            tolerance=probe.tolerance,
            influence=influence,
            seconds=time.perf_counter() - started,
        )


def _audit(trial: Trial) -> None:
    check_finite(trial, trial.tokens, trial.outputs)
    if trial.outputs.isfinite().all():
        check_losses(trial)
        check_batch(trial)
        check_memory(trial)
        check_suffix(trial)
        check_prefix(trial)


# ----------------------------------------------------------------------------------------------------------- the probe
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
        return copied(self.source, share_parameters=True).train(training)

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
        seed_all(draw)
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


# ---------------------------------------------------------------------------------------------------------- the checks
def check_finite(trial: Trial, tokens: Tokens, outputs: Logits) -> None:
    bad = ~outputs.isfinite().all(-1)  # (B, T)
    if not bad.any() or trial.found("finite"):
        return
    calls = Calls()
    trial.run(tokens, calls=calls)
    spoiled = (call for call in calls.values() if not _finite(call.outputs) and _finite(call.inputs))
    trial.breach("finite", next(spoiled, None), int(bad.any(0).int().argmax()), 0, math.inf)


def check_losses(trial: Trial) -> None:
    if trial.training or trial.found("losses"):
        return
    targets = trial.probe.tokens(trial.rows, trial.length)
    network = trial.probe.network(training=False)
    seed_all(0)
    losses = network.losses(trial.tokens.clone(), targets.clone())[0]
    expected = -trial.outputs.gather(-1, targets[..., None])[..., 0]
    # an end of the scale may stand for what is no token
    away = (losses.double().clamp(max=-LEAST) - expected).abs().nan_to_num(nan=math.inf)
    if away.max() > LOSS_TOLERANCE + trial.probe.tolerance * -LEAST:
        trial.breach("losses", None, int(away.amax(0).argmax()), 0, away.max().item())


def check_batch(trial: Trial) -> None:
    """Replaces the middle row; in evaluation, also looks at it alone."""
    if trial.found("batch"):
        return
    one, others = [1], [row for row in range(trial.rows) if row != 1]
    base = partial(trial.run, trial.tokens)
    if trial.probe.vocab_size < 2:
        trial.skip("batch", "a vocabulary of 1 has no other token; rows were left out, but not replaced")
    else:
        tokens = trial.tokens.clone()
        tokens[one] = trial.probe.replaced(tokens[one])
        replaced = partial(trial.run, tokens)
        view = partial(_row_views, rows=trial.rows, keep=others)
        if trial.judge("batch", change_of(trial.outputs, replaced())[others], 0, base, replaced, view):
            return
    if trial.training:
        return
    if trial.draws:
        trial.skip("batch", "the network draws random numbers in eval mode; rows were replaced, but not left out")
        return
    alone = partial(trial.run, trial.tokens[one])
    view, view2 = partial(_row_views, rows=trial.rows, keep=one), partial(_row_views, rows=1, keep=[0])
    trial.judge("batch", change_of(trial.outputs[one], alone()), 0, base, alone, view, view2)


def check_memory(trial: Trial) -> None:
    if trial.training or trial.found("memory"):
        return
    base = partial(trial.run, trial.tokens)
    for before in (trial.probe.tokens(trial.rows, trial.length), trial.tokens):
        again = partial(trial.run, trial.tokens, after=before)
        if trial.judge("memory", change_of(trial.outputs, again()), 0, base, again, _whole):
            return


def check_suffix(trial: Trial) -> None:
    """Every row is cut at a position of its own, all of them in one pass."""
    if trial.found("suffix"):
        return
    if trial.length < 2 or trial.probe.vocab_size < 2:
        trial.skip("suffix", f"a {'window' if trial.length < 2 else 'vocabulary'} of 1 leaves nothing to replace")
        return
    cuts = trial.probe.cuts(trial.length)
    tokens = trial.probe.tokens(len(cuts), trial.length)
    other = trial.probe.replaced(tokens)
    later = torch.arange(trial.length) >= cuts[:, None]  # (R, T)
    outputs = trial.run(tokens)
    check_finite(trial, tokens, outputs)
    change = change_of(outputs, trial.run(torch.where(later, other, tokens))).amax(-1).masked_fill(later, 0)  # (R, T)
    worst = change.amax(1)  # (R,)
    suspects = [row for row in worst.argsort(descending=True).tolist() if worst[row] > trial.probe.same_tolerance]
    for row in suspects[:4]:
        cut, rows = int(cuts[row]), (row + torch.arange(4)) % len(cuts)
        first, second, view = _suffix_passes(trial, tokens[rows], other[rows], cut)
        if trial.judge("suffix", change_of(first(), second())[:, :cut], cut, first, second, view):
            return
    if suspects and not trial.found("batch"):  # else it was another row that changed this one
        row = suspects[0]
        trial.breach("suffix", None, int(change[row].argmax()), int(cuts[row]), worst[row].item())


def check_prefix(trial: Trial) -> None:
    if trial.length < 2:
        trial.skip("prefix", "a window of 1 leaves nothing to cut off")
        return
    if trial.draws:
        trial.skip("prefix", f"the network draws random numbers in {trial.mode} mode, other ones for every length")
        return
    for cut in sorted({1, trial.length // 2, 64, trial.length - 1}):
        if cut < trial.length and not trial.found("prefix"):
            whole, short = partial(trial.run, trial.tokens), partial(trial.run, trial.tokens[:, :cut])
            view = partial(_time_views, rows=trial.rows, length=trial.length, keep=cut)
            view2 = partial(_time_views, rows=trial.rows, length=cut, keep=cut)
            trial.judge("prefix", change_of(trial.outputs[:, :cut], short()), cut, whole, short, view, view2)


def check_gradient(probe: Probe) -> Tensor | None:
    """A row for every position, one backward in eval mode. Returns the influence map (T, T)."""
    trial = Trial(probe, max(1, min(probe.lengths[-1], MAX_ROWS, math.isqrt(probe.budget))), training=False)
    if trial.found("batch") or trial.found("finite"):
        trial.skip("gradient", "it needs finite outputs, and rows that do not influence each other")
        return None
    tokens = trial.tokens[:1].repeat(trial.length, 1)
    projection = torch.randn(trial.outputs.shape[-1], generator=probe.generator, dtype=torch.float64)
    gradients = _gradients(probe.network(training=False), tokens, projection)
    if not gradients:
        trial.skip("gradient", "no gradient leads from the outputs to an nn.Embedding of the tokens")
        return None
    influence = torch.stack([gradient.square().flatten(2).sum(-1) for gradient in gradients]).sum(0).sqrt()  # (T, T)
    bad = ~influence.isfinite()
    if bad.any():
        trial.breach("finite", None, int(bad.any(1).int().argmax()), 0, math.inf)
        return influence
    size = (influence.triu(1).max() / influence.max().clamp_min(torch.finfo().tiny)).item()
    if size > probe.tolerance:
        position, changed = divmod(int(influence.triu(1).argmax()), trial.length)
        culprit = None
        if probe.vocab_size > 1:
            first, second, view = _suffix_passes(trial, tokens[:4], probe.replaced(tokens[:4]), position + 1)
            culprit = trial.locate(first, second, view, view, probe.same_tolerance)
        trial.breach("gradient", culprit, position, changed, size)
    return influence


# ------------------------------------------------------------------------------------------------------ passes, views
def _suffix_passes(trial: Trial, tokens: Tokens, other: Tokens, cut: int) -> tuple[Pass, Pass, View]:
    """All rows are replaced from one and the same position on, so that none can change another before it."""
    changed = torch.where(torch.arange(trial.length) >= cut, other, tokens)
    view = partial(_time_views, rows=len(tokens), length=trial.length, keep=cut)
    return partial(trial.run, tokens), partial(trial.run, changed), view


def _time_views(tensor: Tensor, rows: int, length: int, keep: int) -> list[Tensor]:
    """The first `keep` positions of a tensor, time in front; none where it has no time axis."""
    views = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == length]
    if tensor.ndim and tensor.shape[0] == rows * length:
        views.append(tensor.unflatten(0, (rows, length)).movedim(1, 0))
    return [view[:keep] for view in views]


def _row_views(tensor: Tensor, rows: int, keep: list[int]) -> list[Tensor]:
    """The rows `keep` of a tensor, rows in front; none where it has no batch axis."""
    views = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == rows]
    if tensor.ndim and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        views.append(tensor.unflatten(0, (rows, -1)))
    return [view[keep] for view in views]


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


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


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _gradients(network: Network, tokens: Tokens, projection: Tensor) -> list[Tensor]:
    """Of each row t of tokens (T, T) the gradient of its output t, projected, by its embeddings: (T, T, D) each."""
    embeddings: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if args[0].shape != tokens.shape or not torch.equal(args[0].long(), tokens):
            return None
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # what follows may write in place

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(capture)
    seed_all(0)
    with torch.enable_grad():
        outputs = network(tokens).double()
        if not embeddings or not outputs.requires_grad:
            return []
        own = outputs.diagonal(dim1=0, dim2=1).T @ projection  # (T,)
        gradients = torch.autograd.grad(own.sum(), embeddings, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


# ------------------------------------------------------------------------------------------------------------ helpers
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


# ---------------------------------------------------------------------------------------------------------- the figure
def influence_figure(report: CausalityReport) -> Figure:
    """The influence map on a logarithmic scale. What lies in the hatched triangle is a leak.

    Raises:
        ValueError: for a report without the map.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon

    if report.influence is None:
        raise ValueError("the report has no influence map: " + "; ".join(report.skipped))
    influence = report.influence.nan_to_num(0, 0, 0).numpy()
    length = len(influence)
    largest = float(influence.max()) or 1.0
    figure = Figure(figsize=(5.6, 4.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    above_rounding = np.ma.masked_less_equal(influence, report.tolerance * largest)
    colors = axes.imshow(above_rounding, norm=LogNorm(largest * 1e-6, largest), cmap="viridis")
    corners = [(0.5, -0.5)] + [c for t in range(length - 1) for c in ((t + 0.5, t + 0.5), (t + 1.5, t + 0.5))]
    corners += [(length - 0.5, -0.5)]
    axes.add_patch(Polygon(corners, closed=True, fill=False, hatch="//", edgecolor="crimson", linewidth=1.0, alpha=0.6))
    axes.set_xlabel("input position s")
    axes.set_ylabel("output position t")
    seen_by = ", ".join(dict.fromkeys(breach.check for breach in report.breaches))
    axes.set_title(f"LEAKING ({seen_by})" if report.leaking else "causal")
    figure.colorbar(colors, label="norm of d output t / d embedding s")
    return figure
