"""Draws the curves of finished or running runs and writes them as a small JSON file.

python -m llmx.runs.curves lightning_logs/version_0 lightning_logs/version_1 --out docs/results/mine
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmx.errors import UserError
from llmx.runs.record import Curve, Run, read_run

TAGS = ("train/loss", "val/loss", "val/perplexity", "lr")


def named(runs: list[Run]) -> dict[str, Run]:
    """The runs by name; runs of one name are told apart by their folders."""
    count = Counter(run.name for run in runs)
    return {run.name if count[run.name] == 1 else f"{run.name} ({run.folder})": run for run in runs}


def loss_figure(runs: dict[str, Run]) -> Figure:
    """Training loss (a running median), validation loss and perplexity against steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, perplexity = figure.subplots(1, 2)
    for index, (name, run) in enumerate(runs.items()):
        color, label = f"C{index}", f"{name}{' (LEAKING)' if run.leaking else ''}"
        steps, values = _smooth(run.curves["train/loss"])
        loss.plot(steps, values, color=color, alpha=0.45, linewidth=1, label=f"{label}, train")
        loss.plot(*zip(*run.curves["val/loss"], strict=True), color=color, label=f"{label}, val")
        perplexity.plot(*zip(*run.curves["val/perplexity"], strict=True), color=color, label=label)
    _finish(loss, ylabel="nats per character", title="loss", ylim=(0.6, 2.6))
    _finish(perplexity, title="validation perplexity", ylim=(1, 10))
    return figure


def schedule_figure(runs: dict[str, Run]) -> Figure:
    """The learning rate against steps."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        if "lr" in run.curves:
            axes.plot(*zip(*run.curves["lr"], strict=True), label=name)
    _finish(axes, ylabel="learning rate", title="schedule", ylim=(0, None))
    return figure


def _finish(axes: Axes, **settings: Any) -> None:
    axes.set(xlabel="step", **settings)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss, perplexity and schedule of runs as PNG and JSON.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for loss.png, schedule.png and runs.json")
    arguments = parser.parse_args()
    try:
        runs = named([read_run(folder) for folder in arguments.runs])
    except UserError as error:
        sys.exit(f"error: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    loss_figure(runs).savefig(arguments.out / "loss.png", dpi=110)
    schedule_figure(runs).savefig(arguments.out / "schedule.png", dpi=110)
    content = []
    for name, run in runs.items():
        curves = {tag: _thin(run.curves[tag]) for tag in TAGS if tag in run.curves}
        content.append({"name": name, "record": run.record, "metrics": run.metrics, "curves": curves})
    (arguments.out / "runs.json").write_text(json.dumps(content) + "\n")


def _smooth(curve: Curve, width: int = 15) -> tuple[np.ndarray, np.ndarray]:
    steps, values = (np.array(column) for column in zip(*curve, strict=True))
    if len(values) < 2 * width:
        return steps, values
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
    return steps[width // 2 : width // 2 + len(medians)], medians


def _thin(curve: Curve, most: int = 200) -> Curve:
    """At most that many points, the last one included; values have five digits."""
    stride = -(-len(curve) // most)
    return [(step, float(f"{value:.5g}")) for step, value in curve[::-1][::stride][::-1]]


if __name__ == "__main__":
    main()
