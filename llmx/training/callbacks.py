"""What a run shows: progress, speed, learning rate, samples."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.training.logger import tensorboard
from llmx.training.module import LanguageModel


class ProgressBar(RichProgressBar):
    """Lightning's bar for runs that count in steps: no epoch number, no version number."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=False)  # drawing it at every step takes a tenth of a short step

    def _get_train_description(self, current_epoch: int) -> str:
        return "fit"

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args, **kwargs).items() if name != "v_num"}


class LearningRate(Callback):
    """`lr`, the rate of the first parameter group."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        groups = trainer.optimizers[0].param_groups  # none where a network counts
        if groups and every and (trainer.global_step + 1) % every == 0:  # what reaches the logger: the rest is dropped
            pl_module.log("lr", groups[0]["lr"], rank_zero_only=True)


class TokensPerSecond(Callback):
    """`train/tokens_per_second` over the steps since the last log, validation left out."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        steps = trainer.global_step - self.step
        if steps < trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]
        rate = steps * data.batch_size * data.window / (time.perf_counter() - self.time)
        pl_module.log("train/tokens_per_second", rate, rank_zero_only=True)
        self._restart(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self.step = trainer.global_step
        self.time = time.perf_counter()


class Samples(Callback):
    """A sample as text at every validation, from draws of its own: training's random state is untouched.

    tokens_per_second: of the last one, a single row; None before it
    """

    def __init__(self, prompt: str = "\n", max_new_tokens: int = 200):
        self.tokens_per_second: float | None = None
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        board = tensorboard(trainer)
        if board is None or trainer.sanity_checking or trainer.state.fn != "fit" or pl_module.device_mesh is not None:
            return  # a sharded network is run by all processes or none
        try:
            pl_module.tokenizer.encode(prompt := self.prompt)
        except UserError:
            prompt = pl_module.tokenizer.decode([0])
        started = time.perf_counter()
        text = pl_module.generate(prompt, max_new_tokens=self.max_new_tokens)
        self.tokens_per_second = self.max_new_tokens / (time.perf_counter() - started)
        indented = "\n".join("    " + line for line in text.splitlines())  # markdown's verbatim form
        board.add_text("samples", indented, trainer.global_step - 1)  # where val/loss is
