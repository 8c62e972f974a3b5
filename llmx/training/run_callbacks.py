"""The callbacks that log, save and record a fit."""

from lightning.pytorch.callbacks import Callback

from llmx.training.callbacks import LearningRate, Samples, TokensPerSecond
from llmx.training.checkpoints import BestCheckpoint, LastCheckpoint
from llmx.training.record import RunRecord, ValidationLosses
from llmx.training.stopping import EndWithValidation, StopOnSignal


def run_callbacks(
    config: str | None = None, command: list[str] | None = None, checkpoints: bool = True
) -> list[Callback]:
    """The callbacks of a run. With them and a RunLogger, `compare` reads the run and `fit --ckpt_path` continues it.

    `config` is the run's config as YAML, `command` the command that started it, if not that of this process.
    """
    shown = [LearningRate(), TokensPerSecond(), Samples(), EndWithValidation(), StopOnSignal()]
    kept = [BestCheckpoint(), LastCheckpoint()] if checkpoints else []
    return [*shown, ValidationLosses(), RunRecord(config, command), *kept]
