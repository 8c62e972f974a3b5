"""Ranks groups of runs: a row a group, best first, with its distance to a baseline.

Losses are only ranked if they were measured on the same text after the same training.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llmx import display
from llmx.comparison import statistics
from llmx.comparison.groups import Group, mark
from llmx.comparison.settings import SEEN, changed
from llmx.comparison.statistics import Estimate
from llmx.costs.matching import MATCHED, relative_gap
from llmx.errors import UserError
from llmx.runs.record import Run
from llmx.training.metrics import bits, perplexity

TOKENS = "tokens"
BUDGETS: dict[str, Callable[[Run], float | None]] = {  # what else runs may have been given equal amounts of
    "flops": lambda run: run.training_flops,
    "seconds": lambda run: run.seconds,
}
UNKNOWN = {
    "flops": "nobody has counted those of {run}",
    "seconds": "{run} was stopped and continued, and knows only those of its last part",
}


@dataclass(frozen=True)
class Row:
    """A group of runs: means over them, None for what is unknown."""

    name: str
    rank: int | None  # from 1; None if nothing is ranked, or the network leaks or was not audited
    seeds: list[Any]
    leaking: bool
    unaudited: bool
    blind: str  # what the blind pass found; "" for runs without one
    loss: Estimate  # nats per character
    perplexity: float
    bits_per_character: float
    difference: Estimate | None  # loss minus that of the baseline; None for the baseline itself
    adjusted_p: float | None  # of the difference, after Holm over all rows
    parameters: int
    parameters_of: dict[str, int]  # by kind of part
    training_flops: float | None
    tokens_per_second: float | None
    seconds: float | None  # wall-clock of the fit; None for continued runs
    peak_bytes: float | None
    state_bytes: float | None
    generated_tokens_per_second: float | None  # of one sequence
    unlike: dict[str, tuple[Any, Any]]  # settings that differ -> (baseline's value, own value), None if missing
    code: list[str]  # shortened hashes of llmx's sources
    folders: list[str]


@dataclass(frozen=True)
class Comparison:
    """All rows, best first."""

    rows: list[Row]
    baseline: str
    protocol: dict[str, Any]  # what the runs share
    differing: dict[str, dict[str, Any]]  # protocol key -> row -> value, for keys that they do not share
    matching: str  # which of parameters, FLOPs and wall-clock are equal, in words

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the ends of an unknown interval are null. A row without a blind pass has no `blind`."""

        def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            known = [(key, value) for key, value in pairs if (key, value) != ("blind", "")]
            return {key: None if value in (-math.inf, math.inf) else value for key, value in known}

        return asdict(self, dict_factory=plain)


def compare(
    groups: Sequence[Group], baseline: str | None = None, ranked: bool = True, at_equal: str = TOKENS
) -> Comparison:
    """Compares groups of runs. Differences are to the baseline, by default the first group.

    With `ranked`, it refuses groups whose losses may not be ranked; without, it keeps the order given, with neither
    ranks nor differences. All runs were given the same amount of `at_equal`: tokens, or a key of BUDGETS, for which the
    tokens seen may differ. Raises UserError for an unknown baseline, protocols that differ, and budgets that differ or
    are unknown.
    """
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise UserError(f"baseline: there is no {baseline!r} among {', '.join(names)}")
    against = groups[names.index(baseline) if baseline else 0]
    unequal = _differing(groups)
    differing = {key: values for key, values in unequal.items() if key != SEEN or at_equal == TOKENS}
    if at_equal != TOKENS:
        _check_budget(at_equal, [run for group in groups for run in group.runs])
    if differing and ranked:
        by_key = {
            key: [f"{display.setting(x)} in {name}" for name, x in held.items()] for key, held in differing.items()
        }
        said = "; ".join(f"{key} is {', '.join(values)}" for key, values in by_key.items())
        raise UserError(f"these runs may not be ranked: {said}. --unranked shows them side by side")
    if not ranked:
        rows = [_row(group, against, None) for group in groups]
    else:
        differences = [None if group is against else _difference(group, against) for group in groups]
        ps = iter(statistics.holm([d.p for d in differences if d is not None and d.p is not None]))
        rows = [_row(g, against, d, None if d is None else next(ps)) for g, d in zip(groups, differences, strict=True)]
        rows.sort(key=lambda row: (row.leaking, row.unaudited, row.loss.value))
        rows = [row if mark(row) else replace(row, rank=rank) for rank, row in enumerate(rows, 1)]
    shared = {key: value for key, value in groups[0].protocol.items() if key not in unequal}
    return Comparison(rows, against.name, shared, differing, _matching(rows))


