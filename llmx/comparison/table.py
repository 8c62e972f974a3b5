"""The comparison as text for people and as CSV for programs."""

import csv
from pathlib import Path

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmx import display
from llmx.comparison.groups import mark
from llmx.comparison.ranking import Comparison, Row
from llmx.comparison.settings import short_key, short_value
from llmx.comparison.statistics import BLOCK, FEWEST, Estimate

SHOWN = 8  # changed settings of a row in the terminal


def render(comparison: Comparison) -> RenderableType:
    """Losses, costs and changed settings, with notes on what the numbers mean."""
    results = _table("val loss", "difference", "p", "seeds", "perplexity")
    results.add_column("blind", overflow="fold")
    costs = _table("bits", "parameters", "FLOPs", "tokens/s", "memory", "state", "writes")
    settings = display.table(display.text_column("network", 10), changes_heading(comparison))
    for row in comparison.rows:
        name = Text.assemble(row.name, (f" {mark(row)}".rstrip(), "bold red"))
        first = ("" if row.rank is None else str(row.rank), name)
        results.add_row(
            *first,
            _with_interval(row.loss),
            "" if row.difference is None else _with_interval(row.difference, signed=True),
            display.p_value(row.adjusted_p),
            str(len(row.seeds)),
            f"{row.perplexity:.3f}",
            row.blind,
        )
        numbers = (row.training_flops, row.tokens_per_second, row.peak_bytes, row.state_bytes)
        shortly = map(display.short, (*numbers, row.generated_tokens_per_second))
        costs.add_row(*first, f"{row.bits_per_character:.3f}", display.count(row.parameters), *shortly)
        if said := changed_settings(row):
            more = [f"and {len(said) - SHOWN} more (report.html)"] if len(said) > SHOWN else []
            settings.add_row(Text(row.name), Text(", ".join([*said[:SHOWN], *more])))
    notes = Text(f"{measured_on(comparison)}\n{caption(comparison)}", style="dim")
    return Lines(results, costs, *([settings] if settings.row_count else []), notes)


def changes_heading(comparison: Comparison) -> str:
    return f"unlike {comparison.baseline} (which has)"


def changed_settings(row: Row) -> list[str]:
    """The settings that differ from the baseline's, with the baseline's value in brackets."""
    return [f"{short_key(key)} {short_value(own)} ({short_value(theirs)})" for key, (theirs, own) in row.unlike.items()]


def _table(*numbers: str) -> Table:
    columns = map(display.number_column, numbers)
    return display.table(display.number_column(""), display.text_column("network", 10), *columns)


def measured_on(comparison: Comparison) -> str:
    """The protocol that the rows share."""
    shared = (f"{key} {display.setting(value)}" for key, value in comparison.protocol.items() if key != "sha256")
    return f"Measured on: {', '.join(shared)}"


def caption(comparison: Comparison) -> str:
    """Notes on what the numbers mean, and what they do not."""
    rows = comparison.rows
    bases = {row.loss.basis for row in rows}
    differences = {row.difference.basis for row in rows if row.difference is not None}
    paired = ", of runs of the same seed, which read the same windows" if "pairs" in differences else ""
    by_code = {code: [row.name for row in rows if code in row.code] for of in rows for code in of.code}
    codes = "; ".join(f"{code}: {', '.join(names)}" for code, names in by_code.items())
    over_text = "* 95 % over blocks of the validation text, for want of a second seed: it says nothing about seeds"
    unknown = "text" in bases and not all(row.loss.known for row in rows)
    leaking = "LEAKING: the audit found that it sees the future; its loss means nothing and has no rank"
    unaudited = "UNAUDITED: trained with model.audit off; whether it sees the future nobody knows: no rank"
    notes = {
        "± 95 % over seeds": "seeds" in bases,
        over_text: "text" in bases,
        f"no interval: fewer than {FEWEST * BLOCK:,} characters were validated": unknown,
        f"difference: to {comparison.baseline}{paired}": differences,
        "p: two-sided, after Holm over all rows": any(row.adjusted_p is not None for row in rows),
        f"NOT RANKED: {', '.join(comparison.differing)} differ": comparison.differing,
        "blind: the same losses with later text and other rows replaced": any(row.blind for row in rows),
        leaking: any(row.leaking for row in rows),
        unaudited: any(row.unaudited for row in rows),
        f"not all trained by the same sources of llmx (run.json: code): {codes}": len(by_code) > 1,
        "FLOPs: of training; memory and state in bytes; writes: tokens/s in generation, one row": True,
        comparison.matching: comparison.matching,
    }
    return "\n".join(note for note, holds in notes.items() if holds)


def _with_interval(estimate: Estimate, signed: bool = False) -> str:
    over_text = "*" if estimate.basis == "text" else " "
    return display.with_half_width(estimate.value, estimate.half, signed) + over_text


def write_csv(comparison: Comparison, path: Path) -> None:
    """One line a row, numbers unrounded."""
    plain = ["rank", "name", "leaking", "unaudited", "blind", "seeds"]
    numbers = ["perplexity", "bits_per_character", "adjusted_p", "parameters", "training_flops", "tokens_per_second"]
    numbers += ["seconds", "peak_bytes", "state_bytes", "generated_tokens_per_second"]
    interval = ["value", "low", "high", "basis"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        estimates = [f"{name}_{part}" for name in ("loss", "difference") for part in interval]
        writer.writerow([*plain, *estimates, *numbers])
        for row in comparison.rows:
            cells = [row.rank, row.name, row.leaking, row.unaudited, row.blind, " ".join(map(str, row.seeds))]
            cells += [getattr(estimate, part, "") for estimate in (row.loss, row.difference) for part in interval]
            writer.writerow([*cells, *(getattr(row, number) for number in numbers)])
