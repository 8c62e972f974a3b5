"""A study of Optuna whose trials are runs of `fit` in this process.

Any number of processes work on one study. A combination of values goes into the study's queue when a process is about
to run one; whoever takes it there runs it, unless an earlier trial holds the same one already. A process that dies
leaves its trial without a heartbeat: another declares it failed, and queues it again.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import torch
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from llmx.cli import CLI, execute
from llmx.comparison.runs import PROTOCOL
from llmx.errors import UserError
from llmx.sweep.report import DIED
from llmx.sweep.space import Point, Space, flags, with_point
from llmx.sweep.watching import Watch

HEARTBEAT = 15  # seconds
GRACE = 120  # seconds without one, after which a trial's process counts as dead
RETRIES = 3  # of a trial whose process died, which may well be its own doing
CREATION = 5.0  # seconds within which the process that creates a study says what it is
POLL = 1.0  # seconds between two looks at what other processes do


class Held(Exception):
    """Another trial has what this one was made for."""


class Sweep:
    """Runs what is missing of a study.

    Args:
        name: of the study.
        storage: where it is kept.
        space: what is searched.
        points: all that are to be run; None where a sampler chooses.
        trials: how many are to be run, where a sampler chooses.
        prune: whether runs stop early that are worse than the median of the others.
        seeds: over which each point is run; None for one run with the seed of the configuration.
        fit: the arguments that all runs have.
        identity: what may not differ between processes and from one day to the next.
        say: prints a line.

    Raises:
        UserError: for a study that is another sweep's.
    """

    def __init__(
        self,
        name: str,
        storage: RDBStorage,
        space: Space,
        points: list[Point] | None,
        trials: int | None,
        prune: bool,
        seeds: list[int] | None,
        fit: list[str],
        identity: dict[str, Any],
        say: Callable[[str], None],
    ):
        self.space, self.points, self.wanted = space, points, trials
        self.prune, self.seeds, self.fit, self.say = prune, seeds, fit, say
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = TPESampler() if points is None else RandomSampler()  # the latter has nothing to choose
        pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()
        try:
            self.study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
            self.study.set_user_attr("sweep", identity)
        except DuplicatedStudyError:
            self.study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        self._check(name, identity)
        self.first = len(self.study.get_trials(deepcopy=False))  # the number of this session's first trial

    def _check(self, name: str, identity: dict[str, Any]) -> None:
        deadline = time.monotonic() + CREATION
        while (held := self.study.user_attrs.get("sweep")) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        other = [key for key in identity if held is None or held[key] != identity[key]]
        if other:
            what = "was not made by sweep" if held is None else f"has other {' and '.join(other)}"
            shown = f": {json.dumps(held[other[0]])}" if held is not None and other[0] != "settings" else ""
            raise UserError(f"study: {name} {what}{shown}; give a new one a name, --study NAME")

    def trials(self) -> list[FrozenTrial]:
        """All that count: not those that never began, nor failures that were tried again."""
        return _current(self.study.get_trials(deepcopy=False))

    def run(self) -> None:
        """Until nothing is missing.

        Raises:
            UserError: where every trial failed.
        """
        waited = False
        while True:
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            self._fail_unborn(trials)
            point, states = self._missing(trials), {trial.state for trial in trials}
            open_ = self.wanted is not None and len(_current(trials)) < self.wanted
            if point is not None:
                before = next((t for t in reversed(trials) if _point(t) == point), None)  # what it has is kept
                runs = [] if before is None else before.user_attrs.get("runs", [])
                self.study.enqueue_trial(point, user_attrs={"runs": runs})
            elif TrialState.WAITING not in states and not open_:
                if TrialState.RUNNING not in states:
                    break
                if not waited:
                    self.say("waiting for the trials of other processes")
                waited = True
                time.sleep(POLL)
                continue
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(Exception,))
            except ValueError as error:
                if "Cannot tell" not in str(error):
                    raise
                self.say(f"this process was silent for {GRACE} s, and its trial was given to another")
        trials = self.trials()
        if all(trial.state == TrialState.FAIL for trial in trials):
            raise UserError(f"every trial failed; the first: {trials[0].user_attrs.get('error', DIED)}")

    def _missing(self, trials: list[FrozenTrial]) -> Point | None:
        """The next point to queue: one that was never run, or failed before this session."""
        held = [_point(t) for t in trials if t.state != TrialState.FAIL or t.number >= self.first]
        failed = (_point(t) for t in _current(trials) if t.state == TrialState.FAIL)
        return next((point for point in self.points or failed if point not in held), None)

    def _fail_unborn(self, trials: list[FrozenTrial]) -> None:
        """Trials whose process died before their first heartbeat, which Optuna would wait for for ever."""
        for trial in trials:
            started = trial.datetime_start or datetime.now()
            unborn = trial.state == TrialState.RUNNING and not trial.params
            if unborn and (datetime.now() - started).total_seconds() > GRACE:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _held(self, trial: Trial) -> bool:
        """Whether an earlier trial has this one's point, or there are enough without this one."""
        trials = self.study.get_trials(deepcopy=False)
        earlier = [t for t in trials if t.number < trial.number]
        point = next(_point(t) for t in trials if t.number == trial.number)
        if point.keys() == self.space.dimensions.keys():
            return any(t.state != TrialState.FAIL and _point(t) == point for t in earlier)
        return self.wanted is None or len(_current(earlier)) >= self.wanted

    def _objective(self, trial: Trial) -> float:
        if self._held(trial):
            raise Held
        point = {key: dimension.suggest(trial, key) for key, dimension in self.space.dimensions.items()}
        shown = f"trial {trial.number}: {' '.join(flags(point))}"
        trial.set_user_attr("parameters", point)
        try:
            loss = self._loss(trial, with_point(["fit", *self.fit], point))
        except optuna.TrialPruned:
            self.say(f"{shown}: pruned")
            raise
        except SystemExit:  # Lightning's answer to an interrupt
            raise KeyboardInterrupt from None
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
                error = UserError(f"{type(error).__name__}: {error}")
            trial.set_user_attr("error", str(error))
            self.say(f"{shown}: failed: {error}")
            raise
        self.say(f"{shown}: val loss {loss:.4f}")
        return loss

    def _loss(self, trial: Trial, arguments: list[str]) -> float:
        """The final validation loss, its mean over the seeds. Every run is kept among the trial's user attributes."""
        runs = [run for run in trial.user_attrs.get("runs", []) if "val/loss" in run]  # of an earlier attempt
        torch.compiler.reset()  # the graphs of other networks count towards a limit, beyond which nothing is compiled
        seeds: list[int] | list[None] = self.seeds or [None]
        for seed in seeds:
            if any(run["seed"] == seed for run in runs):
                continue
            run: dict[str, Any] = {"seed": seed, "folder": None}

            def started(folder: Path | None, run: dict[str, Any] = run) -> None:
                run["folder"] = None if folder is None else str(folder)
                trial.set_user_attr("runs", [*runs, run])

            def validated(step: int, loss: float, run: dict[str, Any] = run) -> None:
                if not self.prune or runs:
                    return
                trial.report(loss, step)
                if trial.should_prune():
                    trial.set_user_attr("runs", [{**run, "pruned": True, "step": step}])
                    raise optuna.TrialPruned

            seeding = [] if seed is None else [f"--seed_everything={seed}"]
            cli = _fit([*arguments, *seeding], Watch(started, validated))
            loss = cli.trainer.callback_metrics.get("val/loss")
            if loss is None or not math.isfinite(loss):
                raise UserError(f"val/loss is {'not measured' if loss is None else loss.item()}: nothing to compare by")
            protocol = {key: cli.datamodule.protocol[key] for key in PROTOCOL}
            audit = {"leaking": cli.model.leaking, "audited": cli.model.causality is not None}
            runs.append({**run, "val/loss": loss.item(), **audit, "protocol": protocol})
            trial.set_user_attr("runs", runs)
        return statistics.fmean(run["val/loss"] for run in runs)


