"""`report.html`: the table and the figures in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape

from matplotlib.figure import Figure

from llmx.comparison.statistics import Estimate
from llmx.comparison.table import Comparison, Row, caption, short

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
.wide { overflow-x: auto } .leaking { color: #b00020 } .note { color: #555; white-space: pre-line }
img { max-width: 100%; height: auto }
"""
HEADINGS = ("", "network", "seeds", "val loss", "95 %", "perplexity", "bits / char", "difference", "95 %", "p")
COSTS = ("parameters", "train FLOPs", "tokens/s", "seconds", "memory", "state bytes", "generates, tokens/s")


def report(comparison: Comparison, figures: Mapping[str, Figure]) -> str:
    """The page as HTML; figures are inside it."""
    groups = list(dict.fromkeys(name for row in comparison.rows for name in row.parameters_of))
    protocol = ", ".join(f"{key} {value}" for key, value in comparison.protocol.items() if key != "sha256")
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*HEADINGS, *COSTS))
    body = "\n".join(_row(row) for row in comparison.rows)
    parts = "".join(f"<th>{escape(name)}</th>" for name in ("", "network", *groups, "all"))
    shares = "\n".join(
        "<tr><td></td><td>{}</td>{}<td>{:,}</td></tr>".format(
            escape(row.name), "".join(f"<td>{row.parameters_of.get(name, 0):,}</td>" for name in groups), row.parameters
        )
        for row in comparison.rows
    )
    images = "\n".join(
        f'<h2>{TITLES[name]}</h2>\n<img alt="{TITLES[name]}" src="data:image/png;base64,{_png(figure)}">'
        for name, figure in figures.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>llmx: a comparison</title><link rel="icon" href="data:,">
<style>{STYLE}</style></head>
<body>
<h1>{len(comparison.rows)} configurations</h1>
<p>Measured on: {escape(protocol)}. Differences are to {escape(comparison.baseline)}.</p>
<div class="wide"><table id="results"><thead><tr>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="note">{escape(caption(comparison))}</p>
{images}
<h2>Parameters</h2>
<div class="wide"><table><thead><tr>{parts}</tr></thead><tbody>
{shares}
</tbody></table></div>
</body>
</html>
"""


def _row(row: Row) -> str:
    name = escape(row.name) + (' <strong class="leaking">LEAKING</strong>' if row.leaking else "")
    difference = (
        ("", "") if row.difference is None else (f"{row.difference.value:+.4f}", _interval(row.difference, "+.4f"))
    )
    cells = ["" if row.rank is None else str(row.rank), name, str(len(row.seeds)), f"{row.loss.value:.4f}"]
    cells += [_interval(row.loss, ".4f"), f"{row.perplexity:.3f}", f"{row.bits_per_character:.3f}", *difference]
    cells += ["" if row.adjusted_p is None else f"{row.adjusted_p:.3f}", f"{row.parameters:,}"]
    costs = (row.training_flops, row.tokens_per_second, row.seconds, row.peak_bytes, row.state_bytes)
    cells += [short(cost) for cost in (*costs, row.generated_tokens_per_second)]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}{'*' if estimate.basis == 'text' else ''}"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
