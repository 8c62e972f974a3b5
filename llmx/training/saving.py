"""The checkpoints that a run keeps: the best one and the last one."""

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from llmx.runs.folder import BEST
from llmx.training.logger import tensorboard
from llmx.training.typed import attributes


class RunCheckpoint(ModelCheckpoint):
    """Writes the curves before the checkpoint, for a resumed run does not log the steps before it again.

    It deletes files in the run's own folder only: a resumed run takes the name of its previous file from a checkpoint,
    and that may lie elsewhere.
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
    """`checkpoints/step=N.ckpt` before the first step and at every validation. The last one is kept, and `last.ckpt`
    links to it.

    The link moves to the new file in one step, before the old file is deleted. It is never missing and never dangles.
    """

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
