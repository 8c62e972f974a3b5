"""How a run is saved and ends: checkpoints, signals, its last step."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from llmx.runs.folder import BEST
from llmx.training.logger import tensorboard
from llmx.training.module import LanguageModel


class RunCheckpoint(ModelCheckpoint):
    """Deletes in the run's own folder only: which file came before, a resumed run has from its checkpoint.

    The curves are written first: a run that goes on from the checkpoint does not draw again what led to it.
    """

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        board = tensorboard(trainer)
        if board is not None:
            board.flush()
        super()._save_checkpoint(trainer, filepath)

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        assert self.dirpath is not None
        inside = os.path.dirname(os.path.abspath(previous)) == os.path.abspath(self.dirpath)
        return inside and super()._should_remove_checkpoint(trainer, previous, current)


class BestCheckpoint(RunCheckpoint):
    """`checkpoints/best.ckpt`: the lowest validation loss."""

    def __init__(self) -> None:
        super().__init__(monitor="val/loss", filename=Path(BEST).stem, save_top_k=1, enable_version_counter=False)


class LastCheckpoint(RunCheckpoint):
    """`checkpoints/step=N.ckpt` before the first step and at every validation, the last one kept, and `last.ckpt` as a
    link to it.

    The link is moved to the new file before the old one goes, in one step: there is no moment at which it is missing
    or leads nowhere.
    """

    def __init__(self) -> None:
        super().__init__(monitor=None, filename="{step}", save_top_k=1, save_last="link", enable_version_counter=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if pl_module.device_mesh is not None:
            return  # torch asks a sharded optimizer for its state by making a step, which Adam counts
        if trainer.global_step == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves now, unless this step is saved already."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        link = Path(filepath).with_name(f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        self._link_checkpoint(trainer, self._last_checkpoint_saved, str(link))
        super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            partial = Path(linkpath).with_name("last.partial")
            partial.unlink(missing_ok=True)
            try:
                partial.symlink_to(Path(filepath).name)
            except OSError:  # Windows asks for a privilege
                shutil.copy(filepath, partial)
            os.replace(partial, linkpath)
        trainer.strategy.barrier()


class StopOnSignal(Callback):
    """SIGINT and SIGTERM end a run after the step at hand, saved, with exit code 128 + signal; a second one at once.
    A run whose last step is done only validates, and ends by itself.

    So does the signal by which SLURM announces the end of a job's time (SIGUSR1, unless SLURMEnvironment is told
    another), and the job is queued again. Lightning by itself would save within the step, which nothing can continue.
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
                    signal.signal(number, self._note)  # Lightning puts the former ones back when it ends

    def _note(self, number: int, *_: Any) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        loop, batches = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert batches is not None
        if loop._should_accumulate() or loop._should_check_val_fx(batches):
            return  # not a whole step, or one whose validation begins next: that is where it is left then
        if self._told(trainer, pl_module):
            trainer._logger_connector.update_train_step_metrics()  # the step's own point
            self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._told(trainer, pl_module):
            # a validation that has begun and counted nothing: resuming runs it from its first batch
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._leave(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.on_validation_start(trainer, pl_module)

    def _told(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether any process was signalled, before the last step was done: all leave together."""
        if trainer.global_step >= pl_module.total_steps:  # type: ignore[operator]
            return False
        if trainer.world_size > 1:
            held = torch.tensor(self.signal, device=trainer.strategy.root_device)
            told = int(trainer.strategy.reduce(held, reduce_op="max"))
            if not told:
                return False  # one that came meanwhile is told next time, and must not be overwritten
            self.signal = told
        return bool(self.signal)

    def _leave(self, trainer: pl.Trainer) -> None:
        last: Any = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        saved = "nothing is saved"
        if last is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            cast(LanguageModel, trainer.lightning_module).set_optimizer_mode(training=False)
            last.save(trainer)
            saved = f"saved as {last.last_model_path}; fit --ckpt_path {last.last_model_path} goes on from there"
        self.exit(trainer, f"at step {trainer.global_step}: {saved}")

    def exit(self, trainer: pl.Trainer, what: str) -> NoReturn:
        """Ends this process, the first one with what the signal did and the signal's code.

        Raises:
            SystemExit: always.
        """
        if not trainer.is_global_zero:
            raise SystemExit(0)  # another code, and Lightning would kill the first process while it ends
        print(f"{signal.Signals(self.signal).name} {what}", file=sys.stderr, flush=True)
        if self.signal == self.requeue:
            _queue_again()
        raise SystemExit(128 + self.signal)


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


class EndWithValidation(Callback):
    """Validates after the last step, wherever the validation interval falls, so that the final weights are measured
    and saved: Lightning by itself drops what comes after the last multiple of `val_check_interval`."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= pl_module.total_steps:  # type: ignore[operator]
            trainer.should_stop = True  # Lightning validates where it stops early
