"""The callbacks that show a run: progress, learning rate, throughput, samples."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from llmx.costs.from_config import described, failing_frame
from llmx.errors import UserError
from llmx.training.lightning_types import attributes, language_model, logs_this_step
from llmx.training.logger import validated_board


class ProgressBar(RichProgressBar):
    """Lightning's bar for runs that count in steps: no epoch number, no version number."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=False)  # at every step it takes a tenth of a short step

    def _get_train_description(self, current_epoch: int) -> str:
        return "fit"

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args, **kwargs).items() if name != "v_num"}


class LearningRate(Callback):
    """`lr`, the rate of the first parameter group."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups  # empty if the network counts
        if groups and logs_this_step(trainer):
            pl_module.log("lr", groups[0]["lr"], rank_zero_only=True)


class TokensPerSecond(Callback):
    """`train/tokens_per_second` over the steps since the last log, without validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        steps = trainer.global_step - self.step
        if steps < attributes(trainer).log_every_n_steps:
            return
        data = attributes(trainer).datamodule
        rate = steps * data.batch_size * data.window / (time.perf_counter() - self.time)
        pl_module.log("train/tokens_per_second", rate, rank_zero_only=True)
        self._restart(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self.step = trainer.global_step
        self.time = time.perf_counter()


class Samples(Callback):
    """A sample as text at every validation. It leaves training's random state untouched. Where generation fails, one
    line says so, once for each kind of failure, and the run goes on."""

    def __init__(self, prompt: str = "\n", max_new_tokens: int = 200):
        self.failures = set[tuple[Any, ...]]()  # exception, file and line, each told once
        self.tokens_per_second: float | None = None  # of the last sample, as a single row
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        board, model = validated_board(trainer), language_model(pl_module)
        if board is None or model.device_mesh is not None:
            return  # all processes run a sharded network, or none
        try:
            model.tokenizer.encode(prompt := self.prompt)
        except UserError:
            prompt = model.tokenizer.decode([0])
        started = time.perf_counter()
        try:
            text = model.generate(prompt, max_new_tokens=self.max_new_tokens)
        except Exception as error:  # whatever a component raises
            self.tokens_per_second = None
            frame = failing_frame(error)
            kind = (type(error), frame.filename, frame.lineno)
            if kind not in self.failures:
                print(f"no sample at step {trainer.global_step}: {described(error)}")
            self.failures.add(kind)
            return
        self.tokens_per_second = self.max_new_tokens / (time.perf_counter() - started)
        indented = "\n".join("    " + line for line in text.splitlines())  # markdown's verbatim form
        board.add_text("samples", indented, trainer.global_step - 1)  # where val/loss is
