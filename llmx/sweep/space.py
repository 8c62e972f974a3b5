"""The search space: a YAML file with one config key a line.

space:
  model.optimizer.init_args.lr: {low: 1e-4, high: 1e-2, log: true}    # a range; integers if both ends are
  model.network.block.mixer.heads: {values: [2, 4, 8]}                # values of any kind
  config: {values: [configs/llama.yaml, {data: {window: 64}}]}        # files, or changes to --config
trials: 20      # leave it out if every key has values: then all combinations run
prune: true     # stops a run that is worse than the median of the others so far; default: only with trials
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import yaml

from llmx.config.yaml import read_yaml
from llmx.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

Plain = str | int | float | bool | None
Point = dict[str, Plain]
NEAR = 0.05  # share of a range that counts as its edge


@dataclass(frozen=True)
class Values:
    """A few values; lists and mappings are kept as text for the command line."""

    values: tuple[Plain, ...]

    def suggest(self, trial: Trial, key: str) -> Plain:
        return trial.suggest_categorical(key, self.values)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The lowest and the highest value, if all are numbers and there are at least two."""
        numbers = [value for value in self.values if _is_number(value)]
        return (min(numbers), max(numbers)) if len(numbers) == len(self.values) > 1 else None

    def edge(self, value: Any) -> str | None:
        low, high = self.ends or (None, None)
        return "low" if value == low else "high" if value == high else None


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; integers if both are integers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Trial, key: str) -> Plain:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def edge(self, value: Any) -> str | None:
        """The end that a value is near: within NEAR of the range, in logarithms if the range is logarithmic."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        share = (at - low) / (high - low)
        return "low" if share <= NEAR else "high" if share >= 1 - NEAR else None


@dataclass(frozen=True)
class Space:
    """The dimensions to search, by config key."""

    dimensions: dict[str, Values | Range]
    trials: int | None = None
    prune: bool | None = None

    def points(self) -> list[Point] | None:
        """All combinations, the last key varying fastest; None if a range makes them endless."""
        columns = [d.values for d in self.dimensions.values() if isinstance(d, Values)]
        if len(columns) < len(self.dimensions):
            return None
        return [dict(zip(self.dimensions, row, strict=True)) for row in itertools.product(*columns)]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps({key: asdict(dimension) for key, dimension in self.dimensions.items()}))


def flags(point: Point) -> list[str]:
    return [f"--{key}={_text(value)}" for key, value in point.items()]


def with_point(command: list[str], point: Point) -> list[str]:
    """The command of `fit` for a point. A config of the point stands after those of the command, and before all other
    flags, which therefore win."""
    chosen = flags(point)
    place = max((i + 2 for i, word in enumerate(command) if word == "--config"), default=command.index("fit") + 1)
    configs = [word for flag in chosen if flag.startswith("--config=") for word in flag.split("=", 1)]
    return [*command[:place], *configs, *command[place:], *(x for x in chosen if not x.startswith("--config="))]


def _text(value: Plain) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, width=math.inf).removesuffix("...\n").strip()


def read_space(path: str) -> Space:
    """The space of a YAML file. Raises UserError, which names the key, for one that cannot be read or is no space."""
    content = read_yaml(path, "sweep: ", _Loader)
    if not isinstance(content, dict) or not content.keys() <= {"space", "trials", "prune"}:
        raise UserError(f"{path}: give a mapping of space, and optionally trials and prune")
    space = content.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(f"space: empty in {path}; give at least one config key with its values or range")
    trials, prune = content.get("trials"), content.get("prune")
    if trials is not None and (type(trials) is not int or trials < 1):
        raise UserError(f"trials: {trials} is no number of trials; give 1 or more")
    if not isinstance(prune, bool | None):
        raise UserError(f"prune: {prune} is neither true nor false")
    return Space({str(key): _dimension(f"space.{key}", given) for key, given in space.items()}, trials, prune)


def _dimension(key: str, given: Any) -> Values | Range:
    if isinstance(given, dict) and given.keys() == {"values"}:
        return _values(key, given["values"])
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {"low", "high", "log", "step"}:
        raise UserError(f"{key}: give either values, a list, or low and high, and optionally log or step")
    low, high = _number(f"{key}.low", given["low"]), _number(f"{key}.high", given["high"])
    step = None if given.get("step") is None else _number(f"{key}.step", given["step"])
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{key}.log: {log!r} is neither true nor false")
    if low >= high:
        raise UserError(f"{key}: low {low} must be below high {high}")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{key}: a logarithmic range begins above 0 and has no step")
    if step is not None and (step <= 0 or abs((high - low) / step - round((high - low) / step)) > 1e-6):
        raise UserError(f"{key}.step: {step} must lead from low {low} to high {high} in whole steps")
    return Range(low if isinstance(step, int | None) else float(low), high, log, step)


def _values(key: str, given: Any) -> Values:
    if not isinstance(given, list) or not given:
        raise UserError(f"{key}.values: give a list of at least one value")
    values = [json.dumps(value) if isinstance(value, dict | list) else value for value in given]
    odd = next((value for value in values if not isinstance(value, Plain)), None)
    if odd is not None:
        raise UserError(f"{key}.values: {odd} is neither text, number, true, false nor null")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise UserError(f"{key}.values: {twice[0]} is there twice")
    return Values(tuple(values))


def _number(key: str, given: Any) -> float:
    if _is_number(given):
        return given
    raise UserError(f"{key}: {given!r} is no number")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as the parser of `fit` does; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
