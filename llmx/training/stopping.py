"""How a run ends: after its last step, on a signal, or by an error, on all processes together."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from llmx.errors import UserError
from llmx.protocol import Network
from llmx.training.checkpoints import LastCheckpoint
from llmx.training.lightning_types import attributes, language_model


def stop_together(trainer: pl.Trainer, error: BaseException) -> NoReturn:
    """Ends all processes, which call this together: the first raises the error, the others leave quietly."""
    if not trainer.is_global_zero:
        raise SystemExit(0)  # after another code Lightning would kill the first process while it ends
    raise error


def stop_diverged(trainer: pl.Trainer, what: str) -> NoReturn:
    """Ends all processes of a run whose numbers are no longer finite, with a UserError that names the last good
    checkpoint."""
    paths = [
        getattr(callback, name, "")
        for name in ("last_model_path", "best_model_path")
        for callback in trainer.checkpoint_callbacks
    ]
    path = next((path for path in paths if path and Path(path).exists()), None)
    good = f"The last good checkpoint is {path}." if path else "No checkpoint was written yet."
    advice = "A lower model.optimizer lr or trainer.gradient_clip_val may help."
    error = f"{what} at step {trainer.global_step}: training has diverged. {advice} {good}"
    stop_together(trainer, UserError(error))


def check_finite(trainer: pl.Trainer, network: Network) -> None:
    """Ends a run whose weights are no longer finite."""
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            stop_diverged(trainer, f"{name} holds a number that is not finite")


class EndWithValidation(Callback):
    """Validates after the last step, so that the final weights are measured and saved. Lightning by itself drops what
    comes after the last multiple of `val_check_interval`."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= language_model(pl_module).total_steps:
            trainer.should_stop = True  # Lightning validates where it stops early


class StopOnSignal(Callback):
    """On SIGINT and SIGTERM a run saves after the step at hand and ends with exit code 128 + signal. A second signal
    ends it at once. A run whose last step is done only validates, and ends by itself.

    SLURM announces the end of a job's time by a signal too (SIGUSR1, unless SLURMEnvironment is told another); the job
    is then queued again. Lightning by itself would save within the step, from where no run can continue.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.requeue: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue = environment.requeue_signal
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, self.requeue):
                if number is not None:
                    signal.signal(number, self._note)  # Lightning restores the former handlers when it ends

    def _note(self, number: int, *_: Any) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        loop, batches = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert batches is not None
        if loop._should_accumulate() or loop._should_check_val_fx(batches):
            return  # the step is not complete, or its validation begins next: we stop there instead
        if self._signalled(trainer, pl_module):
            trainer._logger_connector.update_train_step_metrics()  # the step's own point
            self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._signalled(trainer, pl_module):
            # a validation that has begun and counted nothing: resuming runs it from its first batch
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._leave(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.on_validation_start(trainer, pl_module)

    def _signalled(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether any process got a signal before the last step was done: all leave together."""
        if trainer.global_step >= language_model(pl_module).total_steps:
            return False
        if trainer.world_size > 1:
            own = torch.tensor(self.signal, device=trainer.strategy.root_device)
            highest = int(trainer.strategy.reduce(own, reduce_op="max"))
            if not highest:
                return False  # a signal that came meanwhile counts next time, and must not be overwritten
            self.signal = highest
        return bool(self.signal)

    def _leave(self, trainer: pl.Trainer) -> None:
        last: Any = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        saved = "nothing is saved"
        if last is not None and not attributes(trainer).fast_dev_run:
            language_model(trainer.lightning_module).set_optimizer_mode(training=False)
            last.save(trainer)
            saved = f"saved as {last.last_model_path}; fit --ckpt_path {last.last_model_path} goes on from there"
        self.exit(trainer, f"at step {trainer.global_step}: {saved}")

    def exit(self, trainer: pl.Trainer, what: str) -> NoReturn:
        """Ends all processes, the first with the signal's code, after it has said what the signal did."""
        if trainer.is_global_zero:
            print(f"{signal.Signals(self.signal).name} {what}", file=sys.stderr, flush=True)
            if self.signal == self.requeue:
                _queue_again()
        stop_together(trainer, SystemExit(128 + self.signal))


def _queue_again() -> None:
    """Asks SLURM to start this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        code: int | None = subprocess.run(["scontrol", "requeue", job]).returncode
    except OSError as error:
        code = error.errno
    if code:
        print(f"scontrol requeue {job} failed ({code}): queue the job by hand", file=sys.stderr, flush=True)
