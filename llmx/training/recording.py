"""The callbacks that record a fit in its folder and in TensorBoard; `llmx.runs.record` writes and reads the files."""

import json
import os
import time
from typing import Any

import lightning.pytorch as pl
import rich
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from llmx import display
from llmx.audits.causality_report import influence_figure
from llmx.data.repeated import STRETCH
from llmx.data.windows import Batch
from llmx.parts.parameter_count import count_parameters
from llmx.protocol import IGNORE
from llmx.runs.memory import peak_bytes
from llmx.runs.provenance import code, file_hash, provenance, sources
from llmx.runs.record import begin_run, continue_run, end_run, write_losses
from llmx.training.callbacks import LearningRate, Samples, TokensPerSecond
from llmx.training.checkpoints import BestCheckpoint, LastCheckpoint
from llmx.training.lightning_types import Model, attributes, language_model, text_data
from llmx.training.logger import LAYOUT, run_folder, tensorboard
from llmx.training.metrics import bits, perplexity
from llmx.training.norms import NORMS_LAYOUT, NormsByLayer
from llmx.training.stopping import EndWithValidation, StopOnSignal

UNCOUNTED = -1.0  # no loss is below 0
REPEATED = 0.001  # the share of repeated text from which a run says it


class ValidationLosses(Callback):
    """Keeps the loss of each predicted character of the last validation of a fit, in nats (float32) and in the order of
    the split. With them `compare` compares runs character by character, long after their checkpoints are gone."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.batches.append(outputs.float().masked_fill(batch.targets == IGNORE, UNCOUNTED))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.batches:
            return
        # the first process has the first rows of each batch
        mine = torch.stack(self.batches)  # (N, B, T)
        all_: Any = pl_module.all_gather(mine)
        losses = all_.view(trainer.world_size, *mine.shape).transpose(0, 1)
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            write_losses(folder, losses[losses != UNCOUNTED].cpu().numpy())


class RunRecord(Callback):
    """Records where a run comes from, how it was continued, and its final numbers; fills TensorBoard's HParams tab.
    Without the config as YAML, as in a notebook, it makes one from the objects."""

    def __init__(self, config: str | None = None, command: list[str] | None = None):
        self.config = config
        self.command = command
        self.final: dict[str, float] = {}

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = language_model(pl_module)
        self.finished = False
        self.started = time.perf_counter()
        self.first_step = trainer.global_step
        assert model.description is not None
        rich.print(model.description.render())
        if model.causality is not None:
            rich.print(model.causality.summary())
        compiled = "compiled" if model.compiled else "not compiled"
        print(f"precision {trainer.precision}, {compiled}, on {trainer.world_size} x {model.device.type}")
        repeated = None if trainer.global_step else _repeated(trainer)
        folder = run_folder(trainer)
        if folder is None:
            return
        config = self.config or _config_of_objects(trainer, model)
        record = _record(trainer, model)
        if trainer.global_step:
            continue_run(folder, config, record, trainer.global_step)
            return
        warm_start = model.warm_start
        origin = provenance() | ({} if self.command is None else {"command": self.command})
        start = {"warm_start": warm_start and {"file": warm_start, "sha256": file_hash(warm_start)}}
        begin_run(folder, config, origin | record | start | {"val_text_in_train": repeated})
        board = tensorboard(trainer)
        if board is not None:
            _show(board, trainer, model)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = language_model(pl_module)
        if "val/loss" in trainer.callback_metrics and not trainer.sanity_checking:
            loss = trainer.callback_metrics["val/loss"].item()
            self.final = {"val/loss": loss, "val/perplexity": perplexity(loss), "val/bits_per_char": bits(loss)}
            if trainer.state.fn == "fit" and trainer.global_step >= model.total_steps:
                # before the last checkpoint: a run that has saved its last step never runs again
                self._finish(trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = language_model(pl_module)
        if not self.finished:  # ended early, or not validated
            self._finish(trainer, model)

    def _finish(self, trainer: pl.Trainer, model: Model) -> None:
        self.finished = True
        folder = run_folder(trainer)
        if folder is None:
            return
        best: Any = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        losses = [] if best is None else [self.final.get("val/loss"), best.best_model_score]
        samples = next((c for c in attributes(trainer).callbacks if isinstance(c, Samples)), None)
        per_step = model.learning.tokens_per_step(attributes(trainer).datamodule)
        device = model.device
        seconds = time.perf_counter() - self.started
        metrics = {
            **self.final,
            "best/val/loss": min((float(loss) for loss in losses if loss is not None), default=None),
            "step": trainer.global_step,
            "tokens": per_step and trainer.global_step * per_step,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
            "generated_tokens_per_second": None if samples is None else samples.tokens_per_second,
            "seconds": round(seconds, 1),
            "steps_in_these_seconds": trainer.global_step - self.first_step,
            "leaking": model.leaking,
        }
        end_run(folder, metrics)
        board = tensorboard(trainer)
        if board is not None:
            # TensorBoard shows the first five metrics by name
            final = self.final | {"parameters": count_parameters(model.network), "seconds": seconds}
            for name, value in final.items():
                board.add_scalar(f"final/{name.removeprefix('val/')}", value, trainer.global_step - 1)  # as val/loss
            board._get_file_writer().add_summary(hparams({}, {})[2])  # the end of its session


def _repeated(trainer: pl.Trainer) -> float | None:
    """The share of the validation split that the training split holds word for word, said where it matters; None for
    data that is no text."""
    data = text_data(trainer)
    if data is None:
        return None
    share = data.share_repeated()
    if share > REPEATED:
        print(
            f"{display.percent(share)} of the validation split stands in the training split word for word, in stretches"
            f" of at least {STRETCH} {data.tokenizer.unit}s: a network that memorises text has a lower val/loss there."
        )
    return share


def _record(trainer: pl.Trainer, model: Model) -> dict[str, Any]:
    """What a new and a continued run both hand over: not the origin, and not the warm start, whose file may be gone."""
    assert model.description is not None
    parts: list[Any] = [*model.network.modules(), *trainer.optimizers, *attributes(trainer).callbacks]
    for scheduler in trainer.lr_scheduler_configs:
        parts += getattr(scheduler.scheduler, "lr_lambdas", [])
    report = model.causality
    return {
        "data": attributes(trainer).datamodule.protocol,
        "parameters": count_parameters(model.network),
        "network": {key: value for key, value in model.description.to_dict().items() if key != "layers"},
        "precision": str(trainer.precision),
        "code": code(),
        "sources": sources({type(part) for part in parts}),
        "compiled": model.compiled,
        "devices": trainer.world_size,
        "steps": model.total_steps,
        "audit": None if report is None else report.to_dict(),
        "leaking": model.leaking,
    }


def _show(board: Any, trainer: pl.Trainer, model: Model) -> None:
    """Writes what TensorBoard shows from the start: charts, settings, influence map."""
    norms = any(isinstance(callback, NormsByLayer) for callback in attributes(trainer).callbacks)
    board.add_custom_scalars(LAYOUT | (NORMS_LAYOUT if norms else {}))
    settings: dict[str, Any] = {
        "model": dict(model.hparams),
        "data": attributes(trainer).datamodule.protocol,
        "seed": torch.initial_seed(),
        "steps": model.total_steps,
        "leaking": model.leaking,
    }
    # without torch's list of all columns, TensorBoard collects the settings of all runs. With it, the first run's
    # columns would stand for the whole folder, though each network has settings of its own
    board._get_file_writer().add_summary(hparams(_flat(settings), {})[1])  # the start of a session
    if model.causality is not None and model.causality.influence is not None:
        board.add_figure("audit/influence", influence_figure(model.causality), 0)


def _config_of_objects(trainer: pl.Trainer, model: Model) -> str:
    """The configuration that would build these objects, as YAML; of callbacks only the classes."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    arguments = {key: value for key, value in model.hparams.items() if key not in ("tokenizer", "window")}
    lightnings = Callback.__module__.rpartition(".")[0]  # configs name Lightning's callbacks by this package
    names = []
    for callback in attributes(trainer).callbacks:
        kind = type(callback)
        module = lightnings if kind.__module__.startswith(f"{lightnings}.") else kind.__module__
        if not isinstance(callback, ProgressBar | ModelSummary) and not module.startswith("llmx."):
            names.append(f"{module}.{kind.__qualname__}")
    kept = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    callbacks = [{"class_path": name} for name in names]
    content = {
        "seed_everything": None if seed is None else int(seed),
        "trainer": {**{key: getattr(trainer, key) for key in kept}, "callbacks": callbacks},
        "model": arguments | {"warm_start": model.warm_start},
        "data": dict(attributes(trainer).datamodule.hparams),
    }
    return yaml.safe_dump(json.loads(json.dumps(content, default=str)), sort_keys=False)  # paths as text


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `model/network/dim: 128` with numbers, text and booleans; names leave out class_path and
    init_args."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = dict(value)
            if "class_path" in inner:
                flat[name] = inner.pop("class_path").rsplit(".", 1)[-1]
                inner = inner.get("init_args", {})
            flat |= _flat(inner, f"{name}/")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif value is not None:
            flat[name] = json.dumps(value)
    return flat


def run_callbacks(
    config: str | None = None, command: list[str] | None = None, checkpoints: bool = True
) -> list[Callback]:
    """The callbacks of a run. With them and a RunLogger, `compare` reads the run and `fit --ckpt_path` continues it.

    `config` is the run's config as YAML, `command` the command that started it, if not that of this process.
    """
    shown = [LearningRate(), TokensPerSecond(), Samples(), EndWithValidation(), StopOnSignal()]
    kept = [BestCheckpoint(), LastCheckpoint()] if checkpoints else []
    return [*shown, ValidationLosses(), RunRecord(config, command), *kept]
