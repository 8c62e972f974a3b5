"""Writes docs/league.md and docs/images/league.png from docs/results/league/*.json.

The page begins with docs/results/league/learned.md, which is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.league.entries import (
    ADAPTED,
    BASELINE,
    BEST,
    BLOCK,
    CHECKOUT,
    LONG,
    PRECISION_NOTE,
    RESULTS,
    SELECTING,
    SHORT,
    SPACING,
    STAGES,
    Entry,
    Stage,
    fingerprint,
    read_entries,
)
from llmx.comparison.statistics import (
    Estimate,
    Spread,
    difference_under_spread,
    holm,
    mean_over_seeds,
    mean_under_spread,
    pooled,
)
from llmx.errors import UserError

PAGE = CHECKOUT / "docs" / "league.md"
FIGURE = CHECKOUT / "docs" / "images" / "league.png"
LEARNED = "learned.md"  # lies beside the results
INTRODUCTION = """# The league table

Made by `python -m benchmarks.league --page` from [results/league/](results/league/), to which
`python -m benchmarks.league` adds every architecture of [configs/](../configs/) that is not there yet.
"""


@dataclass(frozen=True)
class Row:
    """An architecture in a stage.

    loss:        nats per character, over fresh seeds
    difference:  loss minus the baseline's loss; None for the baseline itself, and without a baseline
    adjusted_p:  p of the difference after Holm's correction over all rows
    over_text:   the difference over blocks of the validation text, if block means were kept
    """

    entry: Entry
    runs: list[dict[str, Any]]
    loss: Estimate
    deviation: float
    difference: Estimate | None
    adjusted_p: float | None
    over_text: Estimate | None


@dataclass(frozen=True)
class Table:
    """All rows of a stage, best first, and their pooled spread."""

    stage: Stage
    rows: list[Row]
    spread: Spread
    protocol: dict[str, Any]


def table(entries: Sequence[Entry], stage: Stage) -> Table | None:
    """The table of the architectures that have finished a stage; None if there are none.

    Raises:
        UserError: if the runs have different protocols.
    """
    runs = {entry.name: entry.reported(stage) for entry in entries if entry.apart is None and entry.complete(stage)}
    if not runs:
        return None
    protocol = _shared_protocol(runs)
    values = {name: np.array([run["loss"] for run in found]) for name, found in runs.items()}
    spread = pooled(values.values())
    others = [name for name in runs if BASELINE in runs and name != BASELINE]
    differences = {name: difference_under_spread(values[name], values[BASELINE], spread) for name in others}
    adjusted = dict(zip(others, holm([differences[name].p or 0.0 for name in others]), strict=True))
    rows = [
        Row(
            entry=entry,
            runs=runs[entry.name],
            loss=mean_under_spread(values[entry.name], spread),
            deviation=float(values[entry.name].std(ddof=1)),
            difference=differences.get(entry.name),
            adjusted_p=adjusted.get(entry.name),
            over_text=_over_text(runs[entry.name], runs[BASELINE]) if entry.name in differences else None,
        )
        for entry in entries
        if entry.name in runs
    ]
    return Table(stage, sorted(rows, key=lambda row: row.loss.value), spread, protocol)


def _shared_protocol(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]["protocol"]
    for name, found in runs.items():
        for run in found:
            for key in first.keys() | run["protocol"].keys():
                here, there = run["protocol"].get(key), first.get(key)
                if here != there:
                    raise UserError(
                        f"{name}: {key} is {here} in its run of seed {run['seed']}, but {there} in others, so they do "
                        f"not belong in one table. Delete its file in {RESULTS.relative_to(CHECKOUT)} and run it again"
                    )
    return first


def _over_text(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Estimate | None:
    """The difference of two architectures on the same text, averaged over seeds: Student's t over blocks.

    Losses in different blocks are not correlated.
    """
    if any("block_means" not in run for run in (*runs, *baseline)):
        return None
    here, there = (np.mean([run["block_means"] for run in found], axis=0) for found in (runs, baseline))
    return mean_over_seeds(here - there)


# ------------------------------------------------------------------------------------------------------------ the page
def render(entries: Sequence[Entry], learned: str = "") -> str:
    """The page as Markdown; `learned` is its handwritten part."""
    tables = _tables(entries)
    parts = [INTRODUCTION]
    if learned:
        parts.append(f"## What was learned\n\n{learned.strip()}\n")
    if tables:
        parts += [_protocol(tables), "![losses with their intervals](images/league.png)\n"]
    parts += [_section(found) for found in tables]
    parts += [_apart(entries), _rates(entries)]
    return "\n".join(part for part in parts if part)


def _protocol(tables: list[Table]) -> str:
    shared = tables[0].protocol
    runs = [run for found in tables for row in found.rows for run in row.runs]
    recipe = _usual_recipe(tables[0])
    own = [_own_recipe(row, recipe) for row in tables[0].rows]
    said = f"""## Protocol

