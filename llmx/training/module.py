"""The LightningModule: a network with its loss, metric, optimizer, schedule, audit and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from llmx.audits.causality import audit_causality
from llmx.audits.causality_report import CausalityError, CausalityReport
from llmx.audits.live_run import audit_live_run
from llmx.config.factories import build, to_config
from llmx.costs.describe import Description, describe
from llmx.data.datamodule import TextDataModule
from llmx.data.prompts import Prompts
from llmx.data.tokenizers import Tokenizer, tokenizer_from_config
from llmx.data.windows import Batch
from llmx.errors import UserError
from llmx.generation import Sampling, check_drafts, generate
from llmx.protocol import CountingNetwork, Network, Schedule, Tokens
from llmx.runs.archive import read_checkpoint
from llmx.training.fastpath import COMPILE_DECODING_FROM, COMPILE_FROM, can_compile, compiled_decode, keep_freed_memory
from llmx.training.metrics import TokenLoss, bits, perplexity
from llmx.training.optimizers import parameter_groups, set_mode, settings
from llmx.training.schedules import Cosine
from llmx.training.sharding import build_sharded, policy, shard

Config = dict[str, Any]


class LanguageModel(pl.LightningModule):
    """Trains, evaluates and samples a network.

    Components are factories: classes, `functools.partial(Class, key=value)`, or the same as plain data,
    `{"class_path": ..., "init_args": {...}}` (the annotations leave it out, for the command line's parser accepts any
    dictionary where one is allowed). A checkpoint holds them as plain data and rebuilds all by itself.

    Args:
        network: factory of the network, from `vocab_size`.
        tokenizer: the tokenizer of the data, or its `to_config()`.
        window: tokens a training sequence has; audits and generation stay within it.
        optimizer: factory of the optimizer, from parameter groups.
        schedule: factory of the learning-rate schedule, from the number of steps.
        weight_decay_on: the parameters that the optimizer's weight decay touches: `matrices` (two dimensions or
            more, but for those that a component excepts), or `all`.
        compile: compile the network with its loss; `auto` does in runs that are long enough to pay for it, where a
            compiler is found. The step of a long generation is compiled too, unless this is `false`.
        audit: the causality audit, before the first step and, of the run itself, at each validation: a leak is an
            `error`, or a `warn`ing that marks the run as leaking; `off` skips the audit.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        warm_start: a checkpoint whose weights the network starts from.
        sampling: how `predict` and `generate` draw.

    Raises:
        UserError: for components that cannot be written as plain data, and for a network that cannot be built.
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
        self.sampling = _sampling("model.sampling.", sampling) if isinstance(sampling, dict) else sampling
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"model.sampling: {sampling!r:.100} is no Sampling; give keys and values")
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
        self.network: Network = self._built()
        _check_drafts("model.sampling.", self.network, self.sampling)
        # hash of each text that went into the weights -> the fraction of it that did, from its beginning
        self.trained_on: dict[str, float] = {}
        self.warm_start = None if warm_start is None else str(warm_start)
        if warm_start is not None:
            self._load_network(warm_start)
        with torch.device("cpu"):  # the network alone may be on the meta device
            self.val_loss = TokenLoss()
            self.test_loss = TokenLoss()
        self.description: Description | None = None  # of a fit
        self.causality: CausalityReport | None = None
        self.leaking = False
        self.run_audited = False
        self.losses = self.network.losses
        self.compiled = False
        self.step_loss: Tensor | float = 0.0  # of the micro-batches of the step at hand, summed

    def _built(self) -> Network:
        network: Network = build(self.hparams["network"], self.tokenizer.vocab_size, "model.network")
        if self.hparams["gradient_checkpointing"]:
            network.enable_gradient_checkpointing()
        return network

    # ---------------------------------------------------------------------------------------------------- training
    def setup(self, stage: str) -> None:
        keep_freed_memory()
        if stage == "fit" and isinstance(self.network, CountingNetwork) and not self.network.learned:
            self.learn(self.trainer.datamodule)  # type: ignore[attr-defined]
        wanted = self.hparams["compile"]
        if wanted == "auto":
            long = stage == "fit" and self.total_steps - self.trainer.global_step >= COMPILE_FROM
            wanted = long and self.device_mesh is None
        self.compiled = bool(wanted) and stage != "predict" and can_compile()
        if self.compiled:
            # the bound method: checkpoint keys stay clean, and head and loss are in the same graph as the network
            self.losses = torch.compile(self.network.losses, dynamic=False)
        elif wanted and stage != "predict":
            rank_zero_info("No C++ compiler was found: the network runs without compilation.")
        if stage == "fit":
            self.audit_causality(self._data())
            self.audit_run()

    def configure_model(self) -> None:
        """Describes the network, and shards it over all processes where the strategy is a ModelParallelStrategy.

        A network on the meta device is built here, block by block, by the state that the random numbers are in: no
        process ever holds it whole.

        Raises:
            UserError: for what a sharded network cannot do.
        """
        fn = self.trainer.state.fn
        if fn == "fit" and self.trainer.is_global_zero and self.description is None:  # averaging callbacks come first
            try:
                self.description = describe(self.network, self.window)
            except ValueError as error:
                raise UserError(f"model.network does not take windows of {self.window}: {error}") from error
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        bare = any(parameter.is_meta for parameter in self.network.parameters())
        if fn == "predict":
            raise UserError("trainer.strategy: a sharded network does not generate; predict on one device")
        if self.hparams["compile"] is True:
            raise UserError("model.compile: a sharded network is not compiled")
        if bare and self.hparams["audit"] != "off":
            raise UserError("model.audit: only a whole network can be audited, not one on the meta device")
        mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
        try:
            if bare:
                self.network = build_sharded(self._built, mesh, policy(str(self.trainer.precision)))
            else:
                if fn == "fit":
                    self.audit_causality()
                shard(self.network, mesh, policy(str(self.trainer.precision)))
        except ValueError as error:
            raise UserError(f"trainer.strategy: this network cannot be sharded: {error}") from error
        self.losses = self.network.losses

    def learn(self, data: TextDataModule) -> None:
        """Lets a network that counts count the training split."""
        if isinstance(self.network, CountingNetwork):
            self.network.learn(torch.from_numpy(np.asarray(data.tokens("train"), np.int64)))

    def on_fit_start(self) -> None:
        if self.trainer.max_steps < 0 < (self.trainer.max_epochs or 0) and not isinstance(
            self.network, CountingNetwork
        ):
            # a checkpoint of the last step is within its epoch: Lightning would train on from it
            self.trainer.fit_loop.epoch_loop.max_steps = self.total_steps

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._audit_run(tokens=2048, seed=self.trainer.global_step)  # the weights as they are now

    def audit_run(self) -> None:
        """Audits, once, how the network will run in the trainer that it is attached to, unless `audit` is off.

        Raises:
            CausalityError: for a leak, unless `audit` is `warn`.
        """
        if not self.run_audited:
            self.run_audited = True
            self._audit_run(perturb=True)

    def audit_causality(self, data: TextDataModule | None = None) -> CausalityReport | None:
        """Audits the network once, unless `audit` is off.

        Args:
            data: of whose training split tokens are taken, beside the random ones.

        Raises:
            CausalityError: for a leak, unless `audit` is `warn`.
        """
        if self.hparams["audit"] != "off" and self.causality is None:
            text = None if data is None else data.beginning()
            self.causality = audit_causality(self.network, self.window, text=text)
            self.leaking = self.causality.leaking
        if self.leaking and self.causality is not None and self.hparams["audit"] == "error":
            raise CausalityError(self.causality)
        return self.causality

    def _audit_run(self, **how: Any) -> None:
        if self.causality is None or self.leaking or self.device_mesh is not None:
            return
        data = self._data()
        text = None if data is None else data.beginning()
        autocast = self.trainer.precision_plugin.forward_context()
        device = self.trainer.strategy.root_device  # where it will be, if it is not yet
        breach = audit_live_run(self.network, self.window, autocast, text, device=device, **how)
        if breach is None:
            return
        self.leaking = True
        self.causality = replace(self.causality, breaches=(breach,))
        if self.hparams["audit"] == "error":
            self._stop(CausalityError(self.causality))
        rank_zero_warn(f"LEAKING at step {self.trainer.global_step}: {breach}.")

    def _data(self) -> TextDataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TextDataModule) else None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # the x axis of every curve; after resuming a finished run Lightning's own count is one behind
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        # what dropout draws is a function of seed, step and slot, as the windows are: nothing to save and restore, and
        # no two processes draw the same
        slot = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.trainer.global_rank
        entropy = np.random.SeedSequence((self._seed, self.trainer.global_step, slot))
        seed = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
        # torch.manual_seed keeps a formatted stack for the GPUs to come where none is in use
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, auxiliary = self.losses(batch.inputs, batch.targets)
        loss = losses.sum() * batch.share
        mean = loss.detach()
        if self.trainer.world_size > 1:
            mean = self.trainer.strategy.reduce(mean.clone(), reduce_op="mean")
        # off the CPU every look at the loss waits for the device
        look = loss.device.type == "cpu" or batch_idx % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if look and not mean.isfinite():
            self._diverged(f"train/loss is {mean.item()}")
        # the mean over the micro-batches so far: that of the last one is the loss of the step
        micro = batch_idx % self.trainer.accumulate_grad_batches
        self.step_loss = mean + (self.step_loss if micro else 0)
        self.log("train/loss", self.step_loss / (micro + 1), prog_bar=True)
        return loss + auxiliary

    def _diverged(self, what: str) -> NoReturn:
        self._stop(
            UserError(
                f"{what} at step {self.trainer.global_step}: training has diverged. "
                f"A lower model.optimizer lr or trainer.gradient_clip_val may help. {self._last_good()}"
            )
        )

    def _stop(self, error: UserError) -> NoReturn:
        """All processes come here together: the first one says it, the others leave quietly."""
        if not self.trainer.is_global_zero:
            raise SystemExit(0)  # another code, and Lightning would kill the first process while it ends
        raise error

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # a network that counts has nothing to differentiate
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.network.after_optimizer_step()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if isinstance(self.network, CountingNetwork):
            return
        if self.trainer.precision != "bf16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            # the mixed-precision plugin refuses fused optimizers for the sake of fp16's scaled gradients; bf16 has none
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if isinstance(self.network, CountingNetwork):
            return None
        groups = parameter_groups(self.network, self.hparams["weight_decay_on"])
        optimizer = build(self.hparams["optimizer"], groups, "model.optimizer")
        self._initial = settings(optimizer)
        schedule = build(self.hparams["schedule"], self.total_steps, "model.schedule")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "name": "lr"},
        }

    def on_train_start(self) -> None:
        self._seed = torch.initial_seed()
        if isinstance(self.network, CountingNetwork):
            return
        # a restored optimizer brings its old rates along; the run's configuration has the last word
        scheduler: Any = self.lr_schedulers()
        scheduler.base_lrs = [group["lr"] for group in self._initial]
        for group, initial, rate in zip(
            scheduler.optimizer.param_groups, self._initial, scheduler.lr_lambdas, strict=True
        ):
            group.update(initial, initial_lr=initial["lr"], lr=initial["lr"] * rate(scheduler.last_epoch))
        steps = range(0, self.total_steps, 1 + self.total_steps // 1000)
        highest = max(map(scheduler.lr_lambdas[0], steps), default=1.0)
        if highest < 0.9:
            rank_zero_info(
                f"model.schedule: in {self.total_steps:,} steps the learning rate rises to {100 * highest:.3g} % of "
                "that of model.optimizer, and no further."
            )
        self.set_optimizer_mode(training=True)

    def on_train_end(self) -> None:
        self.set_optimizer_mode(training=False)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.set_optimizer_mode(training=False)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.set_optimizer_mode(training=True)

    def set_optimizer_mode(self, training: bool) -> None:
        """Puts the weights in place that an averaging optimizer trains, or those that it evaluates and saves."""
        for optimizer in self.trainer.optimizers:
            set_mode(optimizer, training)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run, for the schedule; 1 where a network has counted all there is before."""
        if isinstance(self.network, CountingNetwork):
            return 1
        # not trainer.estimated_stepping_batches: it loads the data, and a restored loader would lose its place
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        return (self.trainer.max_epochs or 0) * self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]

    # -------------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(batch.inputs, batch.targets)[0]
        self.val_loss.update(losses, batch.targets)
        return losses

    def on_validation_epoch_end(self) -> None:
        self._log_loss("val", self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_loss.update(self.losses(batch.inputs, batch.targets)[0], batch.targets)

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
        """One record a row: index of the prompt, prompt, completion, text (prompt and completion)."""
        tokens = self._continued(batch.tokens, self.sampling)
        completions = [self.tokenizer.decode(row) for row in tokens.tolist()]
        return [
            {"prompt_index": index, "prompt": prompt, "completion": completion, "text": prompt + completion}
            for index, prompt, completion in zip(batch.indices, batch.texts, completions, strict=True)
        ]

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The prompt and its continuation.

        Args:
            prompt: at least one character, all of them in the vocabulary.
            **sampling: fields of `Sampling` that differ from the model's own.

        Raises:
            UserError: for an empty prompt, a character outside the vocabulary, or a sampling value out of range or
                beyond the network.
        """
        if not prompt:
            raise UserError("prompt: give at least one character")
        unknown = sampling.keys() - asdict(self.sampling).keys()
        if unknown:
            raise UserError(f"{unknown.pop()}: not a sampling option; there are {', '.join(asdict(self.sampling))}")
        how = _sampling("", {**asdict(self.sampling), **sampling})
        _check_drafts("", self.network, how)
        tokens = torch.tensor(self.tokenizer.encode(prompt), dtype=torch.int64, device=self.device)[None]
        return prompt + self.tokenizer.decode(self._continued(tokens, how)[0].tolist())

    def _continued(self, prompts: Tokens, sampling: Sampling) -> Tokens:
        long = sampling.max_new_tokens >= COMPILE_DECODING_FROM and self.network.stateful
        # an n-gram's look-ups run many times slower compiled (order 7, one row on a CPU: 55 ms a token in place of 3)
        long = long and not isinstance(self.network, CountingNetwork)
        if not long or sampling.speculate or self.hparams["compile"] is False or not can_compile():
            return generate(self.network, prompts, self.window, sampling)
        rank_zero_info("A long generation: its step is compiled first, in half a minute, or seconds if it was before.")
        return generate(self.network, prompts, self.window, sampling, compiled_decode())

    # ------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training or self.trainer.validating:
            for name, parameter in self.network.named_parameters():
                if not parameter.isfinite().all():  # it would take the place of the last good one
                    self._diverged(f"{name} holds a number that is not finite")
        trained_on, data = dict(self.trained_on), self._data()
        if data is not None:
            text = data.source.sha256
            trained_on[text] = max(data.split[0], trained_on.get(text, 0.0))
        checkpoint["llmx"] = {
            "leaking": self.leaking,
            "trained_on": trained_on,
            "accumulate": self.trainer.accumulate_grad_batches,
            "precision": str(self.trainer.precision),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        held = checkpoint.get("llmx", {})
        self.leaking = self.leaking or held.get("leaking", False)
        self.trained_on = held.get("trained_on", {})
        if self._trainer is not None and self.trainer.state.fn == "fit":
            accumulate = self.trainer.accumulate_grad_batches
            if held.get("accumulate", accumulate) != accumulate:  # Lightning counts the epoch's batches, not its steps
                raise UserError(
                    f"trainer.accumulate_grad_batches: {accumulate} cannot continue a run that has {held['accumulate']}"
                )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str = "cpu",
        strict: bool = True,
        **changes: Any,
    ) -> LanguageModel:
        """The model that a checkpoint holds.

        Nothing in the file is executed, and nothing outside llmx imported: import a mixer of your own first.

        Args:
            checkpoint_path: a file that `fit` or `Trainer.save_checkpoint` wrote.
            map_location: the device that the model is put on.
            strict: refuse weights that the network does not have, or lacks.
            **changes: constructor arguments in place of the checkpoint's.

        Raises:
            UserError: for a file that is missing, damaged or holds code, for classes whose module is not imported,
                and for weights of another network.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        arguments = {**checkpoint["hyper_parameters"], **changes}
        try:
            model = cls(**arguments)
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"], strict=strict)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"{checkpoint_path}: does not fit {cls.__name__}: {_first_lines(error)}") from error
        return model.to(map_location)

    def _load_network(self, path: str) -> None:
        checkpoint = read_checkpoint(path)
        weights = {
            key.removeprefix("network."): value
            for key, value in checkpoint["state_dict"].items()
            if key.startswith("network.")
        }
        self.trained_on = checkpoint.get("llmx", {}).get("trained_on", {})
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"model.warm_start: {path} holds another network: {_first_lines(error)}") from error

    def _last_good(self) -> str:
        callbacks = self.trainer.checkpoint_callbacks
        paths = [
            getattr(callback, name, "") for name in ("last_model_path", "best_model_path") for callback in callbacks
        ]
        path = next((path for path in paths if path and Path(path).exists()), None)
        return f"The last good checkpoint is {path}." if path else "No checkpoint was written yet."


def _sampling(prefix: str, values: Config) -> Sampling:
    try:
        return Sampling(**values)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def _check_drafts(prefix: str, network: Network, sampling: Sampling) -> None:
    try:
        check_drafts(network, sampling)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
