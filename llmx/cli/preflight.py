"""Builds data, network and trainer from parsed settings, and refuses what cannot run before anything is written."""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

import llmx
from llmx.audits.network_copies import copy_network
from llmx.cli.parser import GROUPS
from llmx.cli.resume import Checkpoint, check_same_network
from llmx.costs.from_config import failing_frame, window_failure
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.protocol import Network
from llmx.runs.folder import RUNS
from llmx.runs.record import check_same_data
from llmx.training.auditing import audit_network, audit_start
from llmx.training.corpus_watch import watched
from llmx.training.hardware import fast_precision
from llmx.training.lightning_types import attributes
from llmx.training.logger import RunLogger
from llmx.training.maps import MixerMaps
from llmx.training.module import LanguageModel
from llmx.training.trainer import Trainer


def check_settings(verb: str, settings: Any, checkpoint: Checkpoint | None) -> None:
    """Refuses what the parser lets pass and nothing further on would say clearly. Raises UserError."""
    for group, cls in GROUPS.items():
        for name, parameter in inspect.signature(cls).parameters.items():
            if name in settings[group] and settings[group][name] is None and parameter.default is not None:
                raise UserError(f"{group}.{name}: null is not a value for it")
    trainer = settings.trainer
    if verb == "fit" and trainer.max_steps == 0:
        raise UserError("trainer.max_steps: 0 leaves nothing to train; give the number of optimizer steps")
    if verb == "fit" and trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:
        raise UserError("trainer.max_steps: give the number of optimizer steps (or trainer.max_epochs)")
    if trainer.accumulate_grad_batches < 1:
        raise UserError(f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} is below 1")
    if trainer.val_check_interval == 0 and trainer.check_val_every_n_epoch is None:
        raise UserError("trainer.val_check_interval: 0 is no number of steps; trainer.limit_val_batches 0 switches off")
    if verb == "predict" and checkpoint is None:
        raise UserError("ckpt_path: predict needs a checkpoint, --ckpt_path RUN/checkpoints/last.ckpt")


def build_data(settings: Any, checkpoint: Checkpoint | None) -> TextDataModule:
    """The data of the settings, with the tokenizer of the checkpoint if there is one."""
    tokenizer = {} if checkpoint is None else {"tokenizer": checkpoint.tokenizer}
    return TextDataModule(**{**settings.data.as_dict(), **tokenizer})


def check_data(verb: str, settings: Any, data: TextDataModule, checkpoint: Checkpoint | None) -> None:
    """Reads the corpus, but for `predict`, which needs none. Raises UserError for a tokenizer of another size than
    declared, for other data than the run that a fit goes on in, and for a corpus that cannot be used."""
    if settings.vocab_size not in (None, data.tokenizer.vocab_size):
        raise UserError(
            f"vocab_size: {settings.vocab_size} is declared, but the tokenizer of the data has "
            f"{data.tokenizer.vocab_size}; leave vocab_size out, or give a tokenizer of that size"
        )
    if verb == "fit" and checkpoint is not None:
        check_same_data(checkpoint.run, data.protocol)
    if verb != "predict":
        data.prepare()


def build_model(verb: str, settings: Any, data: TextDataModule, checkpoint: Checkpoint | None) -> LanguageModel:
    """The network with its objective; before a fit it is audited, so that a leak leaves no run folder. Raises UserError
    for a network that cannot be built, does not take the window, is another one than the checkpoint's, cannot be
    sharded where it should be, or leaks."""
    sharded = is_sharded(settings.trainer.strategy)
    # without an audit a sharded network is never whole: LanguageModel.configure_model builds it
    never_whole = sharded and settings.model.audit == "off"
    with torch.device("meta") if never_whole else nullcontext():
        model = LanguageModel(**settings.model.as_dict(), tokenizer=data.tokenizer, window=data.hparams["window"])
    scalar = next((name for name, value in model.network.named_parameters() if not value.ndim), None)
    if sharded and scalar is not None:
        raise UserError(f"trainer.strategy: this network cannot be sharded: {scalar} has no dimensions")
    if checkpoint is not None:
        check_same_network(checkpoint, model)
    if not never_whole:
        with watched(model, None if verb == "predict" else data):
            check_window(model.network, model.window)
    if verb in ("fit", "audit"):  # before the audit, which would say nothing of a network that has not counted
        if checkpoint is None:
            with watched(model, data):
                model.learning.count(data)
        elif model.learning.needs_counting:
            model.load_state_dict(checkpoint.content["state_dict"])
    if verb == "fit":
        audit_network(model, data)
    return model


