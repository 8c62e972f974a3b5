"""All that makes a fit a run: one that is watched, can be continued, and is read by `compare`."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from llmx.training.callbacks import LearningRate, Samples, TokensPerSecond
from llmx.training.record import RunRecord, ValidationLosses
from llmx.training.saving import BestCheckpoint, EndWithValidation, LastCheckpoint, StopOnSignal


def run_callbacks(
    config: str | None = None, command: list[str] | None = None, checkpoints: bool = True
) -> list[Callback]:
    """The callbacks of a run, beside its RunLogger.

    Args:
        config: the configuration that it comes from, as YAML; without one, as in a notebook, it is made of the objects.
        command: what it comes from, where that is not the command of this process.
        checkpoints: whether it keeps any.
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
