"""A run that is watched by whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from llmx.training.logger import run_folder
from llmx.training.module import LanguageModel


class Watch(Callback):
    """Tells what happens in a fit while it happens.

    Args:
        started: called with the run's folder before the first step.
        validated: called with step and validation loss at every validation but the last; may raise, to end the run.
    """

    def __init__(self, started: Callable[[Path | None], None], validated: Callable[[int, float], None]):
        self.started = started
        self.validated = validated

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started(run_folder(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.global_step >= pl_module.total_steps:
            return
        if "val/loss" in trainer.callback_metrics:
            self.validated(trainer.global_step, trainer.callback_metrics["val/loss"].item())
