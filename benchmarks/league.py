"""The league: every architecture of configs/ under one protocol, at its own best learning rate, over fresh seeds.

nohup python -m benchmarks.league &              # all architectures, those that are done excepted
nohup python -m benchmarks.league --long &       # the best and the classics again, for longer, with the rates found
python -m benchmarks.league llama gru            # these alone
python -m benchmarks.league --page               # docs/league.md and its figure, of what there is

For each architecture three learning rates, that of its config, a third and three times as much, are run with one seed,
and where the best is the lowest or the highest of them, one rate more beyond it. The best rate is then run with fresh
seeds, which are what is reported: the seed that chose the rate was lucky with it. Whatever does not fit in is listed
apart, with the reason.

Every run is a process of its own, of low priority, and becomes a line of docs/results/league/NAME.json as soon as it
ends. So the command goes on where it was stopped; and it may be started as often as there are cores to use (or clones:
files of one architecture each merge), for an architecture is locked by the instance that is at it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.collection import CONFIGS, collection
from benchmarks.harness import CHECKOUT, use_threads
from llmx.base_config import read_config
from llmx.cli import execute
from llmx.errors import UserError

RESULTS = CHECKOUT / "docs" / "results" / "league"
RUNS = CHECKOUT / "lightning_logs" / "league"  # what a run keeps while it goes on
BASELINE = "transformer"
CLASSICS = (BASELINE, "transformer_2017", "gpt2", "llama", "lstm", "gru", "mamba")
BEST = 10  # go on to the long stage, with the classics

PARAMETERS = 800_000
WITHIN = 0.05
VOCABULARY = 65  # of the corpus
WINDOW = 128
SPACING = 3.0  # from one learning rate to the next
SELECTING = 1  # the seed that chooses the rate
VALIDATE_EVERY = 1000  # steps; what is stopped goes on from there
BLOCK = 500  # characters whose losses are kept as one mean
PROTOCOL = {
    "data.corpus": "tinyshakespeare",
    "data.offline_corpus": "null",
    "data.window": str(WINDOW),
    "data.batch_size": "16",
    "data.sampling": "random",
    "trainer.gradient_clip_val": "1.0",
    "trainer.precision": "32-true",
    "trainer.val_check_interval": str(VALIDATE_EVERY),
    "trainer.enable_progress_bar": "false",
    "model.compile": "false",
}
# why this precision, for the page
PRECISION_NOTE = (
    "fp32, so that any processor can add rows: one without bf16 arithmetic is many times slower in mixed bf16. On one "
    "thread of an AMD EPYC with AVX512-BF16 mixed bf16 would be 1.8 times as fast for the transformer and minLSTM, 1.5 "
    "for GRU, 1.1 to 1.3 for GLA, Mamba and Titans, and no faster for RWKV-7."
)
# what the protocol has some configs say otherwise: of the window, and of the width of experts, so that those of a layer
# together are as large as a feed-forward part (as `describe --match parameters` has it)
ADAPTED = {
    "gpt2": {"model.network.embedding.max_length": str(WINDOW)},
    "hyena": {"model.network.block.mixer.max_length": str(WINDOW)},
    "moe": {"model.network.block.feed_forward.hidden": "42"},
    "deepseek_moe": {"model.network.block.feed_forward.hidden": "20"},
    "jamba": {
        f"model.network.block.blocks.{layer}.feed_forward.hidden": hidden
        for layer, hidden in enumerate(("97", "48", "97", "48"))
    },
}
# its optimizer and schedule are those of an experiment of its own; here it has the same as all others
RETRAINED = (BASELINE,)


@dataclass(frozen=True)
class Stage:
    """How long, and over which seeds, none of which has chosen anything before."""

    name: str
    steps: int
    seeds: tuple[int, ...]


SHORT = Stage("short", 1000, (2, 3, 4))
LONG = Stage("long", 5000, (5, 6, 7))
STAGES = (SHORT, LONG)


class Trial(NamedTuple):
    """One run: of an architecture in a stage, at a learning rate, from a seed."""

    name: str
    stage: Stage
    rate: float
    seed: int


@dataclass
class Entry:
    """An architecture's file.

    config: what stands for the network and its recipe; the runs of another one are of no use
    rate:   the learning rate of the config, the middle of those that are tried
    counts: nothing is trained and nothing drawn, so that one run says all
    apart:  why it has no place in the table, where that is known before any run
    runs:   with stage, rate and seed; `loss` is None where training diverged
    """

    name: str
    config: str
    rate: float
    parameters: int | None
    training_flops_per_token: float | None
    counts: bool
    apart: str | None
    runs: list[dict[str, Any]]

    def losses(self, stage: Stage, rate: float, seeds: tuple[int, ...]) -> dict[int, float]:
        """By seed, infinite where training diverged; of the seeds that have been run."""
        return {
            run["seed"]: math.inf if run["loss"] is None else run["loss"]
            for run in self.runs
            if (run["stage"], run["rate"]) == (stage.name, rate) and run["seed"] in seeds
        }

    def tried(self) -> dict[float, float]:
        """The loss of each learning rate that was tried to choose one, from the lowest rate on."""
        found = {r: self.losses(SHORT, r, (SELECTING,)) for r in sorted({run["rate"] for run in self.runs})}
        return {rate: losses[SELECTING] for rate, losses in found.items() if losses}

    def best_rate(self) -> float | None:
        """None as long as one is still to be tried, and where training diverged at all."""
        tried = self.tried()
        if self.counts or _rate_to_try(self.rate, tried) is not None or min(tried.values()) == math.inf:
            return None
        return min(tried, key=lambda rate: tried[rate])

    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried: there may be a better one beyond."""
        return self.best_rate() in (min(self.tried()), max(self.tried()))

    def reported(self, stage: Stage) -> list[dict[str, Any]]:
        """The runs of fresh seeds at the best rate, by seed."""
        rate = self.best_rate()
        runs = [run for run in self.runs if (run["stage"], run["rate"]) == (stage.name, rate)]
        return sorted((run for run in runs if run["seed"] in stage.seeds), key=lambda run: run["seed"])

    def complete(self, stage: Stage) -> bool:
        """Whether the stage has a mean to report."""
        runs = self.reported(stage)
        return len(runs) == len(stage.seeds) and all(run["loss"] is not None for run in runs)

    def next_trial(self, stage: Stage) -> Trial | None:
        """What is to be run next; None where nothing is left, or nothing can be."""
        if self.apart is not None:
            return None
        if self.counts:
            return None if self.runs or stage is not SHORT else Trial(self.name, stage, self.rate, SELECTING)
        if stage is SHORT and (rate := _rate_to_try(self.rate, self.tried())) is not None:
            return Trial(self.name, stage, rate, SELECTING)
        best = self.best_rate()
        if best is None:
            return None
        done = self.losses(stage, best, stage.seeds)
        return next((Trial(self.name, stage, best, seed) for seed in stage.seeds if seed not in done), None)


