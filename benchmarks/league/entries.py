"""The league's protocol, its stages, and the file of an architecture's runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.collection import CONFIGS, collection
from benchmarks.harness import CHECKOUT
from llmx.cli import execute
from llmx.config.base_files import read_config
from llmx.config.command import Command
from llmx.errors import UserError

RESULTS = CHECKOUT / "docs" / "results" / "league"
BASELINE = "transformer"
CLASSICS = (BASELINE, "transformer_2017", "gpt2", "llama", "lstm", "gru", "mamba")
BEST = 10  # architectures that continue to the long stage, beside the classics

PARAMETERS = 800_000
WITHIN = 0.05
VOCABULARY = 65  # vocabulary size of the corpus
WINDOW = 128
SPACING = 3.0  # ratio of neighbouring learning rates
SELECTING = 1  # the seed that chooses the rate
VALIDATE_EVERY = 1000  # steps; a stopped run resumes from its last validation
BLOCK = 500  # characters whose mean loss is kept as one number
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
# the page says why the precision is fp32
PRECISION_NOTE = (
    "fp32, so that any processor can add rows: one without bf16 arithmetic is many times slower in mixed bf16. On one "
    "thread of an AMD EPYC with AVX512-BF16 mixed bf16 would be 1.8 times as fast for the transformer and minLSTM, 1.5 "
    "for GRU, 1.1 to 1.3 for GLA, Mamba and Titans, and no faster for RWKV-7."
)
# The protocol changes these keys of some configs: lengths that depend on the window, and the width of experts. All
# experts of a layer together are as large as a feed-forward part (from `describe --match parameters`).
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
# its config has the optimizer and schedule of another experiment; here it has those of all others
RETRAINED = (BASELINE,)


@dataclass(frozen=True)
class Stage:
    """A number of steps and fresh seeds: no seed has chosen a learning rate before."""

    name: str
    steps: int
    seeds: tuple[int, ...]


SHORT = Stage("short", 1000, (2, 3, 4))
LONG = Stage("long", 5000, (5, 6, 7))
STAGES = (SHORT, LONG)


class Trial(NamedTuple):
    """One run of an architecture."""

    name: str
    stage: Stage
    rate: float
    seed: int


@dataclass
class Entry:
    """An architecture's file.

    config: fingerprint of the network and its recipe; runs with another fingerprint are dropped
    rate:   the learning rate of the config, the middle of the tried ones
    counts: the network counts and is not trained, so one run is enough
    apart:  why it has no place in the table, if that is known before any run
    runs:   with stage, rate and seed; `loss` is None if training diverged
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
        """seed -> loss of the runs so far, infinite if training diverged."""
        return {
            run["seed"]: math.inf if run["loss"] is None else run["loss"]
            for run in self.runs
            if (run["stage"], run["rate"]) == (stage.name, rate) and run["seed"] in seeds
        }

    def tried(self) -> dict[float, float]:
        """learning rate -> loss with the selecting seed, from the lowest rate on."""
        found = {r: self.losses(SHORT, r, (SELECTING,)) for r in sorted({run["rate"] for run in self.runs})}
        return {rate: losses[SELECTING] for rate, losses in found.items() if losses}

    def best_rate(self) -> float | None:
        """The rate with the lowest loss; None while a rate is missing, and if training diverged at all of them."""
        tried = self.tried()
        if self.counts or _rate_to_try(self.rate, tried) is not None or min(tried.values()) == math.inf:
            return None
        return min(tried, key=lambda rate: tried[rate])

    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest tried rate, so that a better one may lie beyond."""
        return self.best_rate() in (min(self.tried()), max(self.tried()))

    def reported(self, stage: Stage) -> list[dict[str, Any]]:
        """The runs of fresh seeds at the best rate, by seed."""
        rate = self.best_rate()
        runs = [run for run in self.runs if (run["stage"], run["rate"]) == (stage.name, rate)]
        return sorted((run for run in runs if run["seed"] in stage.seeds), key=lambda run: run["seed"])

    def complete(self, stage: Stage) -> bool:
        """Whether all runs of a stage have a loss, so that there is a mean to report."""
        runs = self.reported(stage)
        return len(runs) == len(stage.seeds) and all(run["loss"] is not None for run in runs)

    def next_trial(self, stage: Stage) -> Trial | None:
        """The next run of a stage, None if there is none."""
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
    """The next of three rates around the middle; if the best is at an edge, one more beyond it."""
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


def names() -> list[str]:
    """All architectures, the baseline first."""
    return [BASELINE, *collection()]


def recipe(name: str) -> dict[str, Any]:
    """Optimizer and schedule of a config: base.yaml's, except where a method has its own."""
    model = read_config(CONFIGS / f"{'base' if name in RETRAINED else name}.yaml")["model"]
    return {key: model[key] for key in ("optimizer", "schedule")}


def fingerprint(name: str) -> str:
    """A hash of all parts of the config and the protocol that affect the runs."""
    network = read_config(CONFIGS / f"{name}.yaml")["model"]["network"]
    parts = json.dumps([network, recipe(name), ADAPTED.get(name), PROTOCOL], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def new_entry(name: str) -> Entry:
    """The entry of an architecture before any run.

    Raises:
        UserError: if there is no such config.
    """
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"names: there is no {path}")
    optimizer = recipe(name)["optimizer"]
    entry = Entry(name, fingerprint(name), optimizer["init_args"]["lr"], None, None, False, None, [])
    arguments = ["--config", str(path), *flags_of({"data.window": str(WINDOW)} | ADAPTED.get(name, {}))]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            execute(Command.read(["describe", *arguments, "--format", "json", "--vocab_size", str(VOCABULARY)]))
    except UserError as error:
        entry.apart = str(error)
        return entry
    network = json.loads(output.getvalue())
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
    """All architectures with a file, by name."""
    return [read_entry(path) for path in sorted(RESULTS.glob("*.json"))]


def write_entry(entry: Entry) -> None:
    """Writes the file atomically, one line a run."""
    head = json.dumps(asdict(entry) | {"runs": []}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in entry.runs)
    text = head.replace('"runs": []', f'"runs": [\n{runs}\n ]') if runs else head
    RESULTS.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS / f".{entry.name}.{os.getpid()}"
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(RESULTS / f"{entry.name}.json")


def finalists(entries: list[Entry]) -> list[str]:
    """The architectures of the long stage: the best of the short stage, and the classics that have finished it."""
    done = [entry for entry in entries if entry.apart is None and entry.complete(SHORT)]
    ranked = sorted(done, key=lambda entry: float(np.mean([run["loss"] for run in entry.reported(SHORT)])))
    chosen = [entry.name for entry in ranked[:BEST]]
    return chosen + [name for name in CLASSICS if name not in chosen and name in {entry.name for entry in done}]


def flags_of(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]
