"""A run's folder: the names of its files, the claim of a new one, and JSON that is written whole or not at all.

    lightning_logs/version_0/
        config.yaml         the configuration that the run began with
        run.json            commit, versions, hardware, data, audit, continuations
        metrics.json        the final numbers; a run has ended once it exists
        val_losses.npy      the loss of each character of the validation split
        checkpoints/        last.ckpt, best.ckpt, and step=N.ckpt, which last.ckpt is a link to
        predictions/        generated text
        events.out.*        the curves, as TensorBoard's events

Every other module takes these names from here.
"""

import json
import os
from pathlib import Path
from typing import Any

from llmx.errors import UserError

RUNS = "lightning_logs"  # the folder of all runs
VERSION = "version_"  # and a number: the folder of one run
CONFIG = "config.yaml"
RECORD = "run.json"
METRICS = "metrics.json"
VAL_LOSSES = "val_losses.npy"
CHECKPOINTS = "checkpoints"
LAST, BEST = "last.ckpt", "best.ckpt"
PREDICTIONS = "predictions"
EVENTS = "events.out.tfevents"


def last_checkpoint(run: Path) -> Path:
    return run / CHECKPOINTS / LAST


def is_best(checkpoint: str | Path) -> bool:
    """Whether this is the checkpoint of the lowest validation loss, by its name."""
    return Path(checkpoint).name == BEST


def run_of(checkpoint: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def newest_run(root: Path) -> Path:
    """The last checkpoint of the newest run below a root folder; UserError if no run there has one."""
    runs = root / RUNS
    found = {
        int(number): last_checkpoint(run)
        for run in runs.glob(f"{VERSION}*")
        if (number := run.name.removeprefix(VERSION)).isdecimal() and last_checkpoint(run).is_file()
    }
    if not found:
        raise UserError(f"ckpt_path: 'last' found no run with a checkpoint below {runs}")
    return found[max(found)]


def claim_version(runs: Path, first: int) -> int:
    """Creates the folder of a new run and returns its number: `first`, or the next that no other process has taken."""
    while True:
        try:
            (runs / f"{VERSION}{first}").mkdir(parents=True)
            return first
        except FileExistsError:
            first += 1


def write_json(path: Path, content: Any) -> None:
    """Replaces the file in one step: a run that is killed meanwhile has to continue from what it holds."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
