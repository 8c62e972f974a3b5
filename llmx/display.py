"""Numbers and tables for people: one format for each kind of number, one look for all tables.

JSON and CSV hold numbers as they are; only text for people passes through here. Import the module, not its functions:
`display.loss(value)` says what it formats, `loss(value)` does not.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Column, Table


def count(value: float | None) -> str:
    """1234567 -> 1,234,567; 1234.56 -> 1,234.6; unknown -> -"""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def short(value: float | None) -> str:
    """1234567 -> 1.23 M; nothing for a number that is unknown or infinite."""
    if value is None or not math.isfinite(value):
        return ""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in decimal units, three digits: 13.5 GB."""
    power = min(4, int(math.log10(max(count, 1))) // 3)
    value = count / 1000**power
    digits = 2 - int(math.log10(value)) if power else 0
    return f"{value:,.{max(digits, 0)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def seconds(value: float) -> str:
    """0.01234 -> 0.0123 s"""
    return f"{value:.3g} s"


def percent(fraction: float) -> str:
    """0.01234 -> 1.23 %"""
    return f"{100 * fraction:.3g} %"


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole in percent, for a column that is headed %: 12.3; "-" if either is unknown or the whole is 0."""
    return f"{100 * part / whole:.1f}" if part is not None and whole else "-"


def loss(value: float, signed: bool = False) -> str:
    """Nats, four digits; a difference of losses is signed."""
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def with_half_width(value: float, half: float, signed: bool = False) -> str:
    """A loss and half of its confidence interval: 1.4330 ± 0.0021; an infinite interval is left out."""
    return loss(value, signed) + (f" ± {loss(half)}" if math.isfinite(half) else "")


def with_deviation(losses: Sequence[float]) -> str:
    """The mean of losses and, of two or more, their standard deviation: 1.4330, SD 0.0021."""
    mean = loss(statistics.fmean(losses))
    return mean if len(losses) < 2 else f"{mean}, SD {loss(statistics.stdev(losses))}"


def p_value(p: float | None) -> str:
    """Three digits, and nothing if there is none."""
    return "" if p is None else f"{p:.3f}"


def setting(value: Any) -> str:
    """A value of a config: integers with commas, everything else as Python prints it."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def text_column(heading: str, min_width: int | None = None) -> Column:
    """Aligned left; what is too long continues on the next line."""
    return Column(heading, overflow="fold", min_width=min_width)


def number_column(heading: str, wrap: bool = False) -> Column:
    """Aligned right, and never cut unless it may wrap."""
    return Column(heading, justify="right", no_wrap=not wrap)


def table(*columns: Column | str, title: str | None = None) -> Table:
    """An empty table without frame; a heading alone is a column of text."""
    made = [text_column(column) if isinstance(column, str) else column for column in columns]
    return Table(*made, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
