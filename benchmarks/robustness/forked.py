"""Commands of llmx in forked processes, and whether two runs are the same run.

A fork of a process that has imported torch starts in no time, where a new one imports for seconds; so hundreds of
commands can be run, killed and run again. The process that forks must not have computed with several threads.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.util.tensor_util import make_ndarray

import llmx.cli
import llmx.training.run
from llmx.runs.archive import read_checkpoint
from llmx.training.callbacks import Samples

_PLUGINS = ("scalars", "text", "images", "custom_scalars")
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every curve that is cut

_FORK = multiprocessing.get_context("fork")
TIMED = {  # what two equal runs differ in
    *("seconds", "peak_bytes", "generated_tokens_per_second", "steps_in_these_seconds"),
    *("train/tokens_per_second", "final/seconds"),
}


class Command:
    """A command in a process of its own, in a folder; what it says goes to `said`, a file there.

    Args:
        folder: the working directory.
        arguments: of the command line.
        environment: variables that differ.
        before: called in the process before the command.
        call: what is run in place of the command line.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[Any] = (),
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        call: Callable[[], int] | None = None,
    ):
        self.path = folder / f"said-{time.monotonic_ns()}"
        call = call or partial(llmx.cli.main, [str(argument) for argument in arguments])
        self.process = _FORK.Process(target=_run, args=(self.path, environment or {}, before, call))
        self.process.start()

    def wait(self, seconds: float = 60) -> int | None:
        """The exit code, negative for a signal; None, and it is killed, where it takes longer."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            return None
        return self.process.exitcode

    def send(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    @property
    def said(self) -> str:
        return self.path.read_text(errors="replace") if self.path.exists() else ""


def _run(said: Path, environment: dict[str, str], before: Callable[[], None] | None, call: Callable[[], int]) -> None:
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(said.parent)
    os.environ.update(environment)
    torch.set_num_threads(1)
    llmx.training.run.Samples = partial(Samples, max_new_tokens=8)  # type: ignore[assignment, misc]
    if before is not None:
        before()
    sys.exit(call())


def processes(
    folder: Path, arguments: Sequence[Any], environment: dict[str, str], count: int = 2, **named: Any
) -> list[Command]:
    """The same command in several processes that train together (`--trainer.devices`), the first one first."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    return [
        Command(folder, arguments, {**environment, **common, "LOCAL_RANK": str(rank)}, **named) for rank in range(count)
    ]


def free_port() -> int:
    """Of this machine's own address, for now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def differences(run: Path, other: Path) -> str:
    """What two runs differ in beyond times: weights, optimizer, schedule, progress, curves, samples, final numbers and
    losses, all bit by bit; empty if in nothing."""
    mine, theirs = ({name: read(folder.resolve()) for name, read in _PARTS.items()} for folder in (run, other))
    return "; ".join(_where(name, mine[name], theirs[name]) for name in _PARTS if not _same(mine[name], theirs[name]))


def _checkpoint(run: Path, *parts: str) -> Any:
    checkpoint = read_checkpoint(run / "checkpoints/last.ckpt")
    return {part: _placeless(checkpoint[part]) for part in parts}


def _progress(run: Path) -> Any:
    progress = _checkpoint(run, "global_step", "epoch", "loops")
    # without what Lightning has counted since the beginning, and the epochs begun: both count what was begun in vain
    loops = progress["loops"]["fit_loop"]
    progress["loops"] = {name: loop["current"] for name, loop in loops.items() if name.endswith("batch_progress")}
    return progress


def _curves(run: Path) -> Any:
    """Numbers, texts and images as TensorBoard shows them, by tag and step."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"tensors": 0}, tensor_size_guidance=dict.fromkeys(_PLUGINS, 0))
    events.Reload()
    tags = {*events.Tags()["tensors"]} - TIMED
    shown = {tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)] for tag in tags}
    return {tag: points for tag, points in shown.items() if not tag.startswith("_hparams_")}


def _metrics(run: Path) -> Any:
    return {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k not in TIMED}


_PARTS: dict[str, Callable[[Path], Any]] = {
    "weights": lambda run: _checkpoint(run, "state_dict"),
    "optimizer and schedule": lambda run: _checkpoint(run, "optimizer_states", "lr_schedulers"),
    "progress": _progress,
    "callbacks": lambda run: _checkpoint(run, "callbacks"),
    "curves": _curves,
    "metrics.json": _metrics,
    "val_losses.npy": lambda run: (run / "val_losses.npy").read_bytes(),
    "files of checkpoints": lambda run: sorted(path.name for path in (run / "checkpoints").iterdir()),
}


def _placeless(value: Any) -> Any:
    """The value, with paths from the run's folder on."""
    if isinstance(value, str):
        return re.sub(r"^\S*/version_\d+/", "", value)
    if isinstance(value, dict):
        return {_placeless(key): _placeless(item) for key, item in value.items()}
    return [_placeless(item) for item in value] if isinstance(value, list | tuple) else value


def _where(name: str, one: Any, other: Any) -> str:
    """The first place where two values differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{name}: {one} in place of {other}"[:400]
    key = next(key for key in {**one, **other} if key not in one or key not in other or not _same(one[key], other[key]))
    return _where(f"{name}, {key}", one.get(key), other.get(key))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
