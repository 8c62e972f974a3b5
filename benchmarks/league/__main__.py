"""The league: every architecture of configs/ under one protocol, at its own best learning rate, over fresh seeds.

nohup python -m benchmarks.league &              # all architectures that are not done
nohup python -m benchmarks.league --long &       # the best and the classics again, for longer, with the rates found
python -m benchmarks.league llama gru            # only these
python -m benchmarks.league --page               # writes docs/league.md and its figure from all results

Each architecture first runs with one seed at three learning rates: its config's, a third of it and three times it. If
the best is the lowest or highest, one more rate beyond it runs. The best rate then runs with fresh seeds. Only these
are reported, because the seed that chose the rate was lucky with it. Architectures that do not fit the protocol are
listed apart, with the reason.

Every run is a process of low priority and becomes a line of docs/results/league/NAME.json as soon as it ends. So a
stopped command continues where it stopped. It may also be started once for every free core, or in several clones (the
files merge, one an architecture), because an instance locks the architecture that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.harness import CHECKOUT, use_threads
from benchmarks.league import entries, page
from benchmarks.league.entries import (
    BLOCK,
    LONG,
    SHORT,
    Entry,
    Stage,
    Trial,
    finalists,
    fingerprint,
    flags_of,
    names,
    new_entry,
    read_entries,
    read_entry,
    recipe,
    write_entry,
)
from llmx.errors import UserError

RUNS = CHECKOUT / "lightning_logs" / "league"  # folders of unfinished runs


def run_architecture(name: str, stage: Stage) -> Entry | None:
    """Runs the missing trials of an architecture in a stage; None if another instance is running it.

    Drops runs of an older version of the config.

    Raises:
        UserError: for an unknown architecture.
        RuntimeError: if a run fails other than by diverging.
    """
    with locked(RUNS / f"{name}.lock") as lock:
        if lock is None:
            return None
        path = entries.RESULTS / f"{name}.json"
        entry = read_entry(path) if path.is_file() else None
        if entry is None or entry.apart is not None or entry.config != fingerprint(name):
            entry = new_entry(name)
            write_entry(entry)
        while (trial := entry.next_trial(stage)) is not None:
            run = run_fit(trial, lock)
            entry.runs.append({"stage": stage.name, "rate": trial.rate, "seed": trial.seed, **run})
            write_entry(entry)
            shutil.rmtree(folder(trial), ignore_errors=True)
            outcome = "diverged" if run["loss"] is None else f"{run['loss']:.4f} after {run['seconds']} s"
            what = "counted" if entry.counts else f"{stage.steps:,} steps at {trial.rate:g}, seed {trial.seed}"
            print(f"{name}: {what}: {outcome}", flush=True)
        return entry


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """The descriptor of a lock file, None if another process holds it. A dead process keeps it until its run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


def folder(trial: Trial) -> Path:
    """The folder of an unfinished run."""
    return RUNS / f"{trial.name}-{fingerprint(trial.name)}" / f"{trial.stage.name}-{trial.rate:g}-{trial.seed}"


