"""The trainer's arguments where they differ from the user's: callbacks, logger, precision, steps."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from llmx.cli.resume import Checkpoint
from llmx.data.datamodule import TextDataModule
from llmx.runs.folder import RUNS
from llmx.training.hardware import fast_precision
from llmx.training.logger import RunLogger
from llmx.training.module import LanguageModel


def is_sharded(strategy: Any) -> bool:
    """Whether the trainer's strategy is a ModelParallelStrategy."""
    return str(getattr(strategy, "class_path", strategy)).endswith(ModelParallelStrategy.__name__)


def precision(accelerator: str, checkpoint: Checkpoint | None) -> Any:
    """The precision of the checkpoint's run, so that its numbers come out again; else the fast one of this machine."""
    return (checkpoint and checkpoint.precision) or fast_precision(accelerator)


def changed_arguments(
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
