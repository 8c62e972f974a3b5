"""The command line: fit, validate, test, predict, audit and describe here, compare and sweep in their own packages.

Precedence: command line, then the run that `--ckpt_path` names, then config file, then defaults. Every fault becomes
one message and exit code 2. Nothing is written before the configuration is known to build.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from llmx.cli import preflight, results
from llmx.cli.describe import describe
from llmx.cli.parser import ParsedCLI
from llmx.cli.resume import Checkpoint, with_checkpoint
from llmx.config.command import Command
from llmx.errors import UserError, one_line
from llmx.training.callbacks import ProgressBar
from llmx.training.checkpoints import CheckpointFiles
from llmx.training.corpus_watch import watched
from llmx.training.logger import run_folder
from llmx.training.recording import run_callbacks
from llmx.training.stopping import StopOnSignal
from llmx.training.trainer import Trainer

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a write raises these without the file's name
PROCESS_LOST = ("gloo", "nccl", "pair closure")  # torch's message has one of them where another process is gone
NO_MEMORY = re.compile("can't allocate memory|Storage size calculation overflowed")  # torch's messages on a CPU


def main(args: list[str] | None = None) -> int:
    """Runs one command, `sys.argv` by default.

    Returns the exit code: 0, 1 where `audit` found a fault or `describe --match` no match, 2 for bad input. Raises
    SystemExit with 130 for SIGINT and 143 for SIGTERM; a fit is saved before.
    """
    # the working directory is importable: one file there and one YAML make a new architecture
    sys.path.insert(0, os.getcwd())
    arguments = sys.argv[1:] if args is None else args
    _silence_libraries()
    former = _exit_on_signals()
    try:
        if arguments[:1] == ["compare"]:
            from llmx.comparison import command as compare

            return compare.run(arguments[1:])
        if arguments[:1] == ["sweep"]:
            from llmx.sweep import command as sweep

            return sweep.run(arguments[1:], execute, parse)
        return execute(Command.read(arguments)).exit_code
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in FULL_DISK:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except (ProcessException, MemoryError, RuntimeError) as error:
        known = _out_of_memory(error) or _process_lost(error)
        if known is None:
            raise
        message = known
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    return 2


def execute(command: Command, callbacks: Sequence[Callback] = (), recorded: list[str] | None = None) -> CLI:
    """Runs one of the trainer's verbs. Raises UserError for whatever is wrong with the command. Raises OSError for a
    file that cannot be read or written.

    Args:
        command: what to run.
        callbacks: the callbacks that the trainer of a fit has beside its own.
        recorded: the command line that the run's record names; that of this process if not given.
    """
    try:
        return CLI(*with_checkpoint(command), callbacks, recorded)
    except MisconfigurationException as error:  # Lightning's name for flags that do not go together
        raise UserError(f"trainer: {one_line(error)}") from error


def parse(command: Command) -> Any:
    """The settings of a command, without executing it. Raises UserError for whatever is wrong with them."""
    return ParsedCLI(with_checkpoint(command)[0]).settings


class CLI(ParsedCLI):
    """Builds the run that a command describes, and executes its verb."""

    def __init__(
        self,
        command: Command,
        checkpoint: Checkpoint | None,
        callbacks: Sequence[Callback] = (),
        recorded: list[str] | None = None,
    ):
        self.exit_code = 0
        self.trainer: Trainer
        self.checkpoint, self.callbacks, self.recorded = checkpoint, callbacks, recorded
        super().__init__(command)

    def _set_seed(self) -> None:
        try:
            LightningCLI._set_seed(self)
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def instantiate_classes(self) -> None:
        verb, settings = self.subcommand, self.settings
        assert verb is not None
        preflight.check_settings(verb, settings, self.checkpoint)
        self.datamodule = preflight.build_data(settings, self.checkpoint)
        if verb == "describe":
            return  # a network and a trainer would cost time and memory
        preflight.check_data(verb, settings, self.datamodule, self.checkpoint)
        self.model = preflight.build_model(verb, settings, self.datamodule, self.checkpoint)
        try:
            self.config_init = self.parser.instantiate_classes(self.config)  # of the trainer; see _add_instantiators
            self.trainer = self._trainer(verb, settings.trainer)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckpointFiles()
        if verb == "fit":
            preflight.check_fit(
                self.model, self.datamodule, self.trainer, preflight.is_sharded(settings.trainer.strategy)
            )

    def _trainer(self, verb: str, settings: Any) -> Trainer:
        own: list[Callback] = []
        if verb == "fit":
            config = self._parser(verb).dump(self.config[verb], skip_none=False)
            own = [*run_callbacks(config, self.recorded, settings.enable_checkpointing is not False), *self.callbacks]
        if settings.enable_progress_bar is not False:
            own.append(ProgressBar())
        self._callbacks = self.trainer_defaults["callbacks"] = own
        changes = preflight.trainer_arguments(verb, settings, self.model, self.datamodule, self.checkpoint)
        return cast(Trainer, self.instantiate_trainer(**changes))

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "describe":
            self.exit_code = describe(self.settings, self.datamodule, self.checkpoint)
            return
        try:
            LightningCLI._run_subcommand(self, subcommand)
        except RuntimeError as error:
            stop = next((c for c in self._callbacks if isinstance(c, StopOnSignal)), None)
            if stop is None or not stop.signal:
                raise
            # a signal to the whole process group, as by Ctrl-C, also ends the compiler's processes within a step
            step = self.trainer.global_step + 1
            stop.exit(self.trainer, f"broke off step {step}, which is not saved: {type(error).__name__}")

    def before_fit(self) -> None:
        if self.trainer.strategy.launcher is not None:
            run_folder(self.trainer)  # chosen here: processes that are forked off could not tell this one

    def after_fit(self) -> None:
        results.print_fit(self.trainer, self.model, self.datamodule)

    def after_validate(self) -> None:
        results.print_measured(self.trainer, self.model, self.datamodule, "val", self.checkpoint)

    def after_test(self) -> None:
        results.print_measured(self.trainer, self.model, self.datamodule, "test", self.checkpoint)

    def predict(self, **arguments: Any) -> None:
        if not self.model.network.stateful:
            print("This network has no recurrent form: every character is generated by recomputing its prefix.")
        assert self.checkpoint is not None
        batches: Any = self.trainer.predict(**arguments) or []
        results.print_predictions(self.trainer, self.model, self.checkpoint.run, batches)

    def audit(self, **arguments: Any) -> None:
        with watched(self.model, self.datamodule):
            self.exit_code = int(not self.trainer.audit(**arguments))


def _out_of_memory(error: Exception) -> str | None:
    """The message where memory was refused; None for any other error."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not NO_MEMORY.search(str(error)):
        return None
    return (
        f"out of memory: {one_line(error, 200)}. data.batch_size, data.window, model.network or "
        "model.sampling.max_new_tokens asks for more than there is"
    )