def _rate_to_try(middle: float, tried: dict[float, float]) -> float | None:
    """Three around the middle; then, where the best is at an edge of the three, one more beyond it."""
    first = [_rounded(middle * SPACING**power) for power in (0, -1, 1)]
    for rate in first:
        if rate not in tried:
            return rate
    best = min(tried, key=lambda rate: tried[rate])
    if len(tried) > len(first) or best == first[0] or tried[best] == math.inf:
        return None
    return _rounded(best * (SPACING if best > first[0] else 1 / SPACING))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


# ------------------------------------------------------------------------------------------------------------- entries
def names() -> list[str]:
    """All architectures, the baseline first."""
    return [BASELINE, *collection()]


def recipe(name: str) -> dict[str, Any]:
    """Optimizer and schedule of a config, which are base.yaml's but for what belongs to a method."""
    model = read_config(CONFIGS / f"{'base' if name in RETRAINED else name}.yaml")["model"]
    return {key: model[key] for key in ("optimizer", "schedule")}


def fingerprint(name: str) -> str:
    """Changes with whatever of a config, and of the protocol, has a say in the runs."""
    network = read_config(CONFIGS / f"{name}.yaml")["model"]["network"]
    said = json.dumps([network, recipe(name), ADAPTED.get(name), PROTOCOL], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def new_entry(name: str) -> Entry:
    """What is known of an architecture before any run.

    Raises:
        UserError: where there is no such config.
    """
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"names: there is no {path}")
    optimizer = recipe(name)["optimizer"]
    entry = Entry(name, fingerprint(name), optimizer["init_args"]["lr"], None, None, False, None, [])
    arguments = ["--config", str(path), *_flags({"data.window": str(WINDOW)} | ADAPTED.get(name, {}))]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            execute(["describe", *arguments, "--format", "json", "--vocab_size", str(VOCABULARY)])
    except UserError as error:
        entry.apart = str(error)
        return entry
    network = json.loads(said.getvalue())
    entry.parameters, entry.training_flops_per_token = network["parameters"], network["training_flops_per_token"]
    entry.counts = entry.parameters == 0
    if read_config(path)["model"].get("audit") == "warn":
        entry.apart = "LEAKING: it sees the future"
    elif not entry.counts and abs(entry.parameters / PARAMETERS - 1) > WITHIN:
        entry.apart = f"not within {WITHIN:.0%} of {PARAMETERS:,} parameters"
    elif optimizer["class_path"] != "torch.optim.AdamW":
        entry.apart = f"trained by {optimizer['class_path']} instead of AdamW"
    return entry


def read_entry(path: Path) -> Entry:
    return Entry(**json.loads(path.read_text(encoding="utf-8")))


def read_entries() -> list[Entry]:
    """All that have been begun, by name."""
    return [read_entry(path) for path in sorted(RESULTS.glob("*.json"))]