def open_storage(url: str) -> RDBStorage:
    """The database, made if it is new.

    Raises:
        UserError: where it cannot be opened.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of the heartbeat
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    failure: Exception | None = None
    for _ in range(4):  # two processes that make the tables at once get in each other's way
        try:
            return RDBStorage(
                url,
                engine_kwargs=waiting,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
        except sqlalchemy.exc.DBAPIError as error:
            failure = error.orig or error
            time.sleep(0.5)
        except Exception as error:  # an unknown dialect, a driver that is missing, a schema of another version
            failure = error
            break
    try:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        shown = url
    raise UserError(f"storage: {shown} cannot be opened: {' '.join(str(failure).split())}")


def _fit(arguments: list[str], watch: Watch) -> CLI:
    """`fit` as if in a process of its own; what it prints goes to stderr."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with redirect_stdout(sys.stderr):
        return execute(arguments, [watch], command=["python", "main.py", *arguments])


def _current(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Without failures that never began, or whose point is held by another trial, or failed once more."""
    held = {_key(trial) for trial in trials if trial.state != TrialState.FAIL}
    failed = {_key(trial): trial.number for trial in trials if trial.state == TrialState.FAIL and trial.params}
    failed = {key: number for key, number in failed.items() if key not in held}
    return [t for t in trials if t.state != TrialState.FAIL or failed.get(_key(t)) == t.number]


def _key(trial: FrozenTrial) -> str:
    return json.dumps(_point(trial), sort_keys=True)


def _point(trial: FrozenTrial) -> Point:
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}
