"""The table: a row a configuration, best first, and what stands in the way of believing it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmx.comparison.runs import SEEN, Group, Run, mark
from llmx.comparison.settings import changes, short_key, shown
from llmx.comparison.statistics import (
    BLOCK,
    FEWEST,
    Estimate,
    difference_of_pairs,
    difference_over_seeds,
    difference_over_text,
    holm,
    mean_over_seeds,
    mean_over_text,
)
from llmx.costs.matching import MATCHED, apart
from llmx.errors import UserError
from llmx.training.metrics import bits, perplexity

UNLIKE = 8  # settings of a row that the terminal shows
TOKENS = "tokens"
EQUAL: dict[str, Callable[[Run], float | None]] = {  # what else runs may have had the same of
    "flops": lambda run: run.training_flops,
    "seconds": lambda run: run.seconds,
}
UNKNOWN = {
    "flops": "nobody has counted those of {run}",
    "seconds": "{run} was stopped and went on, and knows only those of its last part",
}


@dataclass(frozen=True)
class Row:
    """A configuration. Means over its runs; None where nobody knows.

    rank:            from 1, None where the network leaks or was not audited, or nothing is ranked
    loss:            nats per character
    difference:      loss minus that of the baseline; None for the baseline itself
    adjusted_p:      of the difference, after Holm over all rows
    parameters_of:   by group
    seconds:         wall-clock of the fit; not of runs that were stopped and went on
    generated_tokens_per_second: one row
    unlike:          settings that differ from the baseline's: (its value, that of this row), None where there is none
    code:            hashes of llmx's sources, shortened
    """

    name: str
    rank: int | None
    seeds: list[Any]
    leaking: bool
    unaudited: bool
    loss: Estimate
    perplexity: float
    bits_per_character: float
    difference: Estimate | None
    adjusted_p: float | None
    parameters: int
    parameters_of: dict[str, int]
    training_flops: float | None
    tokens_per_second: float | None
    seconds: float | None
    peak_bytes: float | None
    state_bytes: float | None
    generated_tokens_per_second: float | None
    unlike: dict[str, tuple[Any, Any]]
    code: list[str]
    folders: list[str]


@dataclass(frozen=True)
class Comparison:
    """All rows, best first.

    protocol: what the runs share; differing: what they do not, by key and by row
    matching: in words, which of parameters, FLOPs and wall-clock are equal
    """

    rows: list[Row]
    baseline: str
    protocol: dict[str, Any]
    differing: dict[str, dict[str, Any]]
    matching: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; an interval that nobody knows is null."""
        return asdict(self, dict_factory=lambda pairs: {k: None if v in (-math.inf, math.inf) else v for k, v in pairs})


def compare(
    groups: Sequence[Group], baseline: str | None = None, ranked: bool = True, at_equal: str = TOKENS
) -> Comparison:
    """Groups of runs side by side.

    Args:
        groups: what to compare.
        baseline: the name that differences are taken to; the first group if not given.
        ranked: refuse what may not be ranked; if false, all is shown in the order given and no difference is taken.
        at_equal: tokens or one of EQUAL; what all have had the same of. If not tokens, the tokens seen may differ.

    Raises:
        UserError: for an unknown baseline, and where the protocols or what should be equal differ, or the latter is
            not known.
    """
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise UserError(f"baseline: there is no {baseline!r} among {', '.join(names)}")
    against = groups[names.index(baseline) if baseline else 0]
    unequal = _differing(groups)
    differing = {key: values for key, values in unequal.items() if key != SEEN or at_equal == TOKENS}
    if at_equal != TOKENS:
        runs = [run for group in groups for run in group.runs]
        unknown = next((run for run in runs if EQUAL[at_equal](run) is None), None)
        if unknown is not None:
            raise UserError(f"at-equal: {at_equal} are unknown: {UNKNOWN[at_equal].format(run=unknown.folder)}")
        if (factor := apart(map(EQUAL[at_equal], runs))) > MATCHED:
            raise UserError(f"at-equal: {at_equal} are up to {1 + factor:.2f} times apart in these runs")
    if differing and ranked:
        said = "; ".join(
            f"{key} is " + ", ".join(f"{_plain(value)} in {name}" for name, value in values.items())
            for key, values in differing.items()
        )
        raise UserError(f"these runs may not be ranked: {said}. --unranked shows them side by side")
    if not ranked:
        rows = [_row(group, against, None) for group in groups]
    else:
        differences = [None if group is against else _difference(group, against) for group in groups]
        ps = iter(holm([d.p for d in differences if d is not None and d.p is not None]))
        rows = [_row(g, against, d, None if d is None else next(ps)) for g, d in zip(groups, differences, strict=True)]
        rows.sort(key=lambda row: (row.leaking, row.unaudited, row.loss.value))
        rows = [row if mark(row) else replace(row, rank=rank) for rank, row in enumerate(rows, 1)]
    shared = {key: value for key, value in groups[0].runs[0].protocol.items() if key not in unequal}
    return Comparison(rows, against.name, shared, differing, _matching(rows))


