"""Lightning's objects with the types that they have here, which Lightning itself does not declare."""

from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from llmx.audits.causality_report import CausalityReport
from llmx.audits.score import Score
from llmx.costs.describe import Description
from llmx.data.datamodule import TextDataModule
from llmx.data.tokenizers import Tokenizer
from llmx.generation import Sampling
from llmx.protocol import Network


class TrainerAttributes(Protocol):
    """Attributes that Lightning's connectors set on a trainer."""

    callbacks: list[Callback]
    datamodule: TextDataModule
    fast_dev_run: int | bool
    log_every_n_steps: int


class Model(pl.LightningModule):
    """The attributes of a LanguageModel that the modules which it imports may read. A declaration, without code."""

    network: Network
    tokenizer: Tokenizer
    window: int
    sampling: Sampling
    learning: Any
    watch: Any  # of the files that the network opens
    trained_on: dict[str, float]
    warm_start: str | None
    causality: CausalityReport | None
    leaking: bool
    run_audited: bool
    score: Score
    description: Description | None
    compiled: bool
    total_steps: Any  # int
    generate: Any
    set_optimizer_mode: Any


def attributes(trainer: pl.Trainer) -> TrainerAttributes:
    """The trainer itself, typed."""
    return cast(Any, trainer)


def language_model(module: pl.LightningModule) -> Model:
    """The module that a callback's hook gets, typed."""
    return cast(Any, module)


def text_data(trainer: pl.Trainer) -> TextDataModule | None:
    """The trainer's data module; None where a notebook gave a loader of its own."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def logs_this_step(trainer: pl.Trainer) -> bool:
    """Whether the logger keeps what a callback logs now; Lightning drops it at other steps."""
    every = attributes(trainer).log_every_n_steps
    return bool(every) and (trainer.global_step + 1) % every == 0
