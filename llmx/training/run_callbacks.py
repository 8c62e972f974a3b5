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

    Args:
        config: the run's config as YAML; if not given, as in a notebook, one is made from the objects.
        command: the command that started the run, if it is not that of this process.
        checkpoints: whether the run keeps checkpoints.
    """
    callbacks = [
        LearningRate(),
        TokensPerSecond(),
        Samples(),
        EndWithValidation(),
        StopOnSignal(),
        ValidationLosses(),
        RunRecord(config, command),
    ]
    return [*callbacks, *([BestCheckpoint(), LastCheckpoint()] if checkpoints else [])]