{shared["corpus"]} by character, split {shared["split"]}; batches of {shared["batch_size"]} windows of
{shared["window"]} characters drawn at random; {shared["precision"]},
{"compiled" if shared["compiled"] else "not compiled"}; gradients clipped at {shared["gradient_clip_val"]};
{recipe["optimizer"]}, betas {recipe["betas"]}, weight decay {recipe["weight_decay"]} on matrices; the rate rises over
{recipe["warmup_steps"]} steps and falls by half a cosine to {recipe["minimum_ratio"]:g} of its highest. The loss is
over the whole validation split, each character predicted once, after the last step. Everything else, also the width of
a sliding window of attention, is as the configs have it, except, for the window or for the number of
parameters, of which those of all experts count: {_adapted()}.
{PRECISION_NOTE}

Learning rates {SPACING:g} apart, three around that of the config and one more beyond the best where that is at an edge,
are run for {SHORT.steps:,} steps with seed {SELECTING}, which is not reported; the best one with the seeds
{_listed(SHORT.seeds)}. The best {BEST} and the classics go on to {LONG.steps:,} steps at the same rate, with the seeds
{_listed(LONG.seeds)}.
Seeds decide initialization and batches. The standard deviations of all rows of a table are pooled; intervals are 95 %,
Student's; p is two-sided, of the difference to {BASELINE}, corrected after Holm over all rows.