def is_sharded(strategy: Any) -> bool:
    """Whether the trainer's strategy is a ModelParallelStrategy."""
    return str(getattr(strategy, "class_path", strategy)).endswith(ModelParallelStrategy.__name__)


def precision(accelerator: str, checkpoint: Checkpoint | None) -> Any:
    """The precision of the checkpoint's run, so that its numbers come out again; else the fast one of this machine."""
    return (checkpoint and checkpoint.precision) or fast_precision(accelerator)


def trainer_arguments(
    verb: str, trainer: Any, model: LanguageModel, data: TextDataModule, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Trainer arguments that replace those of the settings."""
    fit = verb == "fit"
    changes: dict[str, Any] = {} if fit else {"enable_checkpointing": False}
    if trainer.logger in (None, True):
        changes["logger"] = _logger(trainer.default_root_dir, model, data, checkpoint) if fit else False
    if trainer.precision is None and verb != "predict":  # sampling is faster in fp32
        changes["precision"] = precision(trainer.accelerator, checkpoint)
    # Lightning counts batches here; a run should validate at the same steps however they are accumulated
    if fit and isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is None:
        changes["val_check_interval"] = trainer.val_check_interval * trainer.accumulate_grad_batches
    if trainer.strategy == ModelParallelStrategy.__name__:  # Lightning has no short name for it
        changes["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
    if fit and trainer.devices == "auto" and model.learning.single_process:
        changes["devices"] = 1
    return changes


def _logger(root: str | None, model: LanguageModel, data: TextDataModule, checkpoint: Checkpoint | None) -> RunLogger:
    """A logger in a new folder, or in that of the resumed run, whose curves are cut after the checkpoint's step."""
    tokens = model.learning.tokens_per_step(data)
    if checkpoint is None or not checkpoint.in_run:
        return RunLogger(root or ".", RUNS, tokens_per_step=tokens)
    return RunLogger(
        checkpoint.run.parent.parent,
        checkpoint.run.parent.name,
        version=checkpoint.run.name,
        purge_step=checkpoint.content["global_step"],
        tokens_per_step=tokens,
    )


def check_fit(model: LanguageModel, data: TextDataModule, trainer: Trainer, sharded: bool) -> None:
    """Tries what Lightning would meet only in a run that has begun: loaders, optimizer, live audit, callbacks. Raises
    UserError for whatever of these cannot be used."""
    if model.learning.single_process and trainer.world_size > 1:
        raise UserError("trainer.devices: this network counts, which one process does; give 1")
    data.trainer = trainer
    next(iter(data.train_dataloader()))  # devices and accumulation divide the batch, and memory holds it
    model.trainer, attributes(trainer).datamodule = trainer, data
    model.configure_optimizers()
    if trainer.strategy.launcher is None:  # else each process audits
        audit_start(model)
    for callback in attributes(trainer).callbacks:
        if isinstance(callback, MixerMaps):
            callback.check(model)
        if isinstance(callback, WeightAveraging) and sharded:
            raise UserError("trainer.callbacks: a sharded network is not averaged, for its average is whole")


def check_window(network: Network, window: int) -> None:
    """Runs a copy of the network on a whole window. Raises UserError for a network that does not take it, and for a
    component whose output has another shape than its input."""
    network = copy_network(network)  # the network itself first reads a training batch: it may count what it reads
    names = {module: name for name, module in network.named_modules()}

    def check(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.shape != args[0].shape:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise UserError(
                f"model.network: {names[module]} ({type(module).__name__}) gives {what} for {tuple(args[0].shape)}; "
                "its output has the shape of its input"
            )

    for component in {component for block in network.layers for component in (block.mixer, block.feed_forward)}:
        component.register_forward_hook(check)
    try:
        with torch.no_grad():
            outputs = network(torch.zeros(1, window, dtype=torch.int64))
        if outputs.ndim != 3:
            raise UserError(
                f"model.network: gives {tuple(outputs.shape)} for {(1, window)}, not a row of logits a token; "
                "blocks of several streams stand at all layers or at none"
            )
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and failing_frame(error).filename.startswith(str(Path(llmx.__file__).parent)):
            raise UserError(f"model.network does not take windows of {window} (data.window): {error}") from error
        raise UserError(window_failure(window, error)) from error
