"""TensorBoard's logger that claims its run folder atomically, and draws the losses against tokens too."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from llmx.runs.folder import EVENTS, claim_version
from llmx.runs.record import read_events
from llmx.training.lightning_types import attributes

BY_TOKENS = {"train/loss": "loss_by_tokens/train", "val/loss": "loss_by_tokens/val"}
# the charts of the tab Custom Scalars: category, title, kind with patterns of tags
LAYOUT = {
    "loss": {
        "training and validation, by step": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "training and validation, by tokens seen": ["Multiline", ["^loss_by_tokens/"]],
    }
}


class RunLogger(TensorBoardLogger):
    """Makes its `version_N` as it chooses the number, so that two runs that start at once get one each.

    It logs each loss to `loss_by_tokens/` too, where the step is the number of tokens seen. There the curves of runs
    with different batches can be compared.

    Args:
        save_dir: the parent of the folder of all runs, which `name` names.
        version: the run to continue; a new one if not given.
        purge_step: a continued run keeps its curves up to this step.
        tokens_per_step: over all devices; None if steps do not count what the network has seen.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str,
        version: str | None = None,
        purge_step: int | None = None,
        tokens_per_step: int | None = None,
    ):
        # a new run marks its beginning too: TensorBoard takes the first mark for that, and cuts curves at later ones
        super().__init__(save_dir, name, version, default_hp_metric=False, purge_step=purge_step or 0)
        self.purge_step = purge_step
        self.tokens_per_step = tokens_per_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is not None or self.purge_step is None:
            return super().experiment
        self._wait_for_a_later_name()
        if self.tokens_per_step is None:
            return super().experiment
        # TensorBoard drops all points after purge_step, which are nearly all points of the curves by tokens
        events = read_events(self.log_dir)
        board = super().experiment
        for tag in BY_TOKENS.keys() & events.keys():
            for event in events[tag]:
                if event.step < self.purge_step <= self._tokens(event.step):
                    board.add_scalar(BY_TOKENS[tag], event.value, self._tokens(event.step), event.wall_time)
        return board

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        metrics = {tag: value for tag, value in metrics.items() if tag != "epoch"}  # runs count in steps
        super().log_metrics(metrics, step)
        if step is None or self.tokens_per_step is None:
            return
        for tag in BY_TOKENS.keys() & metrics.keys():
            self.experiment.add_scalar(BY_TOKENS[tag], metrics[tag], self._tokens(step))

    def _wait_for_a_later_name(self) -> None:
        """Waits until the next file's name sorts last, for TensorBoard reads a run's files in the order of their names.
        A name holds the second it was opened in. What follows, process and count, sorts as text: 10 before 9."""
        while any(Path(self.log_dir).glob(f"{EVENTS}.{int(time.time()):010d}.*")):
            time.sleep(0.05)

    def _tokens(self, step: int) -> int:
        """Tokens seen after that step; steps count from 0."""
        return (step + 1) * (self.tokens_per_step or 0)

    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # which Lightning sets on the function
        return claim_version(Path(self.root_dir), version) if first else version


def tensorboard(trainer: pl.Trainer) -> Any:
    """The SummaryWriter of the run, if it has one."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and not attributes(trainer).fast_dev_run else None


def validated_board(trainer: pl.Trainer) -> Any:
    """The run's SummaryWriter after a validation of a fit; None after any other one, which shows nothing."""
    return None if trainer.sanity_checking or trainer.state.fn != "fit" else tensorboard(trainer)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of the run, if it keeps one."""
    # not trainer.log_dir: that is a broadcast, which hangs if only one rank asks
    folder = trainer.logger.log_dir if trainer.logger is not None else None
    return Path(folder) if folder and not attributes(trainer).fast_dev_run else None
