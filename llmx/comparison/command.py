"""`python main.py compare RUN ...`: finished runs beside each other, never trained again."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from llmx.comparison.figures import figures
from llmx.comparison.report import report
from llmx.comparison.runs import find_runs, grouped
from llmx.comparison.table import EQUAL, TOKENS, compare, render, write_csv
from llmx.errors import ArgumentParser


def run(arguments: list[str]) -> int:
    """Prints the table and writes comparison.csv, comparison.json, the figures and report.html; the exit code.

    Raises:
        UserError: for arguments that do not fit, runs that cannot be read, and runs that may not be ranked.
    """
    parser = ArgumentParser(prog="main.py compare", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, globs, or a folder of runs such as lightning_logs")
    parser.add_argument("--baseline", help="what differences are taken to, by its name in the table; else the first")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of the files that are written")
    at_equal = "what all runs have had the same of; at equal FLOPs or seconds the tokens they have seen may differ"
    parser.add_argument("--at-equal", choices=(TOKENS, *EQUAL), default=TOKENS, help=at_equal)
    parser.add_argument("--unranked", action="store_true", help="show runs of different protocols side by side")
    chosen = parser.parse_args(arguments)
    groups = grouped(find_runs(chosen.runs))
    comparison = compare(groups, chosen.baseline, not chosen.unranked, chosen.at_equal)
    drawn = figures(comparison, groups)
    chosen.out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(comparison.to_dict(), indent=1) + "\n"
    (chosen.out / "comparison.json").write_text(content, encoding="utf-8")
    write_csv(comparison, chosen.out / "comparison.csv")
    for name, figure in drawn.items():
        figure.savefig(chosen.out / f"{name}.png", dpi=110)
    (chosen.out / "report.html").write_text(report(comparison, drawn), encoding="utf-8")
    if chosen.format == "json":
        print(content, end="")
    else:
        console = Console(width=None)
        console.print(render(comparison))
        console.print(f"{chosen.out}/report.html, comparison.csv, comparison.json, {', '.join(drawn)} (.png)")
    return 0
