"""How a network gets its weights: by gradient descent, or by counting a text once.

`learning_of` alone decides which of the two. Everything else asks the model's `learning`. Both classes have:

single_process:    one process does all of it
fixed_shapes:      the config alone decides the shapes of the network's tensors
compiles_decoding: a compiled step generates faster
needs_counting:    the network has to count before an audit or a fit can begin
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from llmx import display
from llmx.audits.parameters import ParametersReport, audit_parameters
from llmx.config.factories import build
from llmx.data.datamodule import TextDataModule
from llmx.protocol import CountingNetwork, Network
from llmx.training.lightning_types import Model, attributes
from llmx.training.optimizers import parameter_groups, settings


class GradientLearning:
    """Gradient descent: an optimizer and a schedule, many steps, any number of processes."""

    single_process = False
    fixed_shapes = True
    compiles_decoding = True
    needs_counting = False

    def count(self, data: TextDataModule) -> None:
        """Does nothing: the steps do the learning."""

    def audits(self, model: Model) -> list[ParametersReport]:
        """Audits how the network learns, at the weights that it starts from."""
        return [audit_parameters(model.network, model.window)]

    def total_steps(self, trainer: pl.Trainer) -> int:
        # not trainer.estimated_stepping_batches: it loads the data, and a restored loader would lose its place
        if trainer.max_steps > 0:
            return trainer.max_steps
        return (trainer.max_epochs or 0) * attributes(trainer).datamodule.steps_per_epoch

    def tokens_per_step(self, data: TextDataModule) -> int | None:
        """Tokens that a step reads over all devices; None if steps do not count what the network has seen."""
        return data.batch_size * data.window

    def configure_optimizers(self, model: Model) -> OptimizerLRScheduler:
        groups = parameter_groups(model.network, model.hparams["weight_decay_on"])
        optimizer = build(model.hparams["optimizer"], groups, "model.optimizer")
        self._configured = settings(optimizer)
        schedule = LambdaLR(optimizer, build(model.hparams["schedule"], model.total_steps, "model.schedule"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def before_fit(self, trainer: pl.Trainer) -> None:
        if trainer.max_steps < 0 < (trainer.max_epochs or 0):
            # a checkpoint of the last step is within its epoch: Lightning would train on from it
            trainer.fit_loop.epoch_loop.max_steps = self.total_steps(trainer)

    def before_first_step(self, model: Model) -> None:
        """Gives the optimizer the rates of the config, which has the last word over those of a checkpoint."""
        scheduler: Any = model.lr_schedulers()
        scheduler.base_lrs = [group["lr"] for group in self._configured]
        for group, configured, rate in zip(
            scheduler.optimizer.param_groups, self._configured, scheduler.lr_lambdas, strict=True
        ):
            group.update(configured, initial_lr=configured["lr"], lr=configured["lr"] * rate(scheduler.last_epoch))
        total = model.total_steps
        highest = max(map(scheduler.lr_lambdas[0], range(0, total, 1 + total // 1000)), default=1.0)
        if highest < 0.9:
            rank_zero_info(
                f"model.schedule: in {total:,} steps the learning rate rises to {display.percent(highest)} of that of "
                "model.optimizer, and no further."
            )

    def clip_gradients(self, model: Model, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        if model.trainer.precision != "bf16-mixed":
            model.clip_gradients(optimizer, value, algorithm)
        elif value:
            # the mixed-precision plugin refuses fused optimizers because of fp16's scaled gradients; bf16 has none
            kind = GradClipAlgorithmType(algorithm or "norm")
            Precision.clip_gradients(model.trainer.precision_plugin, optimizer, value, kind)


class CountingLearning:
    """Counting: one process reads the training split once, before the audit. The run that follows has one step, for
    its validation and its checkpoint."""

    single_process = True
    fixed_shapes = False  # tables grow with the text
    compiles_decoding = False  # look-ups are many times slower compiled (order 7, one row, CPU: 55 ms a token, was 3)

    def __init__(self, network: CountingNetwork):
        self.network = network

    @property
    def needs_counting(self) -> bool:
        return not self.network.learned

    def count(self, data: TextDataModule) -> None:
        """Counts the training split, in place of what the network has counted before."""
        self.network.learn(torch.from_numpy(np.asarray(data.tokens("train"), np.int64)))

    def audits(self, model: Model) -> list[ParametersReport]:
        return []

    def total_steps(self, trainer: pl.Trainer) -> int:
        return 1

    def _nothing(self, *_: Any) -> Any:
        """A network that counts has no tokens a step, no optimizer, no rates and no gradients."""

    tokens_per_step = configure_optimizers = before_fit = before_first_step = clip_gradients = _nothing


Learning = GradientLearning | CountingLearning


def learning_of(network: Network) -> Learning:
    return CountingLearning(network) if isinstance(network, CountingNetwork) else GradientLearning()
