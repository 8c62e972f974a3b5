"""What the causality audit finds: breaches, the report on a network, the error that stops a run, the influence map."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llmx.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKS = ("finite", "losses", "suffix", "prefix", "gradient", "batch", "memory", "run")
TOLERANCE = 1e-9  # relative to the largest output; a convolution by FFT has 4e-16


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
