"""The results of the causality audit: breaches, the report, the error that stops a run, the influence map."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llmx.audits.rounding import TOLERANCE
from llmx.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANGED = "the output at position {position} changed by {size:.2g} (relative) when only "
SENTENCES = {  # by check, in the order of a report
    "suffix": CHANGED + "positions from {changed} on were replaced",
    "prefix": CHANGED + "positions from {changed} on were cut off",
    "gradient": "the output at position {position} has a gradient of {size:.2g} (relative to the largest) with respect "
    "to the embedding at position {changed}",
    "batch": CHANGED + "other rows of the batch were replaced or left out",
    "memory": CHANGED + "the batch before it was another",
    "run": "the loss at position {position} changed by {size:.2g} nats in the run's own precision and on its device: "
    "{what}",
    "random": "the output at position {position} changed by {size:.2g} (relative) between two identical calls",
    "finite": "the output at position {position} is not finite",
}
CHECKS = tuple(SENTENCES)
VERDICTS = {"random": "RANDOM", "finite": "NOT FINITE"}  # of the other checks: LEAKING
ADVICE = "Fix it, or train the network anyway with `--model.audit warn`, which marks the run."
FIRST = {"random": "draws", "finite": "is not finite"}  # what the first module does; for the other checks: leaks


@dataclass(frozen=True)
class Breach:
    """One way in which the network leaks, draws random numbers in evaluation mode (`random`), or fails (`finite`).

    `module` is the dotted name of the first module in forward order that turns unchanged inputs into a changed output;
    the network's class if it is none of its parts.
    """

    check: str  # one of CHECKS
    mode: str  # "train" or "eval"
    length: int  # tokens in a sequence
    module: str
    module_class: str
    position: int  # the output position that changed most
    changed: int  # the first input position that was replaced, cut off, or differentiated by
    size: float  # the change, relative to the largest output; in nats for `run`, inf for `finite`
    what: str = ""  # for `run`: what the loss depends on

    def __str__(self) -> str:
        sentence = SENTENCES[self.check].format(**vars(self))
        sentence += f" ({self.check}, {self.mode} mode, length {self.length})"
        module = self.module if self.module == self.module_class else f"{self.module} ({self.module_class})"
        return f"{sentence}; the first module that {FIRST.get(self.check, 'leaks')} is {module}"


@dataclass(frozen=True)
class CausalityReport:
    """What the audit found. `influence` (T, T) is the norm of the gradient of output t with respect to the embedding
    at s; None if skipped."""

    breaches: tuple[Breach, ...]  # in the order of CHECKS, one for each check and mode, at the first length; or none
    skipped: tuple[str, ...]  # checks that could not run, each with its reason
    lengths: tuple[int, ...]  # tokens in the sequences tried
    tolerance: float  # changes up to this relative size count as rounding
    influence: Tensor | None = field(repr=False)
    seconds: float

    @property
    def verdict(self) -> str:
        """LEAKING, RANDOM, NOT FINITE, or nothing where no check failed."""
        return VERDICTS.get(self.breaches[0].check, "LEAKING") if self.breaches else ""

    @property
    def leaking(self) -> bool:
        return self.verdict == "LEAKING"

    @property
    def failing(self) -> bool:
        return bool(self.breaches)

    def summary(self) -> str:
        """A short paragraph for people."""
        lengths = ", ".join(map(str, self.lengths))
        verdict = f"{self.verdict}: {self.describe()}" if self.failing else "no leak."
        text = f"causality: lengths {lengths}, train and eval, {self.seconds:.1f} s: {verdict}"
        if self.skipped:
            text += f" Skipped: {'; '.join(self.skipped)}."
        if self.tolerance > TOLERANCE:
            text += f" The network casts to a lower precision: changes below {self.tolerance:g} count as rounding."
        return text

    def describe(self) -> str:
        """The first breach as a sentence, and the other checks that saw it."""
        others = [f"{breach.check} ({breach.mode})" for breach in self.breaches[1:]]
        return f"{self.breaches[0]}{'; seen too by ' + ', '.join(others) if others else ''}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run's record, without the influence map."""
        breaches = [asdict(breach) for breach in self.breaches]
        return {
            "verdict": self.verdict,
            "leaking": self.leaking,
            "breaches": [breach | ({} if math.isfinite(breach["size"]) else {"size": None}) for breach in breaches],
            "skipped": list(self.skipped),
            "lengths": list(self.lengths),
            "tolerance": self.tolerance,
            "seconds": round(self.seconds, 2),
        }


class CausalityError(UserError):
    """The network leaks, or fails otherwise; carries the `report`."""

    def __init__(self, report: CausalityReport):
        super().__init__(f"{report.verdict}: {report.describe()} {ADVICE}")
        self.report = report


def influence_figure(report: CausalityReport) -> Figure:
    """The influence map on a logarithmic scale. Any color in the hatched triangle is a leak.

    Raises ValueError for a report without the map.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    if report.influence is None:
        raise ValueError("the report has no influence map: " + "; ".join(report.skipped))
    influence = report.influence.nan_to_num(0, 0, 0).numpy()
    largest = float(influence.max()) or 1.0
    figure = Figure(figsize=(5.6, 4.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    above_rounding = np.ma.masked_less_equal(influence, report.tolerance * largest)
    colors = axes.imshow(above_rounding, norm=LogNorm(largest * 1e-6, largest), cmap="viridis")
    edges = np.arange(len(influence)) + 0.5
    future = axes.fill_between(edges, edges, -0.5, step="post", facecolor="none", edgecolor="crimson", alpha=0.6)
    future.set(hatch="//", linewidth=1.0)
    seen_by = ", ".join(dict.fromkeys(breach.check for breach in report.breaches))
    title = f"{report.verdict} ({seen_by})" if report.failing else "causal"
    axes.set(xlabel="input position s", ylabel="output position t", title=title)
    figure.colorbar(colors, label="norm of d output t / d embedding s")
    return figure
