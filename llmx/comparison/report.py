"""`report.html`: tables and figures in one file that needs no other."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from llmx import display
from llmx.comparison.groups import mark
from llmx.comparison.ranking import Comparison, Row
from llmx.comparison.statistics import Estimate
from llmx.comparison.table import caption, changed_settings, changes_heading, measured_on

TITLES = {
    "loss": "Validation loss",
    "curves": "On the way",
    "position": "By the place in the window",
    "kind": "By the kind of character",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:nth-child(2), td:nth-child(2) { text-align: left; white-space: normal }
#settings th, #settings td { text-align: left; white-space: normal }
.wide { overflow-x: auto; margin: 1rem 0 } .marked { color: #b00020 } .note { color: #555; white-space: pre-line }
img { max-width: 100%; height: auto }
"""
RESULTS = ("seeds", "val loss", "95 %", "difference", "95 %", "p", "perplexity", "bits / char", "blind")
COSTS = ("parameters", "train FLOPs", "tokens/s", "seconds", "memory", "state", "writes, tokens/s")


def report(comparison: Comparison, figures: Mapping[str, Figure]) -> str:
    """The page as HTML, with the figures in it."""
    rows = comparison.rows
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.parameters_of))
    images = "\n".join(
        f'<h2>{TITLES[name]}</h2>\n<img alt="{TITLES[name]}" src="data:image/png;base64,{_png(figure)}">'
        for name, figure in figures.items()
    )

    def parameters(row: Row) -> list[str]:
        return [display.count(row.parameters_of.get(kind, 0)) for kind in kinds]

    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>llmx: a comparison</title><link rel="icon" href="data:,">
<style>{STYLE}</style></head>
<body>
<h1>{len(rows)} configurations</h1>
<p>{escape(measured_on(comparison))}. Differences are to {escape(comparison.baseline)}.</p>
{_table("results", RESULTS, rows, _results)}
{_table("costs", COSTS, rows, _costs)}
<p class="note">{escape(caption(comparison))}</p>
{images}
{_settings(comparison)}
<h2>Parameters</h2>
{_table("parameters", kinds, rows, parameters)}
</body>
</html>
"""


def _table(id: str, headings: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("", "network", *headings))
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in (*_first(row), *cells(row)))}</tr>" for row in rows)
    return f"""<div class="wide"><table id="{id}"><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>"""


def _settings(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.unlike]
    if not rows:
        return ""
    heading = changes_heading(comparison)
    table = _table("settings", [heading], rows, lambda row: [escape(", ".join(changed_settings(row)))])
    return f"<h2>Settings</h2>\n{table}"


def _first(row: Row) -> tuple[str, str]:
    name = escape(row.name) + (f' <strong class="marked">{mark(row)}</strong>' if mark(row) else "")
    return "" if row.rank is None else str(row.rank), name


def _results(row: Row) -> list[str]:
    difference = row.difference
    return [
        str(len(row.seeds)),
        display.loss(row.loss.value),
        _interval(row.loss),
        *(("", "") if difference is None else (display.loss(difference.value, True), _interval(difference, True))),
        display.p_value(row.adjusted_p),
        f"{row.perplexity:.3f}",
        f"{row.bits_per_character:.3f}",
        escape(row.blind),
    ]


def _costs(row: Row) -> list[str]:
    costs = (row.training_flops, row.tokens_per_second, row.seconds, row.peak_bytes, row.state_bytes)
    return [display.count(row.parameters), *map(display.short, (*costs, row.generated_tokens_per_second))]


def _interval(estimate: Estimate, signed: bool = False) -> str:
    if not estimate.known:
        return "*"
    low, high = (display.loss(end, signed) for end in (estimate.low, estimate.high))
    return f"{low} to {high}{'*' if estimate.basis == 'text' else ''}"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