def write_entry(entry: Entry) -> None:
    """Whole or not at all; a line a run."""
    head = json.dumps(asdict(entry) | {"runs": []}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in entry.runs)
    text = head.replace('"runs": []', f'"runs": [\n{runs}\n ]') if runs else head
    RESULTS.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS / f".{entry.name}.{os.getpid()}"
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(RESULTS / f"{entry.name}.json")


# ------------------------------------------------------------------------------------------------------------- running
def run_architecture(name: str, stage: Stage) -> Entry | None:
    """Runs what the stage still lacks of an architecture; None where another instance is at it.

    Runs of a config that has changed since are dropped.

    Raises:
        UserError: for an unknown architecture.
        RuntimeError: where a run fails otherwise than by diverging.
    """
    with locked(RUNS / f"{name}.lock") as lock:
        if lock is None:
            return None
        path = RESULTS / f"{name}.json"
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
    """The file of a lock, None where somebody holds it. Whoever dies lets go, once the run that it has begun ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


def folder(trial: Trial) -> Path:
    """Of a run that goes on."""
    return RUNS / f"{trial.name}-{fingerprint(trial.name)}" / f"{trial.stage.name}-{trial.rate:g}-{trial.seed}"


def run_fit(trial: Trial, lock: int) -> dict[str, Any]:
    """`fit` in a process of its own, which goes on from a checkpoint where it has left one, and holds the lock, too.

    Raises:
        RuntimeError: with the end of what it said, where it fails.
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
            said = (result.stderr or result.stdout).strip()
            raise RuntimeError(f"{' '.join(command)} ended with exit code {result.returncode}: {said[-500:]}")
    return _kept(run, trial)


def fit_command(trial: Trial, place: Path) -> list[str]:
    settings = recipe(trial.name)
    arguments = settings["optimizer"]["init_args"] | {"lr": trial.rate}
    flags = {f"model.optimizer.init_args.{key}": json.dumps(value) for key, value in arguments.items()}
    flags |= {f"model.schedule.init_args.{k}": json.dumps(v) for k, v in settings["schedule"]["init_args"].items()}
    flags |= PROTOCOL | ADAPTED.get(trial.name, {})
    flags |= {"seed_everything": str(trial.seed), "trainer.max_steps": str(trial.stage.steps)}
    flags |= {"trainer.default_root_dir": str(place)}
    config = str(CONFIGS / f"{trial.name}.yaml")
    return [sys.executable, str(CHECKOUT / "main.py"), "fit", "--config", config, *_flags(flags)]


def _flags(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def _kept(run: Path, trial: Trial) -> dict[str, Any]:
    """A few hundred bytes of a finished run; of a long one, also what paired statistics over the text need."""
    metrics = json.loads((run / "metrics.json").read_text())
    seconds = metrics["seconds"] * metrics["step"] / metrics["steps_in_these_seconds"]  # of a resumed run, by the rest
    kept = {"loss": round(metrics["val/loss"], 5), "seconds": round(seconds)} | _origin(run)
    if trial.stage.name == LONG.name:
        losses = np.load(run / "val_losses.npy").astype(np.float64)
        blocks = losses[: len(losses) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
        kept["block_means"] = [round(value, 4) for value in blocks.tolist()]
    return kept


def _origin(run: Path) -> dict[str, Any]:
    """What the run was made with, as its folder tells: what all must share, what they may differ in, and where."""
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
    """Whether the code is no longer that of the commit; results may be."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", "llmx", "configs", "main.py"]
    return bool(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout)


# ---------------------------------------------------------------------------------------------------------------- main
def finalists(entries: list[Entry]) -> list[str]:
    """The best of the short stage, and the classics, as far as they are through with it."""
    done = [entry for entry in entries if entry.apart is None and entry.complete(SHORT)]
    ranked = sorted(done, key=lambda entry: float(np.mean([run["loss"] for run in entry.reported(SHORT)])))
    chosen = [entry.name for entry in ranked[:BEST]]
    return chosen + [name for name in CLASSICS if name not in chosen and name in {entry.name for entry in done}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; if none is named all, or those that go on to --long")
    parser.add_argument("--long", action="store_true", help=f"{LONG.steps:,} steps in place of {SHORT.steps:,}")
    parser.add_argument("--threads", type=int, default=1, help="threads of every run")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args()
    if options.page:
        from benchmarks.league_page import write_page

        write_page()
        return 0
    use_threads(options.threads)
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the run that goes on with it
    stage = LONG if options.long else SHORT
    failed = 0
    for name in options.names or (finalists(read_entries()) if options.long else names()):
        try:
            entry = run_architecture(name, stage)
        except (RuntimeError, UserError) as error:  # the others go on
            failed += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
            continue
        if entry is None:
            print(f"{name}: another instance is at it", flush=True)
        elif entry.apart is not None:
            print(f"{name}: apart: {entry.apart}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
