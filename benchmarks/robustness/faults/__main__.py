"""What faults cost: injects some hundred of them, each followed by what a user would do next, and counts the losses.

A fault is a function of a laboratory (a folder of its own) and a random generator. It injects itself and returns what
was lost, "" for nothing. Trainings take a second, in forked processes of one thread.

    python -m benchmarks.robustness.faults --out docs/results/faults.json
    python -m benchmarks.robustness.faults --only kill --count 20 --seed 7
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import llmx.cli
from benchmarks.robustness.faults.checkpoints import damaged_checkpoint, flipped_weight
from benchmarks.robustness.faults.corpora import (
    broken_download,
    cache_written_by_two,
    damaged_cache,
    damaged_corpus,
    token_files_written_by_two,
)
from benchmarks.robustness.faults.divergence import not_finite
from benchmarks.robustness.faults.interruptions import (
    killed,
    killed_in_write,
    one_rank_killed,
    requeued,
    signalled,
    signalled_command,
)
from benchmarks.robustness.faults.laboratory import CONFIGS, FaultLaboratory, Skipped, failure
from benchmarks.robustness.faults.storage import checkpoints_do_not_fit, disk_full, read_only
from llmx.config.command import Command
from llmx.runs.provenance import provenance


@dataclass(frozen=True)
class Kind:
    """A kind of fault, and how often it is injected."""

    name: str
    count: int
    inject: Callable[[FaultLaboratory, Random], str]


KINDS = [
    *(Kind(f"kill: {name}", 10, partial(killed, name)) for name in ("plain", "accumulation", "dropout", "epochs")),
    Kind("kill: 2 processes", 10, partial(killed, "processes")),
    Kind("kill: one of 2 processes", 6, one_rank_killed),
    Kind("kill: while a checkpoint is written", 14, killed_in_write),
    Kind("signal: 2 processes", 8, signalled),
    Kind("signal: python main.py on 2 devices", 3, signalled_command),
    Kind("signal: SLURM requeue", 4, requeued),
    Kind("disk full", 8, disk_full),
    Kind("disk full: checkpoints only", 5, checkpoints_do_not_fit),
    Kind("read-only data, cache, runs", 3, read_only),
    Kind("download: killed, cut, changed", 12, broken_download),
    Kind("cache: built by two, one killed", 10, cache_written_by_two),
    Kind("cache: damaged", 8, damaged_cache),
    Kind("token files: written by two, one killed", 10, token_files_written_by_two),
    Kind("corpus: damaged", 6, damaged_corpus),
    *(Kind(f"checkpoint: {kind}", 8, partial(damaged_checkpoint, kind)) for kind in ("cut", "flipped", "foreign")),
    Kind("checkpoint: empty", 3, partial(damaged_checkpoint, "empty")),
    Kind("checkpoint: a weight's bit flipped", 14, flipped_weight),
    Kind("NaN or infinity", 10, partial(not_finite, "faulty")),
    Kind("NaN or infinity in one of 2 processes", 5, partial(not_finite, "faulty processes")),
]


class Outcome(NamedTuple):
    """What one fault cost: `lost` is "" for nothing, `skipped` the reason why it was not injected."""

    lost: str
    skipped: str | None


def _inject(kind: Kind, lab: FaultLaboratory, seed: str) -> Outcome:
    try:
        outcome = Outcome(kind.inject(lab.prepare(), Random(seed)), None)
    except Skipped as reason:
        outcome = Outcome("", str(reason))
    except Exception as error:  # the remaining faults have to be injected all the same
        outcome = Outcome(f"{type(error).__name__}: {error}", None)
    shutil.rmtree(lab.folder, ignore_errors=True)
    return outcome


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="the kinds whose names begin so")
    options.add_argument("--count", type=int, help="faults of each kind")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2, help="faults at a time")
    options.add_argument("--out", type=Path, help="JSON file for the result")
    chosen = options.parse_args()
    kinds = [replace(kind, count=chosen.count or kind.count) for kind in KINDS if kind.name.startswith(chosen.only)]
    if not kinds:
        options.error(f"--only: no kind begins with {chosen.only!r}; there are {', '.join(k.name for k in KINDS)}")
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcomes: dict[str, list[Outcome]] = {kind.name: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _undisturbed_runs(root)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(chosen.jobs, context) as pool, Progress(console=Console(stderr=True)) as progress:
            waiting = {}
            for kind in kinds:
                for number in range(kind.count):
                    lab = FaultLaboratory(root / f"{kinds.index(kind)}-{number}", root / "references")
                    waiting[pool.submit(_inject, kind, lab, f"{chosen.seed} {kind.name} {number}")] = kind, number
            task = progress.add_task("faults", total=len(waiting))
            for future in as_completed(waiting):
                kind, number = waiting[future]
                outcome = future.result()
                outcomes[kind.name].append(outcome)
                if outcome.lost:
                    progress.console.print(f"[red]{kind.name} {number}[/red]: {outcome.lost}", markup=True)
                progress.advance(task)
    return _report(outcomes, chosen, time.perf_counter() - started)


def _undisturbed_runs(root: Path) -> None:
    lab = FaultLaboratory(root / "first", root / "references").prepare()
    lab.references.mkdir()
    # imports what all forks need
    llmx.cli.parse(Command.read(["fit", "--config", str(lab.folder / "plain.yaml")]))
    for name in CONFIGS:
        if lost := failure(lab.fit(name)):
            raise RuntimeError(f"the undisturbed run of {name}: {lost}")
        lab.run.rename(lab.references / name)


def _report(outcomes: dict[str, list[Outcome]], chosen: Any, seconds: float) -> int:
    """Prints the table, writes the JSON file, and returns the exit code: 1 if anything was lost."""
    table = Table("fault", "injected", "skipped", "lost something", title="what faults cost")
    rows: list[dict[str, Any]] = []
    for name, results in outcomes.items():
        skipped = [outcome.skipped for outcome in results if outcome.skipped is not None]
        lost = [outcome.lost for outcome in results if outcome.lost]
        rows.append({"fault": name, "injected": len(results) - len(skipped), "lost": lost, "skipped": skipped[:1]})
        table.add_row(name, str(len(results) - len(skipped)), str(len(skipped)), str(len(lost)))
    sums = {"injected": sum(row["injected"] for row in rows), "lost": sum(len(row["lost"]) for row in rows)}
    table.add_row("all", str(sums["injected"]), "", str(sums["lost"]))
    Console().print(table)
    if chosen.out is not None:
        record = {"date": date.today().isoformat(), **provenance(), "seed": chosen.seed, "seconds": round(seconds)}
        chosen.out.write_text(json.dumps({**record, **sums, "faults": rows}, indent=2) + "\n")
    return int(sums["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