def run_fit(trial: Trial, lock: int) -> dict[str, Any]:
    """Runs `fit` in another process, which also holds the lock; resumes from the run's checkpoint if there is one.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    place = folder(trial)
    run = place / "lightning_logs" / "version_0"
    resume = (run / "checkpoints" / "last.ckpt").is_file()
    if not (run / "metrics.json").is_file():
        for resuming in (True, False) if resume else (False,):
            if not resuming:
                shutil.rmtree(place, ignore_errors=True)
            command = [*fit_command(trial, place), *(("--ckpt_path", "last") if resuming else ())]
            result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, pass_fds=(lock,))
            if result.returncode == 0:
                break
            if "training has diverged" in result.stderr:
                return {"loss": None} | _origin(run)
        else:
            output = (result.stderr or result.stdout).strip()
            raise RuntimeError(f"{' '.join(command)} ended with exit code {result.returncode}: {output[-500:]}")
    return _kept(run, trial)


def fit_command(trial: Trial, place: Path) -> list[str]:
    settings = recipe(trial.name)
    arguments = settings["optimizer"]["init_args"] | {"lr": trial.rate}
    flags = {f"model.optimizer.init_args.{key}": json.dumps(value) for key, value in arguments.items()}
    flags |= {f"model.schedule.init_args.{k}": json.dumps(v) for k, v in settings["schedule"]["init_args"].items()}
    flags |= entries.PROTOCOL | entries.ADAPTED.get(trial.name, {})
    flags |= {"seed_everything": str(trial.seed), "trainer.max_steps": str(trial.stage.steps)}
    flags |= {"trainer.default_root_dir": str(place)}
    config = str(entries.CONFIGS / f"{trial.name}.yaml")
    return [sys.executable, str(CHECKOUT / "main.py"), "fit", "--config", config, *flags_of(flags)]


def _kept(run: Path, trial: Trial) -> dict[str, Any]:
    """A few hundred bytes of a finished run; of a long one also the block means for paired statistics over the text."""
    metrics = json.loads((run / "metrics.json").read_text())
    seconds = (
        metrics["seconds"] * metrics["step"] / metrics["steps_in_these_seconds"]
    )  # a resumed run times only the rest
    kept = {"loss": round(metrics["val/loss"], 5), "seconds": round(seconds)} | _origin(run)
    if trial.stage.name == LONG.name:
        losses = np.load(run / "val_losses.npy").astype(np.float64)
        blocks = losses[: len(losses) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
        kept["block_means"] = [round(value, 4) for value in blocks.tolist()]
    return kept


def _origin(run: Path) -> dict[str, Any]:
    """Reads from a run's folder what all runs must share (protocol), may differ in (recipe), and where it ran."""
    record = json.loads((run / "run.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    hardware = record["hardware"]
    shared = ("corpus", "sha256", "split", "window", "batch_size", "sampling", "val_stride", "val_count")
    protocol = {key: record["data"][key] for key in shared}
    protocol |= {key: record[key] for key in ("steps", "precision", "compiled")}
    protocol |= {"gradient_clip_val": config["trainer"]["gradient_clip_val"]}
    optimizer, schedule = config["model"]["optimizer"], config["model"]["schedule"]
    recipe = {"optimizer": optimizer["class_path"], "schedule": schedule["class_path"].rsplit(".", 1)[-1]}
    recipe |= {key: optimizer["init_args"][key] for key in ("betas", "weight_decay")}
    recipe |= {key: schedule["init_args"][key] for key in ("warmup_steps", "minimum_ratio")}
    return {
        "protocol": protocol,
        "recipe": recipe,
        "commit": record["commit"][:12] + ("+" if _changed() else ""),
        "torch": record["versions"]["torch"],
        "device": (hardware["cuda"] or [hardware["processor"]])[0],
        "threads": hardware["threads"],
    }


def _changed() -> bool:
    """Whether the code differs from the commit; results may differ."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", "llmx", "configs", "main.py"]
    return bool(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures (default: all, or with --long the finalists)")
    parser.add_argument("--long", action="store_true", help=f"{LONG.steps:,} steps instead of {SHORT.steps:,}")
    parser.add_argument("--threads", type=int, default=1, help="threads of every run")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args()
    if options.page:
        page.write_page()
        return 0
    use_threads(options.threads)
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the current run too
    stage = LONG if options.long else SHORT
    failed = 0
    for name in options.names or (finalists(read_entries()) if options.long else names()):
        try:
            entry = run_architecture(name, stage)
        except (RuntimeError, UserError) as error:  # the others still run
            failed += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
            continue
        if entry is None:
            print(f"{name}: another instance is running it", flush=True)
        elif entry.apart is not None:
            print(f"{name}: apart: {entry.apart}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