def _check_budget(budget: str, runs: Sequence[Run]) -> None:
    """Raises UserError if the runs were not given the same amount of it, or it is unknown."""
    spent = BUDGETS[budget]
    for run in runs:
        if spent(run) is None:
            raise UserError(f"at-equal: {budget} are unknown: {UNKNOWN[budget].format(run=run.folder)}")
    if (factor := relative_gap(map(spent, runs))) > MATCHED:
        raise UserError(f"at-equal: {budget} are up to {1 + factor:.2f} times apart in these runs")


def _differing(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    protocols = {group.name: group.protocol for group in groups}
    by_key = {key: {name: held[key] for name, held in protocols.items()} for key in groups[0].protocol}

    def differ(key: str, values: Iterable[Any]) -> bool:  # a network that counts has no number of tokens
        return len({json.dumps(value) for value in values if value is not None or key != SEEN}) > 1

    return {key: values for key, values in by_key.items() if differ(key, values.values())}


def _difference(group: Group, baseline: Group) -> Estimate:
    if min(len(group.runs), len(baseline.runs)) > 1:
        here, there = ({run.seed for run in runs} for runs in (group.runs, baseline.runs))
        if here == there and len(here) == len(group.runs) == len(baseline.runs):
            return statistics.difference_of_pairs(group.values, baseline.values)  # both are in the order of their seeds
        return statistics.difference_over_seeds(group.values, baseline.values)
    return statistics.difference_over_text(group.losses, baseline.losses)


def _row(group: Group, baseline: Group, difference: Estimate | None, adjusted_p: float | None = None) -> Row:
    runs = group.runs
    record = runs[0].record
    over_text = len(runs) == 1
    loss = statistics.mean_over_text(group.losses) if over_text else statistics.mean_over_seeds(group.values)
    loss = replace(loss, value=float(group.values.mean()), p=None)
    return Row(
        name=group.name,
        rank=None,
        seeds=[run.seed for run in runs],
        leaking=group.leaking,
        unaudited=group.unaudited,
        blind=group.blind,
        loss=loss,
        perplexity=perplexity(loss.value),
        bits_per_character=bits(loss.value),
        difference=difference,
        adjusted_p=adjusted_p,
        parameters=record["parameters"],
        parameters_of={name: part["parameters"] for name, part in record["network"]["groups"].items()},
        training_flops=_mean(run.training_flops for run in runs),
        tokens_per_second=_mean(run.tokens_per_second for run in runs),
        seconds=_mean(run.seconds for run in runs),
        peak_bytes=_mean(run.metrics["peak_bytes"] for run in runs),
        state_bytes=record["network"]["state_bytes"],
        generated_tokens_per_second=_mean(run.metrics["generated_tokens_per_second"] for run in runs),
        unlike=changed(baseline.settings, group.settings),
        code=sorted(set().union(*(run.code for run in runs))),
        folders=[str(run.folder) for run in runs],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _matching(rows: Sequence[Row]) -> str:
    costs: dict[str, list[float | None]] = {
        "parameters": [row.parameters for row in rows],
        "training FLOPs": [row.training_flops for row in rows],
        "wall-clock": [row.seconds for row in rows],
    }
    gaps = {name: relative_gap(values) for name, values in costs.items() if sum(map(bool, values)) > 1}
    return ", ".join(
        f"equal {name} (within {100 * gap:.1f} %)" if gap <= MATCHED else f"{name} up to {1 + gap:.2f} times apart"
        for name, gap in gaps.items()
    )
