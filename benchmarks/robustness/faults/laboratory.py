"""Where a fault is injected: a folder with a corpus and configs, and judgements of the commands that ran in it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import UserError
from llmx.runs.archive import read_checkpoint
from testbed.differences import differences
from testbed.forked import ForkedProcess, forked_ranks
from testbed.tiny import TEXT, network

FAULTY_MIXER = '''
import os
import torch
from llmx.mixers.attention import Attention

class Faulty(Attention):
    """In one process, FAULTY_RANK, training call FAULTY_AT adds FAULTY_NUMBER in forward or backward, FAULTY_IN."""
    calls = 0

    def forward(self, x, context):
        mixed = super().forward(x, context)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            here = os.environ.get("LOCAL_RANK", "0") == os.environ.get("FAULTY_RANK")
            if here and self.calls == int(os.environ["FAULTY_AT"]):
                number = float(os.environ["FAULTY_NUMBER"])
                if os.environ["FAULTY_IN"] == "forward":
                    return mixed + number
                mixed.register_hook(lambda gradient: gradient + number)
        return mixed
'''


class Skipped(Exception):
    """The fault cannot be injected on this machine; the message says why."""


def config(
    mixer: str = "Attention", embedding_dropout: float = 0, dropout: float = 0, data: Any = (), trainer: Any = ()
) -> dict[str, Any]:
    """The config of a fit of 16 steps that validates every 4."""
    small = network(depth=1)
    small["init_args"]["dropout"] = embedding_dropout
    attention = small["init_args"]["block"]["init_args"]["mixer"]
    attention["class_path"] = mixer
    if dropout:
        attention["init_args"]["dropout"] = dropout
    return {
        "seed_everything": 3,
        "trainer": {
            **{"max_steps": 16, "val_check_interval": 4, "log_every_n_steps": 1, "enable_progress_bar": False},
            **{"accelerator": "cpu", "precision": "32-true", **dict(trainer)},
        },
        "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 8, **dict(data)},
        "model": {"audit": "off", "network": small},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": config(),
    "accumulation": config(trainer={"accumulate_grad_batches": 2}),
    "dropout": config("ALiBiAttention", embedding_dropout=0.2, dropout=0.2),
    "epochs": config(data={"split": [0.01, 0.1, 0.89]}),  # 6 steps an epoch
    "processes": config(embedding_dropout=0.2, trainer={"devices": 2}),
    "faulty": config("faulty.Faulty"),
    "faulty processes": config("faulty.Faulty", trainer={"devices": 2}),
}


@dataclass(frozen=True)
class FaultLaboratory:
    """A folder with a corpus and all configs. `references` holds one undisturbed run of each config."""

    folder: Path
    references: Path

    def prepare(self) -> FaultLaboratory:
        self.folder.mkdir(parents=True)
        (self.folder / "corpus.txt").write_text(TEXT)
        (self.folder / "faulty.py").write_text(FAULTY_MIXER)
        for name, settings in CONFIGS.items():
            (self.folder / f"{name}.yaml").write_text(json.dumps(settings))
        return self

    @property
    def run(self) -> Path:
        return self.folder / "lightning_logs/version_0"

    @property
    def last(self) -> Path:
        return self.run / "checkpoints/last.ckpt"

    def fit(self, name: str, *arguments: Any, environment: Any = (), **named: Any) -> list[ForkedProcess]:
        """Starts a fit of a config, in one process for each of its devices."""
        command = ["fit", "--config", f"{name}.yaml", *arguments]
        environment = {"LLMX_CACHE": str(self.folder / "cache"), **dict(environment)}
        count = CONFIGS[name]["trainer"].get("devices", 1)
        if count == 1:
            return [ForkedProcess(self.folder, command, environment, **named)]
        return forked_ranks(self.folder, command, environment, count, **named)

    def resume(self, name: str, **named: Any) -> list[ForkedProcess]:
        """Starts the same fit with --ckpt_path last, or from the beginning if it saved no checkpoint."""
        return self.fit(name, *(["--ckpt_path", "last"] if self.last.exists() else []), **named)

    def wait_for_checkpoint(self, process: ForkedProcess) -> None:
        while process.process.is_alive() and not self.last.exists():
            time.sleep(0.005)

    def seconds(self, name: str) -> float:
        """How long the steps of an undisturbed run take."""
        return json.loads((self.references / name / "metrics.json").read_text())["seconds"]

    def loss_after_resuming(self, name: str) -> str:
        """Resumes the run to its end and says what was lost."""
        return failure(self.resume(name)) or self.loss_against_reference(name)

    def loss_against_reference(self, name: str) -> str:
        """Says where the newest run differs from the undisturbed one."""
        found = sorted(path.name for path in self.run.parent.iterdir())
        newest = self.run.parent / found[-1]  # version_1 if the first run died before it saved anything
        return differences(newest, self.references / name)


def failure(processes: list[ForkedProcess], code: int = 0) -> str:
    """Says what went wrong if a process hangs or rank 0 ends with another exit code."""
    codes = [process.wait(90) for process in processes]
    if None in codes:
        return f"hangs: {[process.output[-300:] for process in processes]}"
    if codes[0] != code:
        return f"exit codes {codes}, not {code}: {processes[0].output[-600:]}"
    return ""


def wrong_refusal(processes: list[ForkedProcess], *words: str) -> str:
    """A refusal is exit code 2, one line with some words and no traceback. Says what differs."""
    if lost := failure(processes, 2):
        return lost
    output = processes[0].output
    messages = [line for line in output.splitlines() if line.startswith("error:")]
    if "Traceback" in output or len(messages) != 1 or not all(word in messages[0] for word in words):
        return f"no single message with {words}: {output[-600:]}"
    return ""


def damage(path: Path) -> str:
    """Says what is wrong with a checkpoint that has to exist and be good."""
    try:
        state = read_checkpoint(path)["state_dict"]
    except UserError as error:
        return str(error)
    return "" if all(value.isfinite().all() for value in state.values()) else f"{path.name} has numbers not finite"
