"""The result of a sweep: its trials by validation loss, the command of the best, and whether it lies inside its ranges.

Trials that leak or were not audited come last and are never the best. If the losses are not comparable, none is."""

from __future__ import annotations

import json
import shlex
import statistics
import textwrap
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from llmx import display
from llmx.sweep.space import Space, with_point

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

DIED = "interrupted, or its process died"
MEANING = {
    "LEAKING": "this network sees the future, its numbers mean nothing",
    "UNAUDITED": "whether this network sees the future nobody knows",
}
ORDER = ["COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL"]


class Report:
    """The present state of a study; `command` is that of one run, without the flags of its point.

    If the trials are the seeds of one config (`means`), their mean is the result, and none is the best.
    """

    def __init__(self, name: str, space: Space, trials: list[FrozenTrial], command: list[str], means: bool):
        self.name, self.space, self.command, self.means = name, space, command, means
        self.trials = sorted(
            trials, key=lambda t: (ORDER.index(t.state.name), _mark(t) != "", t.value or 0.0, t.number)
        )
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        honest = [trial for trial in done if not _mark(trial)]
        self.differing = _differing(honest)
        self.best = honest[0] if honest and not means and not self.differing else None
        self.marks = sorted({_mark(trial) for trial in done} - {""})
        self.losses = [trial.value for trial in done if trial.value is not None]

    def show(self, format: Literal["table", "json"] = "table") -> None:
        if format == "json":
            print(json.dumps(self.to_dict(), indent=2))
            return
        Console().print(self._table())
        if self.means:
            marks = "".join(f"{mark}: {MEANING[mark]}. " for mark in self.marks)
            print(f"{marks}val loss {display.with_deviation(self.losses)} over {len(self.losses)} seeds")
        if self.best is not None:
            print(f"best: {self._reproduction()}")
        elif self.differing:
            print(f"best: none, for these losses are not of one kind: not the same {', '.join(self.differing)}")
        elif self.marks and not self.means:
            print(f"best: none, for what was trained is {' or '.join(self.marks)}")
        for edge in self._edges():
            at, advice = "inside", ""
            if edge["edge"] is not None:
                at, advice = "AT THE EDGE of", f" ({edge['edge']}): widen it there"
            print(f"{edge['key']}: {edge['value']} is {at} {edge['low']} .. {edge['high']}{advice}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "study": self.name,
            "trials": [
                {
                    "number": trial.number,
                    "state": trial.state.name.lower(),
                    "val/loss": trial.value,
                    "parameters": trial.params,
                    "runs": _runs(trial),
                    "error": _error(trial),
                }
                for trial in self.trials
            ],
            "mean": statistics.fmean(self.losses) if self.means else None,
            "deviation": statistics.stdev(self.losses) if self.means and len(self.losses) > 1 else None,
            "best": None if self.best is None else {"number": self.best.number, "command": self._reproduction()},
            "edges": self._edges(),
        }

    def _table(self) -> Table:
        keys = _short(list(self.space.dimensions))
        columns = [display.number_column(heading, wrap=True) for heading in ("trial", *keys)]
        table = display.table(*columns, display.number_column("val loss"), "run", title=f"sweep {self.name}")
        for trial in self.trials:
            values = [str(trial.params.get(key, "")) for key in self.space.dimensions]
            table.add_row(str(trial.number), *values, _loss(trial), _places(trial))
        return table

    def _reproduction(self) -> str:
        """The command of the best trial, with its first seed if it has several."""
        assert self.best is not None
        seed = self.best.user_attrs["runs"][0]["seed"]
        seeding = [] if seed is None else [f"--seed_everything={seed}"]
        point = {key: self.best.params[key] for key in self.space.dimensions}
        return shlex.join([*with_point(self.command, point), *seeding])

    def _edges(self) -> list[dict[str, Any]]:
        """For each range of numbers, the end at which the best trial lies, if any."""
        best = {} if self.best is None else self.best.params
        return [
            {"key": key, "value": best[key], "low": d.ends[0], "high": d.ends[1], "edge": d.edge(best[key])}
            for key, d in self.space.dimensions.items()
            if key in best and d.ends is not None
        ]


def _runs(trial: FrozenTrial) -> list[dict[str, Any]]:
    return trial.user_attrs.get("runs", [])


def _loss(trial: FrozenTrial) -> str:
    if trial.state.name == "COMPLETE":
        return display.with_deviation([run["val/loss"] for run in _runs(trial)])
    if trial.state.name == "PRUNED" and trial.value is not None:
        return f"{display.loss(trial.value)} at step {_runs(trial)[0]['step']}, pruned"
    return "failed" if trial.state.name == "FAIL" else trial.state.name.lower()


def _places(trial: FrozenTrial) -> str:
    places = ", ".join(run["folder"] for run in _runs(trial) if run["folder"] is not None)
    return textwrap.shorten(_error(trial) or f"{_mark(trial)} {places}".strip(), 120, placeholder=" ...")


def _mark(trial: FrozenTrial) -> str:
    if any(run.get("leaking") for run in _runs(trial)):
        return "LEAKING"
    return "UNAUDITED" if any(run.get("audited") is False for run in _runs(trial)) else ""


def _differing(trials: list[FrozenTrial]) -> list[str]:
    """The keys of the data that differ, so that the losses of these trials cannot be compared."""
    protocols = [run["protocol"] for trial in trials for run in trial.user_attrs["runs"] if "protocol" in run]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    return [f"data.{key}" for key in keys if any(protocol[key] != protocols[0][key] for protocol in protocols)]


def _error(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("error", DIED) if trial.state.name == "FAIL" else None


def _short(keys: list[str]) -> list[str]:
    """The last parts of each key, as many as tell the keys apart, without `init_args`."""
    parts = [[part for part in key.split(".") if part != "init_args"] for key in keys]
    for length in range(1, max(map(len, parts))):
        names = [".".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return keys
