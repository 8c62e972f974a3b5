"""`python main.py compare RUN ...`: compares finished runs by their folders, without training."""

import json
from pathlib import Path

from rich.console import Console

from llmx.comparison.figures import figures
from llmx.comparison.groups import find_runs, grouped
from llmx.comparison.ranking import BUDGETS, TOKENS, compare
from llmx.comparison.report import report
from llmx.comparison.table import render, write_csv
from llmx.errors import ArgumentParser
from llmx.runs.folder import RUNS


def run(arguments: list[str]) -> int:
    """Prints the table, writes comparison.csv, comparison.json, the figures and report.html, returns the exit code.

    Raises UserError for wrong arguments, and runs that cannot be read or may not be ranked.
    """
    parser = ArgumentParser(prog="main.py compare", description=__doc__)
    parser.add_argument("runs", nargs="+", help=f"run folders, globs, or a folder of runs such as {RUNS}")
    baseline = "the row to take differences to, by its name in the table; by default the first"
    parser.add_argument("--baseline", help=baseline)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what to print")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder for the files")
    at_equal = "what all runs were given the same amount of; at equal FLOPs or seconds the tokens seen may differ"
    parser.add_argument("--at-equal", choices=(TOKENS, *BUDGETS), default=TOKENS, help=at_equal)
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
