"""The Lightning callback that connects a running fit to its trial in the study."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from optuna import TrialPruned
from optuna.trial import Trial

from llmx.training.logger import run_folder
from llmx.training.module import LanguageModel


class ReportToStudy(Callback):
    """Records the run in the trial before the first step, and reports its validations to the pruner.

    `runs` are the finished runs of the trial, one a seed; `run` is this run, and gets its folder. If the pruner may end
    it, a validation may raise TrialPruned.
    """

    def __init__(self, trial: Trial, runs: list[dict[str, Any]], run: dict[str, Any], prune: bool):
        self.trial, self.runs, self.run, self.prune = trial, runs, run, prune

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer)
        self.run["folder"] = None if folder is None else str(folder)
        self.trial.set_user_attr("runs", [*self.runs, self.run])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        step, loss = trainer.global_step, trainer.callback_metrics.get("val/loss")
        if not self.prune or loss is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if step >= pl_module.total_steps:
            return  # the last validation is the result of the run: too late to prune it
        self.trial.report(loss.item(), step)
        if self.trial.should_prune():
            self.trial.set_user_attr("runs", [{**self.run, "pruned": True, "step": step}])
            raise TrialPruned
