"""An Optuna study whose trials are runs of `fit` in this process.

Any number of processes share one study. A process queues a point (a combination of values) when it is about to run one.
The process that takes it from the queue runs it, unless an earlier trial covers the same point. A process that dies
leaves its trial without a heartbeat; another process then fails the trial and queues its point again.
"""

import gc
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import optuna
import sqlalchemy
import torch
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from llmx import display
from llmx.config.command import Command
from llmx.errors import UserError, one_line
from llmx.runs.record import PROTOCOL
from llmx.sweep.callback import ReportToStudy
from llmx.sweep.report import DIED
from llmx.sweep.space import Point, Space, flags, with_point

HEARTBEAT = 15  # seconds
GRACE = 120  # seconds without a heartbeat, after which a trial's process counts as dead
RETRIES = 3  # of a trial whose process died: the trial itself may have killed it
CREATION = 5.0  # seconds within which the process that creates a study sets the study's identity
POLL = 1.0  # seconds between two looks at the trials of other processes


class Execute(Protocol):
    """Executes a command, recorded as `recorded`; returns an object with `trainer`, `datamodule` and `model`."""

    def __call__(
        self, command: Command, callbacks: Sequence[ReportToStudy] = (), recorded: list[str] | None = None
    ) -> Any: ...


Parse = Callable[[Command], Any]  # a command -> its settings


class Covered(Exception):
    """An earlier trial covers this point."""


