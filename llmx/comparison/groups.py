"""Finds finished runs and groups those that differ only in their seed."""

import glob
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llmx.comparison.settings import comparable, flat, protocol, short_key, short_value
from llmx.errors import UserError
from llmx.runs.folder import RECORD, RUNS, VERSION
from llmx.runs.record import Run, read_finished_run


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, by seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def values(self) -> np.ndarray:
        """(K,) validation losses."""
        return np.array([run.loss for run in self.runs])

    @cached_property
    def losses(self) -> np.ndarray:
        """(N,) losses of each character, averaged over the runs."""
        return np.mean([run.losses for run in self.runs], axis=0)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        return protocol(self.runs[0])

    @cached_property
    def settings(self) -> dict[str, Any]:
        return comparable(self.runs[0])

    @property
    def leaking(self) -> bool:
        return any(run.leaking for run in self.runs)

    @property
    def blind(self) -> str:
        """What the blind passes of the runs found, each finding once."""
        return "; ".join(dict.fromkeys(run.blind for run in self.runs if run.blind))

    @property
    def unaudited(self) -> bool:
        return any(run.unaudited for run in self.runs)


def mark(of: Any) -> str:
    """LEAKING, UNAUDITED or nothing, to print beside the name of a group or row."""
    return "LEAKING" if of.leaking else "UNAUDITED" if of.unaudited else ""


def find_runs(patterns: Iterable[str]) -> list[Run]:
    """The runs of folders and globs; a folder that is no run stands for the runs in it (`lightning_logs`).

    Raises UserError if a pattern finds nothing, or a named folder is no finished run.
    """
    folders: dict[Path, None] = {}  # each once, in order
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True), key=_by_number)
        found = [Path(match) for match in matches if (Path(match) / RECORD).is_file()]
        for match in matches if not found else []:
            found += [path.parent for path in sorted(Path(match).glob(f"**/{RECORD}"), key=_by_number)]
        if not found and len(matches) == 1 and Path(matches[0]).is_dir():
            read_finished_run(matches[0])  # says which file is missing
        if not found:
            raise UserError(f"{pattern}: no run is there; a run is a folder with a {RECORD}, {RUNS}/{VERSION}N")
        folders |= dict.fromkeys(path.resolve() for path in found)
    here = Path.cwd()
    return [read_finished_run(path.relative_to(here) if path.is_relative_to(here) else path) for path in folders]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Groups runs that differ only in their seed. Each group gets a name of its own: equal names are told apart by the
    settings that differ, else by the protocol, else by the folder. Raises UserError for two runs of one configuration
    with one seed."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.name, _settings(run), protocol(run)], sort_keys=True)
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    for members in groups:
        _check_seeds(members)
    names = [members[0].name for members in groups]
    descriptions: list[Callable[[Run], dict[str, Any]]] = [
        _settings,
        lambda run: protocol(run) | {"sha256": str(run.record["data"]["sha256"])[:12]},
        lambda run: {"run": str(run.folder)},
    ]
    for describe in descriptions:
        described = [describe(members[0]) for members in groups]
        names = [
            _with_differences(name, own, [x for rival, x in zip(names, described, strict=True) if rival == name])
            for name, own in zip(names, described, strict=True)
        ]
    return [
        Group(name, tuple(sorted(members, key=lambda run: str(run.seed))))
        for name, members in zip(names, groups, strict=True)
    ]


def _settings(run: Run) -> dict[str, Any]:
    return flat(comparable(run))


def _check_seeds(members: Sequence[Run]) -> None:
    for one, other in combinations(members, 2):
        # without a seed two runs are two draws, unless they are copies
        seeded = one.seed is not None and one.seed is not False
        if one.seed == other.seed and (seeded or np.array_equal(one.losses, other.losses)):
            said = f"{one.folder} and {other.folder} are one configuration with one seed ({one.seed})"
            raise UserError(f"{said}, which counts once: leave one of them out")


def _with_differences(name: str, own: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> str:
    """The name, with the settings in brackets that differ from those of a rival of the same name."""
    keys = {key for rival in rivals for key in own.keys() | rival.keys() if own.get(key) != rival.get(key)}
    said = ", ".join(f"{short_key(key)}={short_value(own[key])}" for key in sorted(keys) if key in own)
    if not said:
        return name
    return f"{name[:-1]}, {said})" if name.endswith(")") else f"{name} ({said})"


def _by_number(path: str | Path) -> list[Any]:
    """Sorts version_10 after version_9."""
    return [(part.rstrip("0123456789"), int(part[len(part.rstrip("0123456789")) :] or 0)) for part in Path(path).parts]
