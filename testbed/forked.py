"""Commands of llmx in forked processes.

Importing torch takes seconds, and a fork has imported it already. So hundreds of commands can be run, killed and run
again. The process that forks must not have computed with several threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import llmx.cli
from llmx.training.callbacks import Samples

_FORK = multiprocessing.get_context("fork")


class ForkedProcess:
    """One command in a process of its own. Its output goes to a file in its working directory; `output` reads it.

    Args:
        folder: the working directory.
        arguments: the command line.
        environment: variables that differ from this process's.
        before: called in the process before the command.
        call: called in place of the command line.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[Any] = (),
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        call: Callable[[], int] | None = None,
    ):
        self._path = folder / f"output-{time.monotonic_ns()}"
        call = call or partial(llmx.cli.main, [str(argument) for argument in arguments])
        self.process = _FORK.Process(target=_run, args=(self._path, environment or {}, before, call))
        self.process.start()

    def wait(self, seconds: float = 60) -> int | None:
        """The exit code, negative for a signal. A process that takes longer is killed and gives None."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            return None
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Sends a signal."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    @property
    def output(self) -> str:
        return self._path.read_text(errors="replace") if self._path.exists() else ""


def _run(path: Path, environment: dict[str, str], before: Callable[[], None] | None, call: Callable[[], int]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(path.parent)
    os.environ.update(environment)
    torch.set_num_threads(1)
    Samples.__init__.__defaults__ = ("\n", 8)  # few tokens, for the sake of time
    if before is not None:
        before()
    sys.exit(call())


def forked_ranks(
    folder: Path, arguments: Sequence[Any], environment: dict[str, str], count: int = 2, **named: Any
) -> list[ForkedProcess]:
    """Starts one command in several processes that train together (`--trainer.devices`); rank 0 comes first."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    return [
        ForkedProcess(folder, arguments, {**environment, **common, "LOCAL_RANK": str(rank)}, **named)
        for rank in range(count)
    ]


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
