"""The LightningModule: a network with its loss, metric, optimizer, schedule and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer

from llmx.audits.causality_report import CausalityReport
from llmx.audits.network_copies import copy_network, preserve_rng_state
from llmx.audits.score import Score, own_objective
from llmx.config.factories import build, to_config
from llmx.costs.describe import Description, describe
from llmx.data.prompts import Prompts
from llmx.data.tokenizers import Tokenizer, tokenizer_from_config
from llmx.data.windows import Batch
from llmx.errors import UserError, one_line
from llmx.generation import Sampling
from llmx.protocol import Network, Schedule
from llmx.runs.archive import read_checkpoint
from llmx.training.auditing import CausalityAudit
from llmx.training.blind_pass import BlindPass
from llmx.training.checkpoints import entry, load_network, restore_entry
from llmx.training.corpus_watch import CorpusWatch, Watch
from llmx.training.hardware import COMPILE_FROM, can_compile, keep_freed_memory
from llmx.training.learning_method import learning_of
from llmx.training.lightning_types import Model, attributes, logs_this_step
from llmx.training.metrics import TokenLoss, bits, perplexity
from llmx.training.optimizers import set_mode
from llmx.training.sampling import check_speculation, continued, predictions, sampling_from
from llmx.training.schedules import Cosine
from llmx.training.sharding import sharded
from llmx.training.stopping import check_finite, stop_diverged

Config = dict[str, Any]


class LanguageModel(Model):
    """Trains, evaluates and samples a network.

    Components are factories: classes, `functools.partial(Class, key=value)`, or the same as plain data,
    `{"class_path": ..., "init_args": {...}}`. The annotations leave plain data out, because the command line's parser
    would accept any dictionary then. A checkpoint holds the components as plain data and rebuilds all by itself.
    Raises UserError for components that cannot be written as plain data, and for a network that cannot be built.

    Args:
        network: factory of the network, from `vocab_size`.
        tokenizer: the tokenizer of the data, or its `to_config()`.
        window: tokens of a training sequence; audits and generation stay within it.
        optimizer: factory of the optimizer, from parameter groups.
        schedule: factory of the learning-rate schedule, from the number of steps.
        weight_decay_on: the parameters that the optimizer's weight decay touches: `matrices` (two dimensions or
            more, but for those that a component excepts), or `all`.
        compile: compile the network with its loss; `auto` compiles runs that are long enough to pay for it, if there
            is a compiler. The step of a long generation is compiled too, unless this is `false`.
        audit: the causality audit before the first step, and the blind pass at each validation: a leak is an `error`,
            or a `warn`ing that marks the run as leaking; `off` skips both.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        warm_start: a checkpoint whose weights the network starts from.
        sampling: how `predict` and `generate` draw.
    """

    def __init__(
        self,
        network: Callable[[int], Network],
        tokenizer: Tokenizer | Config,
        window: int,
        optimizer: Callable[[Iterable], Optimizer] = partial(AdamW, lr=3e-3, weight_decay=0.01),  # noqa: B008
        schedule: Callable[[int], Schedule] = Cosine,
        weight_decay_on: Literal["matrices", "all"] = "matrices",
        compile: bool | Literal["auto"] = "auto",
        audit: Literal["error", "warn", "off"] = "error",
        gradient_checkpointing: bool = False,
        warm_start: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ):
        super().__init__()
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer_from_config(tokenizer)
        self.sampling = sampling_from(sampling)
        self.window = window
        self.save_hyperparameters(
            {
                "network": to_config(network),
                "tokenizer": self.tokenizer.to_config(),
                "window": window,
                "optimizer": to_config(optimizer),
                "schedule": to_config(schedule),
                "weight_decay_on": weight_decay_on,
                "compile": compile,
                "audit": audit,
                "gradient_checkpointing": gradient_checkpointing,
                "sampling": asdict(self.sampling),
            },
            logger=False,
        )
        self.watch = Watch()
        self.network: Network = self._built()
        self.learning = learning_of(self.network)
        check_speculation(self.network, self.sampling)
        self.warm_start = None if warm_start is None else str(warm_start)
        # text sha256 -> fraction trained on, from its beginning
        self.trained_on: dict[str, float] = {} if warm_start is None else load_network(self.network, warm_start)
        with torch.device("cpu"):  # the network alone may be on the meta device
            self.val_loss = TokenLoss()
            self.test_loss = TokenLoss()
        self.description: Description | None = None  # made in a fit
        self.causality: CausalityReport | None = None
        self.leaking = False
        self.run_audited = False
        self.losses, self.score = self.network.losses, Score(self.network)
        self.own_objective = own_objective(self.network)
        self.compiled = False
        self.step_sums: dict[str, Tensor] = {}  # by tag, over the micro-batches of the current step

    def _built(self) -> Network:
        with self.watch:
            network: Network = build(self.hparams["network"], self.tokenizer.vocab_size, "model.network")
        if self.hparams["gradient_checkpointing"]:
            network.enable_gradient_checkpointing()
        return network

    # ---------------------------------------------------------------------------------------------------- training
    def configure_callbacks(self) -> list[Callback]:
        """The audit, the blind pass and the corpus watch, which no trainer goes without."""
        callbacks = attributes(self.trainer).callbacks
        if not any(type(callback) is BlindPass for callback in callbacks):
            callbacks.insert(0, BlindPass())
        kinds = {type(callback) for callback in callbacks}
        return [kind() for kind in (CausalityAudit, CorpusWatch) if kind not in kinds]

    def setup(self, stage: str) -> None:
        keep_freed_memory()
        wanted = self.hparams["compile"]
        if wanted == "auto":
            long = stage == "fit" and self.total_steps - self.trainer.global_step >= COMPILE_FROM
            wanted = long and self.device_mesh is None
        self.compiled = bool(wanted) and stage != "predict" and can_compile()
        if self.compiled:
            # the bound method: checkpoint keys stay clean, and head and loss are in the same graph as the network
            self.losses = torch.compile(self.network.losses, dynamic=False)
            self.score = Score(self.network, compiled=True)
        elif wanted and stage != "predict":
            rank_zero_info("No C++ compiler was found: the network runs without compilation.")

    def configure_model(self) -> None:
        """Describes the network, and shards it over all processes if the strategy is a ModelParallelStrategy."""
        fn = self.trainer.state.fn
        if fn == "fit" and self.trainer.is_global_zero and self.description is None:  # averaging callbacks come first
            try:
                self.description = describe(self.network, self.window)
            except ValueError as error:
                raise UserError(f"model.network does not take windows of {self.window}: {error}") from error
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        if fn == "predict":
            raise UserError("trainer.strategy: a sharded network does not generate; predict on one device")
        if self.hparams["compile"] is True:
            raise UserError("model.compile: a sharded network is not compiled")
        self.network = sharded(self.network, self._built, self.trainer, self.device_mesh.device_type)
        self.losses, self.score = self.network.losses, Score(self.network)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.learning.configure_optimizers(self)

    def on_fit_start(self) -> None:
        self.learning.before_fit(self.trainer)

    def on_train_start(self) -> None:
        self.seed = torch.initial_seed()
        self.learning.before_first_step(self)
        self.set_optimizer_mode(training=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # the x axis of every curve; after resuming a finished run Lightning's own count is one behind
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        # what dropout draws depends on seed, step and slot alone, as the windows do: a resumed run restores nothing,
        # and no two processes draw the same
        slot = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.trainer.global_rank
        entropy = np.random.SeedSequence((self.seed, self.trainer.global_step, slot))
        seed = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
        # without a GPU in use, torch.manual_seed would keep a formatted stack for GPUs to come
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, auxiliary = self.losses(batch.inputs.clone(), batch.targets.clone())  # the network may write into them
        loss = losses.sum() * batch.share
        mean = self._log_step("train/objective" if self.own_objective else "train/loss", loss.detach(), batch_idx)
        # away from the CPU reading the loss waits for the device
        read = loss.device.type == "cpu" or batch_idx % attributes(self.trainer).log_every_n_steps == 0
        if read and not mean.isfinite():
            stop_diverged(self.trainer, f"the training loss is {mean.item()}")
        if self.own_objective and logs_this_step(self.trainer) and self.device_mesh is None:
            with torch.no_grad(), preserve_rng_state():  # a copy: the network counts this batch once
                score = Score(copy_network(self.network, share_parameters=True))
                self._log_step("train/loss", score(batch.inputs, batch.targets).sum() * batch.share, batch_idx)
        return loss + auxiliary

    def _log_step(self, name: str, loss: Tensor, batch_idx: int) -> Tensor:
        """Logs the mean over the micro-batches so far: after the last one, that of the step. Returns the mean over all
        processes."""
        if self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        micro = batch_idx % self.trainer.accumulate_grad_batches
        self.step_sums[name] = loss + (self.step_sums[name] if micro else 0)
        self.log(name, self.step_sums[name] / (micro + 1), prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # a network that counts has nothing to differentiate
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.network.after_optimizer_step()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.learning.clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_end(self) -> None:
        self.set_optimizer_mode(training=False)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.set_optimizer_mode(training=False)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.set_optimizer_mode(training=True)

    def set_optimizer_mode(self, training: bool) -> None:
        """Makes an averaging optimizer put its training weights in place, or those that it evaluates and saves."""
        for optimizer in self.trainer.optimizers:
            set_mode(optimizer, training)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.learning.total_steps(self.trainer)

    # -------------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.score(batch.inputs, batch.targets)
        self.val_loss.update(losses, batch.targets)
        return losses

    def on_validation_epoch_end(self) -> None:
        self._log_loss("val", self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.score(batch.inputs, batch.targets)
        self.test_loss.update(losses, batch.targets)
        return losses

    def on_test_epoch_end(self) -> None:
        self._log_loss("test", self.test_loss)

    def _log_loss(self, split: str, metric: TokenLoss) -> None:
        loss = metric.compute().item()  # synchronised by the metric, the same on every rank
        metric.reset()
        self.log(f"{split}/loss", loss, prog_bar=True, rank_zero_only=False, sync_dist=False)
        self.log(f"{split}/perplexity", perplexity(loss), prog_bar=split == "val")
        self.log(f"{split}/bits_per_char", bits(loss))
        loader = getattr(self.trainer, f"{split}_dataloaders")
        if isinstance(loader, Sized):  # less than 1 under trainer.limit_val_batches and the like
            batches = sum(getattr(self.trainer, f"num_{split}_batches"))
            self.log(f"{split}/measured", batches / len(loader), logger=False)

    # -------------------------------------------------------------------------------------------------- generation
    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        return predictions(self, batch)

    def generate(self, prompt: str, **sampling: Any) -> str:
        """Returns the prompt and its continuation. `sampling`: the fields of `Sampling` that differ from the model's.

        Raises UserError for an empty prompt, a character outside the vocabulary, or a sampling value out of range or
        beyond the network.
        """
        return continued(self, prompt, sampling)

    # ------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training or self.trainer.validating:
            check_finite(self.trainer, self.network)  # this checkpoint would replace the last good one
        checkpoint["llmx"] = entry(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_entry(self, checkpoint.get("llmx", {}))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes a file of hyperparameters too
        cls, checkpoint_path: str | Path, map_location: torch.device | str = "cpu", strict: bool = True, **changes: Any
    ) -> LanguageModel:
        """Rebuilds the model that a file of `fit` or `Trainer.save_checkpoint` holds.

        This executes nothing in the file and imports nothing outside llmx: import a mixer of your own first. `strict`
        refuses missing and unexpected weights, and `changes` replace constructor arguments of the checkpoint. Raises
        UserError for a file that is missing, damaged or holds code, for classes whose module is not imported, and for
        weights of another network.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        arguments = {**checkpoint["hyper_parameters"], **changes}
        try:
            model = cls(**arguments)
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"], strict=strict)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"{checkpoint_path}: does not fit {cls.__name__}: {one_line(error, 300)}") from error
        return model.to(map_location)
