"""Curves of finished or running runs as figures and small JSON files, read from their folders alone.

python -m llmx.runs.curves lightning_logs/version_0 lightning_logs/version_1 --out docs/results/mine
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmx.config.command import config_arguments
from llmx.errors import UserError

Curve = list[tuple[int, float]]  # (step, value)
TAGS = ("train/loss", "val/loss", "val/perplexity", "lr")


def read_run(folder: str | Path) -> dict[str, Any]:
    """`name`, `record` (run.json), `metrics` (metrics.json, empty while the run goes on) and `curves` of a run.

    Raises:
        UserError: where the folder is no run.
    """
    folder = Path(folder)
    record = folder / "run.json"
    if not record.is_file():
        raise UserError(f"{folder} is no run: it has no run.json")
    curves = read_curves(folder)
    metrics = folder / "metrics.json"
    return {
        "name": _name(folder),
        "record": json.loads(record.read_text()),
        "metrics": json.loads(metrics.read_text()) if metrics.is_file() else {},
        "curves": {tag: curves[tag] for tag in TAGS if tag in curves},
    }


def read_curves(folder: Path) -> dict[str, Curve]:
    """All scalars of a run's TensorBoard events, by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def name_of(command: list[str]) -> str | None:
    """The names of the config files of a command line, as in `lstm + ingredients/muon`; inline ones have none."""
    files = [Path(value).with_suffix("") for value in config_arguments(command) if not value.lstrip().startswith("{")]
    short = [x.as_posix().rpartition("configs/")[2] if "configs" in x.parts else x.name for x in files]
    return " + ".join(short) or None


def loss_figure(runs: list[dict[str, Any]]) -> Figure:
    """Training loss (a running median) and validation loss against steps, and the perplexity beside them."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, perplexity = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        curves, color = run["curves"], f"C{index}"
        mark = " (LEAKING)" if run["record"]["leaking"] else ""
        steps, values = _smooth(curves["train/loss"])
        loss.plot(steps, values, color=color, alpha=0.45, linewidth=1, label=f"{run['name']}{mark}, train")
        loss.plot(*zip(*curves["val/loss"], strict=True), color=color, label=f"{run['name']}{mark}, val")
        perplexity.plot(*zip(*curves["val/perplexity"], strict=True), color=color, label=f"{run['name']}{mark}")
    loss.set(xlabel="step", ylabel="nats per character", title="loss", ylim=(0.6, 2.6))
    perplexity.set(xlabel="step", title="validation perplexity", ylim=(1, 10))
    for axes in (loss, perplexity):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def schedule_figure(runs: list[dict[str, Any]]) -> Figure:
    """The learning rate against steps."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for run in (run for run in runs if "lr" in run["curves"]):
        axes.plot(*zip(*run["curves"]["lr"], strict=True), label=run["name"])
    axes.set(xlabel="step", ylabel="learning rate", title="schedule", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss, perplexity and schedule of runs as PNG and JSON.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for loss.png, schedule.png and runs.json")
    arguments = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in arguments.runs]
    except UserError as error:
        sys.exit(f"error: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    loss_figure(runs).savefig(arguments.out / "loss.png", dpi=110)
    schedule_figure(runs).savefig(arguments.out / "schedule.png", dpi=110)
    for run in runs:
        run["curves"] = {tag: _thin(curve) for tag, curve in run["curves"].items()}
    (arguments.out / "runs.json").write_text(json.dumps(runs) + "\n")


def _name(folder: Path) -> str:
    """The configuration's name where the command line tells it, else the folder's."""
    name = name_of(json.loads((folder / "run.json").read_text())["command"])
    if name is not None:
        return name
    network = yaml.safe_load((folder / "config.yaml").read_text())["model"]["network"]["class_path"]
    return f"{network.rsplit('.', 1)[-1]} ({folder.name})"


def _smooth(curve: Curve, width: int = 15) -> tuple[np.ndarray, np.ndarray]:
    steps, values = (np.array(column) for column in zip(*curve, strict=True))
    if len(values) < 2 * width:
        return steps, values
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
    return steps[width // 2 : width // 2 + len(medians)], medians


def _thin(curve: Curve, most: int = 200) -> Curve:
    """At most that many points, the last one among them; values with five digits."""
    stride = -(-len(curve) // most)
    kept = curve[::-1][::stride][::-1]
    return [(step, float(f"{value:.5g}")) for step, value in kept]


if __name__ == "__main__":
    main()
