"""What a run keeps of itself in its folder, so that it can be believed and compared."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import rich
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from llmx.audits.causality_report import influence_figure
from llmx.config.yaml import parse_yaml
from llmx.data.datamodule import TextDataModule
from llmx.data.windows import Batch
from llmx.errors import UserError
from llmx.parts.counting import count_parameters
from llmx.protocol import IGNORE, CountingNetwork
from llmx.runs.provenance import code, file_hash, provenance, sources
from llmx.training.callbacks import Samples
from llmx.training.logger import LAYOUT, run_folder, tensorboard
from llmx.training.metrics import bits, perplexity
from llmx.training.module import LanguageModel
from llmx.training.norms import NORMS_LAYOUT, NormsByLayer
from llmx.training.saving import BestCheckpoint

UNCOUNTED = -1.0  # no loss is below 0


class ValidationLosses(Callback):
    """`val_losses.npy`: what the last validation of a fit gave each character that it predicted, in nats (float32), in
    the order of the split. With them two runs compare character by character, long after their checkpoints are gone."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches: list[Tensor] = []

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Tensor, batch: Batch, *_: Any
    ) -> None:
        self.batches.append(outputs.float().masked_fill(batch.targets == IGNORE, UNCOUNTED))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.batches:
            return
        # of each batch the first rows are those of the first process
        mine = torch.stack(self.batches)  # (N, B, T)
        all_: Any = pl_module.all_gather(mine)
        losses = all_.view(trainer.world_size, *mine.shape).transpose(0, 1)
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            np.save(folder / "val_losses.npy", losses[losses != UNCOUNTED].cpu().numpy())


