"""Finished runs as their folders tell of them, and the groups of those that differ in their seed alone."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llmx.comparison.settings import flat, short_key, shown
from llmx.config.yaml import read_yaml
from llmx.errors import UserError
from llmx.runs.curves import Curve, name_of, read_curves

# what a run was measured on, and how much it has seen
PROTOCOL = ("corpus", "sha256", "split", "vocab_size", "window", "val_stride", "val_count")
SEEN = "tokens seen"
# settings that change where and how fast a run goes, and not what it computes
ASIDE = {"seed_everything", "ckpt_path", "weights_only", "trust"}
ASIDE_OF_TRAINER = {"default_root_dir", "enable_progress_bar", "logger", "log_every_n_steps", "profiler"}
OBSERVERS = {  # callbacks that look on
    "llmx.training.maps.MixerMaps",
    "llmx.training.norms.NormsByLayer",
    *(
        f"lightning.pytorch.callbacks.{name}"
        for name in (
            "DeviceStatsMonitor",
            "LearningRateMonitor",
            "ModelCheckpoint",
            "ModelSummary",
            "RichModelSummary",
            "RichProgressBar",
            "ThroughputMonitor",
            "TQDMProgressBar",
        )
    ),
}
# what is read of each file, by key
READ: dict[str, dict[str, Any]] = {
    "run.json": {
        "command": list,
        "parameters": int,
        "network.groups.*.parameters": int,
        "network.training_flops_per_token": int | float | None,
        "network.state_bytes": int | None,
        **{f"data.{key}": object for key in PROTOCOL},
    },
    "metrics.json": {
        "val/loss": int | float,
        "tokens": int | None,
        "step": int,
        "seconds": int | float,
        "peak_bytes": int | None,
        "generated_tokens_per_second": int | float | None,
        "leaking": bool,
    },
    "config.yaml": {"model.network": str | dict, "trainer": dict | None},
}
# what later versions keep besides: runs without it are read, and count as what nobody knows
READ_IF_THERE: dict[str, dict[str, Any]] = {
    "run.json": {
        "audit": dict | None,
        "leaking": bool,
        "precision": str,
        "code": str,
        "sources": dict,
        "warm_start": dict | None,
        "continued": dict,
        "continued.*.config": dict,
        "continued.*.config.trainer": dict | None,
        "continued.*.code": str,
        "continued.*.sources": dict,
    },
    "metrics.json": {"steps_in_these_seconds": int},
    "config.yaml": {},
}
AGREE = 1e-4  # nats; the mean of val_losses.npy (float32) and val/loss are of one validation


@dataclass(frozen=True)
class Run:
    """One finished fit."""

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]  # run.json
    metrics: dict[str, Any]  # metrics.json

    @property
    def name(self) -> str:
        """The names of the configurations that the command line gives, else that of the network's class."""
        name = name_of([str(word) for word in self.record["command"]])
        if name is not None:
            return name
        network = self.config["model"]["network"]
        return (network["class_path"] if isinstance(network, dict) else network).rsplit(".", 1)[-1]

    @property
    def seed(self) -> Any:
        return self.config.get("seed_everything")

    @property
    def loss(self) -> float:
        return self.metrics["val/loss"]

    @property
    def leaking(self) -> bool:
        return bool(self.metrics["leaking"] or self.record.get("leaking"))

    @property
    def unaudited(self) -> bool:
        return self.record.get("audit") is None

    @property
    def code(self) -> set[str]:
        """Hashes of llmx's sources, of all parts of the run, shortened."""
        return {leg.get("code", "unknown")[:8] for leg in (self.record, *self.record.get("continued", {}).values())}

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the fit; None for a run that was stopped and went on, which knows only those of its last
        part."""
        return self.metrics["seconds"] if self.metrics.get("steps_in_these_seconds") == self.metrics["step"] else None

    @property
    def seconds_per_step(self) -> float | None:
        steps = self.metrics.get("steps_in_these_seconds")
        return self.metrics["seconds"] / steps if steps else None

    @property
    def protocol(self) -> dict[str, Any]:
        """What two runs must share for their losses to be ranked. A network that counts has no number of tokens."""
        start = self.config["model"].get("warm_start") or "none"
        if self.record.get("warm_start"):
            start = f"{start} (sha256 {str(self.record['warm_start'].get('sha256'))[:12]})"
        seen = {"warm start": start, SEEN: self.metrics["tokens"], "characters validated": len(self.losses)}
        return {key: self.record["data"][key] for key in PROTOCOL} | seen

    @cached_property
    def nested_settings(self) -> dict[str, Any]:
        """The configuration without the seed and what has no say in the result; with the precision really used, the
        hash of the sources of classes outside llmx, and what was changed where the run was continued."""
        settings = _settings(self.config, self.record)
        before = dict(flat(settings)) | {"seed_everything": self.seed}
        continued: dict[str, Any] = {}
        for step, leg in self.record.get("continued", {}).items():
            now = dict(flat(_settings(leg["config"], leg))) | {"seed_everything": leg["config"].get("seed_everything")}
            changed = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
            continued |= {f"from step {step} {short_key(key)}": now.get(key) for key in changed}
            before = now
        return settings | {"continued": continued}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The same, flat."""
        return dict(flat(self.nested_settings))

    @cached_property
    def losses(self) -> np.ndarray:
        """(N,) nats of each predicted character of the validation split, float64."""
        path = self.folder / "val_losses.npy"
        try:
            return np.load(path, allow_pickle=False).astype(np.float64)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error

    @cached_property
    def curves(self) -> dict[str, Curve]:
        return read_curves(self.folder)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the run, validation left out."""
        curve = self.curves.get("train/tokens_per_second")
        return float(np.median([value for _, value in curve])) if curve else None

    @property
    def training_flops(self) -> float | None:
        per_token, tokens = self.record["network"]["training_flops_per_token"], self.metrics["tokens"]
        return None if per_token is None or tokens is None else per_token * tokens


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, by seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def values(self) -> np.ndarray:
        """(K,) the validation losses."""
        return np.array([run.loss for run in self.runs])

    @cached_property
    def losses(self) -> np.ndarray:
        """(N,) the losses of each character, averaged over the runs."""
        return np.mean([run.losses for run in self.runs], axis=0)

    @property
    def leaking(self) -> bool:
        return any(run.leaking for run in self.runs)

    @property
    def unaudited(self) -> bool:
        return any(run.unaudited for run in self.runs)


def mark(of: Any) -> str:
    """What is written beside the name of a group or row: LEAKING, UNAUDITED, or nothing."""
    return "LEAKING" if of.leaking else "UNAUDITED" if of.unaudited else ""


def read_run(folder: str | Path) -> Run:
    """A run that has ended.

    Raises:
        UserError: where the folder is no run, has not ended, or is of a version that kept less.
    """
    folder = Path(folder)
    contents: dict[str, Any] = {}
    for name in ("run.json", "metrics.json", "config.yaml"):
        if not (folder / name).is_file():
            unfinished = " (it has not ended)" if name == "metrics.json" else ""
            raise UserError(f"{folder}: is no finished run: it has no {name}{unfinished}")
        contents[name] = read_yaml(folder / name) if name == "config.yaml" else _read_json(folder / name)
        for key, kind in (READ[name] | READ_IF_THERE[name]).items():
            try:
                fits = all(isinstance(value, kind) for value in _at(contents[name], key.split(".")))
            except LookupError:
                fits = key not in READ[name]
            except (TypeError, AttributeError):
                fits = False
            if not fits:
                raise UserError(
                    f"{folder / name}: {key} is missing or damaged: the run was never validated, or is of an older "
                    "version: run its fit again"
                )
    run = Run(folder, contents["config.yaml"], contents["run.json"], contents["metrics.json"])
    if not (folder / "val_losses.npy").is_file():
        raise UserError(f"{folder}: has no val_losses.npy, the losses of its validation split: run its fit again")
    if not math.isfinite(run.loss):
        raise UserError(f"{folder / 'metrics.json'}: val/loss is {run.loss}: there is nothing to compare")
    if not abs(run.losses.mean() - run.loss) <= AGREE:  # NaN too
        raise UserError(
            f"{folder}: val/loss of metrics.json is {run.loss:.4f}, and val_losses.npy is of a validation with "
            f"{run.losses.mean():.4f}: the run went on and has not ended; fit --ckpt_path "
            f"{folder}/checkpoints/last.ckpt ends it"
        )
    return run


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _at(content: Any, keys: Sequence[str]) -> Iterator[Any]:
    """What stands at a path of keys, `*` for all there are. Raises LookupError or TypeError where there is none."""
    if not keys:
        yield content
    elif keys[0] == "*":
        for inner in content.values():
            yield from _at(inner, keys[1:])
    else:
        yield from _at(content[keys[0]], keys[1:])


def find_runs(patterns: Iterable[str]) -> list[Run]:
    """The runs of folders and globs; a folder that is no run stands for the runs in it (`lightning_logs`).

    Raises:
        UserError: for a pattern that finds nothing, and for a folder that is named and is no finished run.
    """
    folders: dict[Path, None] = {}  # each once, in order
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True), key=_by_number)
        found = [Path(match) for match in matches if (Path(match) / "run.json").is_file()]
        for match in matches if not found else []:
            found += [path.parent for path in sorted(Path(match).glob("**/run.json"), key=lambda p: _by_number(str(p)))]
        if not found and len(matches) == 1 and Path(matches[0]).is_dir():
            read_run(matches[0])  # says what it lacks
        if not found:
            raise UserError(f"{pattern}: no run is there; a run is a folder with a run.json, lightning_logs/version_N")
        folders |= dict.fromkeys(path.resolve() for path in found)
    here = Path.cwd()
    return [read_run(path.relative_to(here) if path.is_relative_to(here) else path) for path in folders]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs that differ in their seed alone, under one name. Groups of one name are told apart by the settings that
    differ, else by the protocol, else by where they are: no two have the same.

    Raises:
        UserError: for two runs of one configuration with one seed.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps([run.name, run.settings, run.protocol], sort_keys=True), []).append(run)
    groups = list(by_settings.values())
    for members in groups:
        for one, other in combinations(members, 2):
            # without a seed two runs are two draws, unless they are copies
            seeded = one.seed is not None and one.seed is not False
            if one.seed == other.seed and (seeded or np.array_equal(one.losses, other.losses)):
                raise UserError(
                    f"{one.folder} and {other.folder} are one configuration with one seed ({one.seed}), which counts "
                    "once: leave one of them out"
                )
    names = [members[0].name for members in groups]
    tell_apart: list[Callable[[Run], dict[str, Any]]] = [
        lambda run: run.settings,
        lambda run: run.protocol | {"sha256": str(run.protocol["sha256"])[:12]},
        lambda run: {"run": str(run.folder)},
    ]
    for what in tell_apart:
        kept = [what(members[0]) for members in groups]
        names = [
            _told_apart(name, mine, [other for rival, other in zip(names, kept, strict=True) if rival == name])
            for name, mine in zip(names, kept, strict=True)
        ]
    return [
        Group(name, tuple(sorted(members, key=lambda run: str(run.seed))))
        for name, members in zip(names, groups, strict=True)
    ]


def _told_apart(name: str, mine: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> str:
    keys = {key for rival in rivals for key in mine.keys() | rival.keys() if mine.get(key) != rival.get(key)}
    said = ", ".join(f"{short_key(key)}={shown(mine[key])}" for key in sorted(keys) if key in mine)
    if not said:
        return name
    return f"{name[:-1]}, {said})" if name.endswith(")") else f"{name} ({said})"


def _settings(config: dict[str, Any], used: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ASIDE}
    trainer = {key: value for key, value in (kept.get("trainer") or {}).items() if key not in ASIDE_OF_TRAINER}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [
        callback
        for callback in callbacks
        if str(callback.get("class_path") if isinstance(callback, dict) else callback) not in OBSERVERS
    ]
    if "precision" in used:
        trainer["precision"] = used["precision"]
    sources = {f"source of {module}": str(hashed)[:12] for module, hashed in used.get("sources", {}).items()}
    return kept | {"trainer": trainer, "sources": sources}


def _by_number(path: str) -> list[Any]:
    """version_10 after version_9"""
    return [(part.rstrip("0123456789"), int(part[len(part.rstrip("0123456789")) :] or 0)) for part in Path(path).parts]