@dataclass
class Sweep:
    """Runs the missing trials of a study. Raises UserError for a study that belongs to another sweep."""

    name: str
    storage: RDBStorage  # the database that holds the study
    space: Space
    points: list[Point] | None  # all points to run; None if a sampler chooses them
    wanted: int | None  # how many trials to run, if a sampler chooses
    prune: bool  # whether to stop a run early that is worse than the median of the others
    seeds: list[int] | None  # of the runs of each point; None for one run with the seed of the config
    fit: list[str]  # the arguments that all runs share
    identity: dict[str, Any]  # settings that all processes of the study have to share, today and later
    execute: Execute
    say: Callable[[str], None]  # prints a line

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        settings: dict[str, Any] = {
            "study_name": self.name,
            "storage": self.storage,
            "sampler": TPESampler() if self.points is None else RandomSampler(),  # the queue leaves it no choice
            "pruner": optuna.pruners.MedianPruner() if self.prune else optuna.pruners.NopPruner(),
        }
        try:
            self.study = optuna.create_study(**settings)
            self.study.set_user_attr("sweep", self.identity)
        except DuplicatedStudyError:
            self.study = optuna.load_study(**settings)
        deadline = time.monotonic() + CREATION
        while (held := self.study.user_attrs.get("sweep")) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        other = [key for key, value in self.identity.items() if held is None or held[key] != value]
        if other:
            what = "was not made by sweep" if held is None else f"has other {' and '.join(other)}"
            shown = f": {json.dumps(held[other[0]])}" if held is not None and other[0] != "settings" else ""
            raise UserError(f"study: {self.name} {what}{shown}; give a new one a name, --study NAME")
        self.first = len(self.study.get_trials(deepcopy=False))  # number of this session's first trial

    def trials(self) -> list[FrozenTrial]:
        """All trials except those that never began and failures that were tried again."""
        return _current(self.study.get_trials(deepcopy=False))

    def run(self) -> None:
        """Runs trials until none is missing. Raises UserError if every trial failed."""
        waited = False
        while True:
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            self._fail_never_started(trials)
            point, states = self._missing(trials), {trial.state for trial in trials}
            open_ = self.wanted is not None and len(_current(trials)) < self.wanted
            if point is not None:
                before = next((t for t in reversed(trials) if _point(t) == point), None)  # whose runs are kept
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
        """The next point to queue: never run, or failed before this session."""
        held = [_point(t) for t in trials if t.state != TrialState.FAIL or t.number >= self.first]
        failed = (_point(t) for t in _current(trials) if t.state == TrialState.FAIL)
        return next((point for point in self.points or failed if point not in held), None)

    def _fail_never_started(self, trials: list[FrozenTrial]) -> None:
        """Fails trials whose process died before the first heartbeat; Optuna would wait for them forever."""
        for trial in trials:
            started = trial.datetime_start or datetime.now()
            never_started = trial.state == TrialState.RUNNING and not trial.params
            if never_started and (datetime.now() - started).total_seconds() > GRACE:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _covered(self, trial: Trial) -> bool:
        """Whether an earlier trial covers this point, or enough trials stand before this one."""
        trials = self.study.get_trials(deepcopy=False)
        earlier = [t for t in trials if t.number < trial.number]
        point = next(_point(t) for t in trials if t.number == trial.number)
        if point.keys() == self.space.dimensions.keys():
            return any(t.state != TrialState.FAIL and _point(t) == point for t in earlier)
        return self.wanted is None or len(_current(earlier)) >= self.wanted

    def _objective(self, trial: Trial) -> float:
        if self._covered(trial):
            raise Covered
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
        self.say(f"{shown}: val loss {display.loss(loss)}")
        return loss

    def _loss(self, trial: Trial, arguments: list[str]) -> float:
        """The final validation loss, its mean over the seeds. The trial's user attributes keep every run."""
        runs = [run for run in trial.user_attrs.get("runs", []) if "val/loss" in run]  # of an earlier attempt
        torch.compiler.reset()  # graphs of earlier networks count towards a limit, beyond which nothing is compiled
        seeds: list[int] | list[None] = self.seeds or [None]
        for seed in seeds:
            if any(run["seed"] == seed for run in runs):
                continue
            run: dict[str, Any] = {"seed": seed, "folder": None}
            seeding = [] if seed is None else [f"--seed_everything={seed}"]
            callback = ReportToStudy(trial, runs, run, self.prune and not runs)  # only the first seed can be pruned
            executed = _fit(self.execute, [*arguments, *seeding], callback)
            loss = executed.trainer.callback_metrics.get("val/loss")
            if loss is None or not math.isfinite(loss):
                raise UserError(f"val/loss is {'not measured' if loss is None else loss.item()}: nothing to compare by")
            protocol = {key: executed.datamodule.protocol[key] for key in PROTOCOL}
            audit = {"leaking": executed.model.leaking, "audited": executed.model.causality is not None}
            runs.append({**run, "val/loss": loss.item(), **audit, "protocol": protocol})
            trial.set_user_attr("runs", runs)
        return statistics.fmean(run["val/loss"] for run in runs)


def open_storage(url: str) -> RDBStorage:
    """The database, created if it is new. Raises UserError if it cannot be opened."""
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of the heartbeat
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    failure: Exception | None = None
    for _ in range(4):  # two processes that create the tables at once disturb each other
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
        except Exception as error:  # an unknown dialect, a missing driver, a schema of another version
            failure = error
            break
    try:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        shown = url
    raise UserError(f"storage: {shown} cannot be opened: {one_line(failure)}")


def _fit(execute: Execute, arguments: list[str], callback: ReportToStudy) -> Any:
    """`fit` as if in a fresh process; prints to stderr."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with redirect_stdout(sys.stderr):
        return execute(Command.read(arguments), [callback], ["python", "main.py", *arguments])


def _current(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Leaves out failures that never began, whose point another trial covers, or whose point failed again later."""
    held = {_key(trial) for trial in trials if trial.state != TrialState.FAIL}
    failed = {_key(trial): trial.number for trial in trials if trial.state == TrialState.FAIL and trial.params}
    failed = {key: number for key, number in failed.items() if key not in held}
    return [t for t in trials if t.state != TrialState.FAIL or failed.get(_key(t)) == t.number]


def _key(trial: FrozenTrial) -> str:
    return json.dumps(_point(trial), sort_keys=True)


def _point(trial: FrozenTrial) -> Point:
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}
