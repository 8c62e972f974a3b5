"""Checkpoints: which ones a run keeps, how they are written (atomically) and read (executing nothing), llmx's entry in
them, and how a network starts from one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from llmx.errors import UserError, one_line
from llmx.protocol import Network
from llmx.runs.archive import read_archive, read_checkpoint
from llmx.runs.folder import BEST
from llmx.training.lightning_types import Model, attributes, text_data
from llmx.training.logger import tensorboard

PARTIAL = "checkpoint.partial"  # one name: the next write replaces what a killed process left behind


def load_network(network: Network, path: str | Path) -> dict[str, float]:
    """Gives a network the weights of a checkpoint. Returns text sha256 -> fraction that they were trained on.

    Raises UserError for a checkpoint that cannot be read or holds another network.
    """
    checkpoint = read_checkpoint(path)
    prefix = "network."
    held = checkpoint["state_dict"].items()
    try:
        network.load_state_dict({key.removeprefix(prefix): x for key, x in held if key.startswith(prefix)})
    except RuntimeError as error:
        raise UserError(f"model.warm_start: {path} holds another network: {one_line(error, 300)}") from error
    return checkpoint.get("llmx", {}).get("trained_on", {})


def entry(model: Model) -> dict[str, Any]:
    """What a checkpoint holds under `llmx`."""
    trained_on, data = dict(model.trained_on), text_data(model.trainer)
    if data is not None:
        text = data.source.sha256
        trained_on[text] = max(data.split[0], trained_on.get(text, 0.0))
    return {
        "leaking": model.leaking,
        "trained_on": trained_on,
        "accumulate": model.trainer.accumulate_grad_batches,
        "precision": str(model.trainer.precision),
    }


def restore_entry(model: Model, held: dict[str, Any]) -> None:
    """Takes from an `entry` what the model has to know. Raises UserError if a fit accumulates gradients otherwise."""
    model.leaking = model.leaking or held.get("leaking", False)
    model.trained_on = held.get("trained_on", {})
    if model._trainer is not None and model.trainer.state.fn == "fit":
        accumulate = model.trainer.accumulate_grad_batches
        if held.get("accumulate", accumulate) != accumulate:  # Lightning counts the epoch's batches, not its steps
            raise UserError(
                f"trainer.accumulate_grad_batches: {accumulate} cannot continue a run that has {held['accumulate']}"
            )


class CheckpointFiles(TorchCheckpointIO):
    """Writes to a temporary file, which takes the checkpoint's name once all of it is on the disk. Reads any archive
    safely, since forked processes hand back bare weights."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the whole file, or leaves the former one and raises UserError, as on a full disk."""
        path = Path(path)
        partial = path.with_name(PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            if os.name == "posix":  # where folders can be opened: the renamed entry goes to the disk too
                descriptor = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or one_line(error, 200)
            raise UserError(
                f"{path}: the checkpoint could not be written ({reason}); the one before it, if any, is still there"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_archive(Path(path))


class RunCheckpoint(ModelCheckpoint):
    """Writes the curves before the checkpoint, for a resumed run does not log the steps before it again. Deletes files
    in the run's own folder only: a checkpoint tells a resumed run its previous file, which may lie elsewhere."""

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
    """`checkpoints/step=N.ckpt` before the first step and at every validation. The last one is kept, and `last.ckpt`
    links to it. The link moves to the new file in one step, before the old file is deleted: it never dangles."""

    def __init__(self) -> None:
        super().__init__(monitor=None, filename="{step}", save_top_k=1, save_last="link", enable_version_counter=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if pl_module.device_mesh is not None:
            return  # torch makes a step, which Adam counts, to get the state of a sharded optimizer
        if trainer.global_step == 0 and not attributes(trainer).fast_dev_run:
            self._save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves now, unless this step has been saved."""
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
            except OSError:  # Windows demands a privilege for links
                shutil.copy(filepath, partial)
            os.replace(partial, linkpath)
        trainer.strategy.barrier()