Run on: {_listed(sorted({run["device"] for run in runs}))}, threads {_listed(sorted({run["threads"] for run in runs}))},
torch {_listed(sorted({run["torch"] for run in runs}))}; seconds are of one run, beside others.
"""
    return said + "".join(f"\n{line}\n" for line in own if line)


def _adapted() -> str:
    """The config keys that the protocol changes."""
    keys = {name: dict.fromkeys(key.rsplit(".", 1)[-1] for key in said) for name, said in ADAPTED.items()}
    return "; ".join(f"{name} with {_listed(keys[name])} {_listed(said.values())}" for name, said in ADAPTED.items())


def _usual_recipe(found: Table) -> dict[str, Any]:
    """The recipe of most rows."""
    recipes = [json.dumps(row.runs[0]["recipe"], sort_keys=True) for row in found.rows]
    return json.loads(max(sorted(set(recipes)), key=recipes.count))


def _own_recipe(row: Row, usual: dict[str, Any]) -> str:
    recipe = row.runs[0]["recipe"]
    differing = [f"{key.replace('_', ' ')} {value}" for key, value in recipe.items() if value != usual[key]]
    return f"{row.entry.name} differs, as its method asks for: {', '.join(differing)}." if differing else ""


def _section(found: Table) -> str:
    headings = ["", "architecture", "loss", f"minus {BASELINE}", "p", "SD of its seeds", "rate", "parameters"]
    headings += ["training FLOPs a token", "seconds"]
    paired = any(row.over_text for row in found.rows)
    if paired:
        headings.insert(5, "± over text")
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(_cells(rank, row, paired))} |" for rank, row in enumerate(found.rows, 1)]
    notes = [f"Pooled standard deviation {found.spread.deviation:.4f}, {found.spread.freedom} degrees of freedom."]
    if paired:
        notes.append(
            f"Over text: 95 % of the same difference over blocks of {BLOCK} characters, which says how much the choice "
            "of the validation text decides."
        )
    if any(row.entry.at_edge() for row in found.rows):
        notes.append("*: at the edge of the rates tried; there may be a better one beyond.")
    if any(_stale(row.entry) for row in found.rows):
        notes.append("†: the config has changed since.")
    return "\n".join([f"## {found.stage.steps:,} steps", "", *lines, "", " ".join(notes), ""])


def _cells(rank: int, row: Row, paired: bool) -> list[str]:
    entry = row.entry
    mean_seconds = np.mean([run["seconds"] for run in row.runs])
    flops = entry.training_flops_per_token
    cells = [
        str(rank),
        f"[{entry.name}](architectures.md#{entry.name}){'†' if _stale(entry) else ''}",
        _with_interval(row.loss, ".4f"),
        "" if row.difference is None else _with_interval(row.difference, "+.4f"),
        "" if row.adjusted_p is None else "< 0.001" if row.adjusted_p < 0.001 else f"{row.adjusted_p:.3f}",
        f"{row.deviation:.4f}",
        f"{row.runs[0]['rate']:g}{'*' if entry.at_edge() else ''}",
        f"{entry.parameters:,}",
        "" if flops is None else f"{flops / 1e6:.2f} M",
        f"{mean_seconds:,.0f}",
    ]
    if paired:
        cells.insert(5, "" if row.over_text is None else f"{row.over_text.half:.4f}")
    return cells


def _apart(entries: Iterable[Entry]) -> str:
    lines = [f"- {entry.name}: {why}" for entry in entries if (why := _why_apart(entry))]
    return "\n".join(["## Apart", "", *lines, ""]) if lines else ""


def _why_apart(entry: Entry) -> str:
    """Why an architecture has no rank; empty for one that has."""
    if entry.apart is not None:
        size = "" if entry.parameters is None else f" ({entry.parameters:,} parameters)"
        return f"not run: {entry.apart}{size}"
    if entry.counts:
        losses = [f"{run['loss']:.4f}" for run in entry.runs]
        return f"counts instead of being trained, once: {losses[0]} in {entry.runs[0]['seconds']} s" if losses else ""
    tried = entry.tried()
    if entry.next_trial(SHORT) is not None:
        return "not all of its runs have ended" if tried else ""
    if entry.best_rate() is None:
        return f"diverged at every rate, {_listed(f'{rate:g}' for rate in tried)}"
    diverged = [run for stage in STAGES for run in entry.reported(stage) if run["loss"] is None]
    if diverged:
        said = [f"seed {run['seed']} of {run['stage']} training" for run in diverged]
        return f"diverged at its best rate, {entry.best_rate():g}, with {_listed(said)}"
    return ""


def _rates(entries: Iterable[Entry]) -> str:
    """The loss of each learning rate with the selecting seed."""
    lines = []
    for entry in entries:
        best = entry.best_rate()
        if entry.apart is not None or best is None:
            continue
        cells = []
        for rate, loss in entry.tried().items():
            said = f"{rate:g}: {'diverged' if np.isinf(loss) else f'{loss:.4f}'}"
            cells.append(f"**{said}**" if rate == best else said)
        lines.append(f"| {entry.name} | {', '.join(cells)} |")
    if not lines:
        return ""
    headings = f"| architecture | learning rate: loss with seed {SELECTING} after {SHORT.steps:,} steps |\n|---|---|"
    return "\n".join(["## Learning rates", "", headings, *lines, ""])


def _stale(entry: Entry) -> bool:
    try:
        return fingerprint(entry.name) != entry.config
    except UserError:  # the config is gone
        return True


def _with_interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ± {estimate.half:.4f}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# ---------------------------------------------------------------------------------------------------------- the figure
def figure(tables: Sequence[Table]) -> Figure:
    """The losses with their intervals, best at the top, one panel a stage."""
    most = max(len(found.rows) for found in tables)
    drawn = Figure(figsize=(7 * len(tables), 1.5 + 0.22 * most), layout="constrained")
    for axes, found in zip(drawn.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        _draw(axes, found)
    return drawn


def _draw(axes: Axes, found: Table) -> None:
    for place, row in enumerate(found.rows):
        color = "tab:red" if row.entry.name == BASELINE else "tab:blue"
        axes.plot([run["loss"] for run in row.runs], [place] * len(row.runs), ".", color="tab:gray", markersize=4)
        axes.plot([row.loss.low, row.loss.high], [place, place], color=color, linewidth=2)
        axes.plot(row.loss.value, place, "o", color=color, markersize=4)
    axes.set_yticks(range(len(found.rows)), [row.entry.name for row in found.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(title=f"{found.stage.steps:,} steps", xlabel="validation loss, nats per character (95 %; gray: each seed)")
    axes.grid(axis="x", alpha=0.3)


def page() -> str:
    """The text of docs/league.md from the current results."""
    learned = RESULTS / LEARNED
    return render(read_entries(), learned.read_text(encoding="utf-8") if learned.is_file() else "")


def write_page() -> None:
    """Writes the page, and the figure if there are results to draw."""
    PAGE.write_text(page(), encoding="utf-8")
    if tables := _tables(read_entries()):
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        figure(tables).savefig(FIGURE, dpi=120)
    print(PAGE)


def _tables(entries: Sequence[Entry]) -> list[Table]:
    return [found for stage in STAGES if (found := table(entries, stage)) is not None]