def _process_lost(error: Exception) -> str | None:
    """The message where another process of a run failed; None for any other error."""
    text = one_line(error)
    if isinstance(error, ProcessException):  # of forked processes
        text = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
        known = isinstance(error, ProcessExitedException) or text != str(error).strip()
        return f"trainer: process {error.error_index} failed: {text}" if known else None
    lost = dist.is_initialized() and any(name in text.lower() for name in PROCESS_LOST)
    if not lost and not isinstance(error, dist.DistError):
        return None
    return (
        "trainer: another process of this run is gone or does not answer; fit --ckpt_path last goes on from the last "
        f"checkpoint ({text[:200]})"
    )


def _exit_on_signals() -> dict[int, Any]:
    """Makes SIGINT and SIGTERM an orderly exit with 128 + signal; returns the former handlers."""

    def leave(number: int, *_: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}


def _silence_libraries() -> None:
    """Filters messages of the libraries on which no user can act."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the configuration has the seed
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "Checkpoint directory .* exists and is not empty",  # a resumed run's
        "Be aware that when using `ckpt_path`, callbacks",
        r"It is recommended to use `self.log\('(val|test|blind)/",  # the metric synchronises itself
        "torch.distributed.nn.functional.all_gather is deprecated",
        "You're using the WeightAveraging callback",  # preflight refuses it where it matters
        "FSDP2-wrapped module .* returned a view",  # nobody writes to it
        ".*configure_optimizers` returned `None`",  # a network that counts has no optimizer
    ):
        warnings.filterwarnings("ignore", message=message)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: "Tip:" not in record.getMessage())