def _differing(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    protocols = {group.name: group.runs[0].protocol for group in groups}
    result = {}
    for key in next(iter(protocols.values())):
        values = {name: protocol[key] for name, protocol in protocols.items()}
        # a network that counts has no number of tokens
        held = {json.dumps(value) for value in values.values() if value is not None or key != SEEN}
        if len(held) > 1:
            result[key] = values
    return result


def _difference(group: Group, baseline: Group) -> Estimate:
    if min(len(group.runs), len(baseline.runs)) > 1:
        here, there = ({run.seed for run in runs} for runs in (group.runs, baseline.runs))
        if here == there and len(here) == len(group.runs) == len(baseline.runs):
            return difference_of_pairs(group.values, baseline.values)  # both are in the order of their seeds
        return difference_over_seeds(group.values, baseline.values)
    return difference_over_text(group.losses, baseline.losses)


def _row(group: Group, baseline: Group, difference: Estimate | None, adjusted_p: float | None = None) -> Row:
    runs = group.runs
    network = runs[0].record["network"]
    estimate = mean_over_seeds(group.values) if len(runs) > 1 else mean_over_text(group.losses)
    loss = replace(estimate, value=float(group.values.mean()), p=None)
    return Row(
        name=group.name,
        rank=None,
        seeds=[run.seed for run in runs],
        leaking=group.leaking,
        unaudited=group.unaudited,
        loss=loss,
        perplexity=perplexity(loss.value),
        bits_per_character=bits(loss.value),
        difference=difference,
        adjusted_p=adjusted_p,
        parameters=runs[0].record["parameters"],
        parameters_of={name: part["parameters"] for name, part in network["groups"].items()},
        training_flops=_mean(runs, lambda run: run.training_flops),
        tokens_per_second=_mean(runs, lambda run: run.tokens_per_second),
        seconds=_mean(runs, lambda run: run.seconds),
        peak_bytes=_mean(runs, lambda run: run.metrics["peak_bytes"]),
        state_bytes=network["state_bytes"],
        generated_tokens_per_second=_mean(runs, lambda run: run.metrics["generated_tokens_per_second"]),
        unlike={
            key: (theirs, own)
            for key, theirs, own in changes(baseline.runs[0].nested_settings, runs[0].nested_settings)
        },
        code=sorted(set().union(*(run.code for run in runs))),
        folders=[str(run.folder) for run in runs],
    )


def _mean(runs: Sequence[Run], what: Callable[[Run], float | None]) -> float | None:
    values = [value for run in runs if (value := what(run)) is not None]
    return float(np.mean(values)) if values else None


def _matching(rows: Sequence[Row]) -> str:
    said = []
    for name, what in (
        ("parameters", lambda row: row.parameters),
        ("training FLOPs", lambda row: row.training_flops),
        ("wall-clock", lambda row: row.seconds),
    ):
        values = [value for row in rows if (value := what(row))]
        if len(values) < 2:
            continue
        factor = apart(values)
        said.append(
            f"equal {name} (within {100 * factor:.1f} %)"
            if factor <= MATCHED
            else f"{name} up to {1 + factor:.2f} times apart"
        )
    return ", ".join(said)


def render(comparison: Comparison) -> RenderableType:
    """For people: what was reached, what it cost, and what has to be said about it."""
    results = _table("val loss", "difference", "p", "seeds", "perplexity")
    costs = _table("bits", "parameters", "FLOPs", "tokens/s", "memory", "state", "writes")
    for row in comparison.rows:
        name = Text(row.name)
        if mark(row):
            name.append(f" {mark(row)}", style="bold red")
        first = ("" if row.rank is None else str(row.rank), name)
        results.add_row(
            *first,
            _with_interval(row.loss, ".4f"),
            "" if row.difference is None else _with_interval(row.difference, "+.4f"),
            "" if row.adjusted_p is None else f"{row.adjusted_p:.3f}",
            str(len(row.seeds)),
            f"{row.perplexity:.3f}",
        )
        numbers = (row.training_flops, row.tokens_per_second, row.peak_bytes, row.state_bytes)
        shortly = (short(number) for number in (*numbers, row.generated_tokens_per_second))
        costs.add_row(*first, f"{row.bits_per_character:.3f}", f"{row.parameters:,}", *shortly)
    settings = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    settings.add_column("network", overflow="fold", min_width=10)
    settings.add_column(unlike_heading(comparison), overflow="fold")
    for row in comparison.rows:
        if said := unlike(row):
            more = [f"and {len(said) - UNLIKE} more (report.html)"] if len(said) > UNLIKE else []
            settings.add_row(Text(row.name), Text(", ".join([*said[:UNLIKE], *more])))
    notes = Text(f"{measured_on(comparison)}\n{caption(comparison)}", style="dim")
    return Lines(results, costs, *([settings] if settings.row_count else []), notes)


def unlike_heading(comparison: Comparison) -> str:
    return f"unlike {comparison.baseline} (which has)"


def unlike(row: Row) -> list[str]:
    """The settings of a row that differ from the baseline's, whose own are in brackets."""
    return [f"{short_key(key)} {shown(own)} ({shown(theirs)})" for key, (theirs, own) in row.unlike.items()]


def _table(*numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("network", overflow="fold", min_width=10)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def measured_on(comparison: Comparison) -> str:
    """The protocol that the rows share."""
    shared = (f"{key} {_plain(value)}" for key, value in comparison.protocol.items() if key != "sha256")
    return f"Measured on: {', '.join(shared)}"


def caption(comparison: Comparison) -> str:
    """What has to be said about the numbers."""
    lines = []
    bases = {row.loss.basis for row in comparison.rows}
    if "seeds" in bases:
        lines.append("± 95 % over seeds")
    if "text" in bases:
        lines.append(
            "* 95 % over blocks of the validation text, for want of a second seed: it says nothing about seeds"
        )
        if not all(row.loss.known for row in comparison.rows):
            lines.append(f"no interval: fewer than {FEWEST * BLOCK:,} characters were validated")
    differences = [row.difference for row in comparison.rows if row.difference is not None]
    if differences:
        pairs = any(difference.basis == "pairs" for difference in differences)
        paired = ", of runs of the same seed, which read the same windows" if pairs else ""
        lines.append(f"difference: to {comparison.baseline}{paired}")
    if any(row.adjusted_p is not None for row in comparison.rows):
        lines.append("p: two-sided, after Holm over all rows")
    if comparison.differing:
        lines.append(f"NOT RANKED: {', '.join(comparison.differing)} differ")
    if any(row.leaking for row in comparison.rows):
        lines.append("LEAKING: the audit found that it sees the future; its loss means nothing and has no rank")
    if any(row.unaudited for row in comparison.rows):
        lines.append("UNAUDITED: trained with model.audit off; whether it sees the future nobody knows: no rank")
    by_code = {
        code: [row.name for row in comparison.rows if code in row.code] for row in comparison.rows for code in row.code
    }
    if len(by_code) > 1:
        said = "; ".join(f"{code}: {', '.join(names)}" for code, names in by_code.items())
        lines.append(f"not all trained by the same sources of llmx (run.json: code): {said}")
    lines.append("FLOPs: of training; memory and state in bytes; writes: tokens/s in generation, one row")
    return "\n".join([*lines, *([comparison.matching] if comparison.matching else [])])


def _with_interval(estimate: Estimate, form: str) -> str:
    mark = "*" if estimate.basis == "text" else " "
    half = f" ± {estimate.half:.4f}" if estimate.known else ""
    return f"{estimate.value:{form}}{half}{mark}"


def short(value: float | None) -> str:
    """1234567 -> 1.23 M"""
    if value is None or not math.isfinite(value):
        return ""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_csv(comparison: Comparison, path: Path) -> None:
    """One line a row, numbers unrounded."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        plain = ["rank", "name", "leaking", "unaudited", "seeds"]
        numbers = [
            "perplexity",
            "bits_per_character",
            "adjusted_p",
            "parameters",
            "training_flops",
            "tokens_per_second",
        ]
        numbers += ["seconds", "peak_bytes", "state_bytes", "generated_tokens_per_second"]
        intervals = ["value", "low", "high", "basis"]
        writer.writerow(
            [*plain, *(f"loss_{part}" for part in intervals), *(f"difference_{part}" for part in intervals), *numbers]
        )
        for row in comparison.rows:
            estimates = [getattr(e, part, "") for e in (row.loss, row.difference) for part in intervals]
            cells = [row.rank, row.name, row.leaking, row.unaudited, " ".join(map(str, row.seeds))]
            writer.writerow([*cells, *estimates, *(getattr(row, number) for number in numbers)])