class RunRecord(Callback):
    """Keeps what is needed to believe the run, in its folder: `config.yaml` (the settings it began with), `run.json`
    (commit, versions, hardware, data, audit, and with what it was continued), `metrics.json` (the final numbers, of a
    run that has ended); and fills TensorBoard's HParams tab.

    Args:
        config: the run's full configuration as YAML; where there is none (a notebook), one is made of the objects.
        command: what the run comes from, where it is not the command of this process.
    """

    def __init__(self, config: str | None = None, command: list[str] | None = None):
        self.config = config
        self.command = command
        self.final: dict[str, float] = {}

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        self.finished = False
        self.started = time.perf_counter()
        self.first_step = trainer.global_step
        assert pl_module.description is not None
        rich.print(pl_module.description.render())
        if pl_module.causality is not None:
            rich.print(pl_module.causality.summary())
        compiled = "compiled" if pl_module.compiled else "not compiled"
        print(f"precision {trainer.precision}, {compiled}, on {trainer.world_size} x {pl_module.device.type}")
        folder = run_folder(trainer)
        if folder is None:
            return
        config = self.config or _config_of_objects(trainer, pl_module)
        now = {**_used(trainer, pl_module), "config": _settings(config)}
        if trainer.global_step:
            self._go_on(folder, now, trainer, pl_module)
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        (folder / "config.yaml").write_text(config)
        warm_start = pl_module.warm_start
        record = self._record(trainer, pl_module)
        record["warm_start"] = warm_start and {"file": warm_start, "sha256": file_hash(warm_start)}
        _write_json(folder / "run.json", record)
        board = tensorboard(trainer)
        if board is not None:
            self._show(board, trainer, pl_module)

    def _go_on(self, folder: Path, now: dict[str, Any], trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Notes where and with what other settings a run is continued, and takes back the numbers of its end."""
        check_same_data(folder, _data(trainer))
        if trainer.global_step < pl_module.total_steps:
            (folder / "metrics.json").unlink(missing_ok=True)
        if not (folder / "run.json").is_file() or not (folder / "config.yaml").is_file():
            return
        record = _read_record(folder)
        legs = {k: leg for k, leg in record.get("continued", {}).items() if int(k) < trainer.global_step}
        began = {"config": _settings((folder / "config.yaml").read_text()), **record}
        before = list(legs.values())[-1] if legs else {key: began[key] for key in now.keys() & began.keys()}
        if now != now | before:
            legs[str(trainer.global_step)] = now
        record["continued"] = legs
        if pl_module.causality is not None:
            record["audit"] = record.get("audit") or pl_module.causality.to_dict()
        elif now["sources"] != before.get("sources", now["sources"]):
            record["audit"] = None  # of other code
        record["leaking"] = record.get("leaking", False) or pl_module.leaking
        _write_json(folder / "run.json", record)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if "val/loss" in trainer.callback_metrics and not trainer.sanity_checking:
            loss = trainer.callback_metrics["val/loss"].item()
            self.final = {"val/loss": loss, "val/perplexity": perplexity(loss), "val/bits_per_char": bits(loss)}
            if trainer.state.fn == "fit" and trainer.global_step >= pl_module.total_steps:
                # before the last step is saved: a run whose last step is saved is never run again
                self._finish(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not self.finished:  # ended early, or not validated
            self._finish(trainer, pl_module)

    def _finish(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.finished = True
        folder = run_folder(trainer)
        if folder is None:
            return
        best: Any = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        losses = [] if best is None else [self.final.get("val/loss"), best.best_model_score]
        score = min((float(loss) for loss in losses if loss is not None), default=None)
        samples = next((c for c in trainer.callbacks if isinstance(c, Samples)), None)  # type: ignore[attr-defined]
        counts = isinstance(pl_module.network, CountingNetwork)
        seconds = time.perf_counter() - self.started
        _write_json(
            folder / "metrics.json",
            {
                **self.final,
                "best/val/loss": score,
                "step": trainer.global_step,
                # as many windows a step; a network that counts has seen the training split once
                "tokens": None if counts else trainer.global_step * _data(trainer).batch_size * _data(trainer).window,
                "peak_bytes": peak_bytes(pl_module.device),
                "generated_tokens_per_second": None if samples is None else samples.tokens_per_second,
                "seconds": round(seconds, 1),
                "steps_in_these_seconds": trainer.global_step - self.first_step,
                "leaking": pl_module.leaking,
            },
        )
        board = tensorboard(trainer)
        if board is not None:
            # TensorBoard shows the first five metrics by name
            final = {name.removeprefix("val/"): value for name, value in self.final.items()}
            final |= {"parameters": count_parameters(pl_module.network), "seconds": seconds}
            for name, value in final.items():
                board.add_scalar(f"final/{name}", value, trainer.global_step - 1)  # where val/loss is
            _, _, end = hparams({}, {})
            board._get_file_writer().add_summary(end)

    def _show(self, board: Any, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """What TensorBoard has from the start: the charts, the settings, the influence map."""
        norms = any(isinstance(callback, NormsByLayer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        board.add_custom_scalars(LAYOUT | (NORMS_LAYOUT if norms else {}))
        settings: dict[str, Any] = {
            "model": dict(pl_module.hparams),
            "data": _data(trainer).protocol,
            "seed": torch.initial_seed(),
            "steps": pl_module.total_steps,
            "leaking": pl_module.leaking,
        }
        # without torch's list of all columns: TensorBoard would take the first run's for the whole folder, where each
        # network has settings of its own; where there is none, it collects them from all runs
        _, start, _ = hparams(_flat(settings), {})
        board._get_file_writer().add_summary(start)
        if pl_module.causality is not None and pl_module.causality.influence is not None:
            board.add_figure("audit/influence", influence_figure(pl_module.causality), 0)

    def _record(self, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, Any]:
        report = pl_module.causality
        assert pl_module.description is not None
        return {
            **provenance(),
            **({} if self.command is None else {"command": self.command}),
            "data": _data(trainer).protocol,
            "parameters": count_parameters(pl_module.network),
            "network": {key: value for key, value in pl_module.description.to_dict().items() if key != "layers"},
            **_used(trainer, pl_module),
            "compiled": pl_module.compiled,
            "devices": trainer.world_size,
            "steps": pl_module.total_steps,
            "audit": None if report is None else report.to_dict(),
            "leaking": pl_module.leaking,
        }


def check_same_data(folder: Path, data: TextDataModule) -> None:
    """Whether a run in this folder, if there is one, may go on with this data.

    Raises:
        UserError: for another text, split, batch or evaluation than the run began with.
    """
    if not (folder / "run.json").is_file():
        return
    held = _read_record(folder).get("data", {})
    now = json.loads(json.dumps(data.protocol))
    for key in now:
        if key in ("corpus", "requested") or held.get(key, now[key]) == now[key]:  # the text may lie elsewhere
            continue
        began, goes_on = held[key], now[key]
        if key in ("sha256", "characters"):
            began, goes_on = (f"{of.get('corpus')} (sha256 {str(of.get('sha256'))[:12]})" for of in (held, now))
        name = {"sha256": "corpus", "characters": "corpus", "vocab_size": "tokenizer"}.get(key, key)
        raise UserError(
            f"data.{name}: {folder} began with {began} and cannot go on with {goes_on}; begin a new run, which "
            "--model.warm_start gives this one's weights"
        )


def _used(trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, Any]:
    """What the settings leave to the machine, and to files beside them."""
    parts = [*pl_module.network.modules(), *trainer.optimizers, *trainer.callbacks]  # type: ignore[attr-defined]
    for config in trainer.lr_scheduler_configs:
        parts += getattr(config.scheduler, "lr_lambdas", [])
    return {
        "precision": str(trainer.precision),
        "code": code(),
        "sources": sources({type(part) for part in parts}),
    }


def _config_of_objects(trainer: pl.Trainer, pl_module: LanguageModel) -> str:
    """What a configuration of them would say; of callbacks the classes alone."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    model = {key: value for key, value in pl_module.hparams.items() if key not in ("tokenizer", "window")}
    lightnings = Callback.__module__.rpartition(".")[0]  # where all of them are, as configurations name them
    names = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback)
        module = lightnings if kind.__module__.startswith(f"{lightnings}.") else kind.__module__
        if not isinstance(callback, ProgressBar | ModelSummary) and not module.startswith("llmx."):
            names.append(f"{module}.{kind.__qualname__}")
    kept = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    settings = {key: getattr(trainer, key) for key in kept}
    settings["callbacks"] = [{"class_path": name} for name in names]
    content = {
        "seed_everything": None if seed is None else int(seed),
        "trainer": settings,
        "model": model | {"warm_start": pl_module.warm_start},
        "data": dict(_data(trainer).hparams),
    }
    return yaml.safe_dump(json.loads(json.dumps(content, default=str)), sort_keys=False)  # paths as text


def _settings(config: str) -> dict[str, Any]:
    return {key: value for key, value in parse_yaml(config, "config.yaml").items() if key != "ckpt_path"}


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        legs = record.get("continued", {}).items()
        whole = isinstance(record.get("data", {}), dict) and all(k.isdigit() and isinstance(v, dict) for k, v in legs)
    except (ValueError, RecursionError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is damaged: what the run began with cannot be read")
    return record


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held at once: by the process, or on a GPU by its tensors there; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # not getrusage's, which begins with the memory of the process that has started this one
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if "VmHWM" in status:
            return 1024 * int(status["VmHWM"].split()[0])  # kilobytes
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes but there


def _data(trainer: pl.Trainer) -> TextDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all: a run that is killed here has to go on from it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `model/network/dim: 128`, numbers, strings and booleans only; class_path and init_args are
    left out of the names."""
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
