"""Lightning's objects with the types that they have here, which Lightning itself does not declare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from llmx.data.datamodule import TextDataModule

if TYPE_CHECKING:
    from llmx.training.module import LanguageModel


class TrainerAttributes(Protocol):
    """Attributes that Lightning's connectors set on a trainer."""

    callbacks: list[Callback]
    datamodule: TextDataModule
    fast_dev_run: int | bool
    log_every_n_steps: int


def attributes(trainer: pl.Trainer) -> TrainerAttributes:
    """The trainer itself, typed."""
    return cast(Any, trainer)


def language_model(module: pl.LightningModule) -> LanguageModel:
    """The module that a callback's hook gets, typed."""
    return cast("LanguageModel", module)


def text_data(trainer: pl.Trainer) -> TextDataModule | None:
    """The trainer's data module; None where a notebook gave a loader of its own."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def logs_this_step(trainer: pl.Trainer) -> bool:
    """Whether the logger keeps what a callback logs now; Lightning drops it at other steps."""
    every = attributes(trainer).log_every_n_steps
    return bool(every) and (trainer.global_step + 1) % every == 0
