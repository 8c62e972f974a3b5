"""Configurations, flat, and in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

LENGTH = 100  # characters of a value that are shown
NOTHING: tuple[Any, ...] = (None, [], {})


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `model.optimizer.init_args.lr` and a value that has no parts."""
    for key, value in _parts(values):
        if isinstance(value, dict | list):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changes(baseline: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the baseline, value in the other) of what differs; None for what is not there. Where a class is
    another one, that is all: its arguments mean something else."""
    here, there = dict(_parts(baseline)), dict(_parts(other))
    for key in here | there:
        one, two = here.get(key), there.get(key)
        if one == two or (one in NOTHING and two in NOTHING):
            continue
        if _comparable(one, two):
            yield from changes(one, two, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", one, two


def short_key(key: str) -> str:
    """`model.network.init_args.dim` -> `network.dim`"""
    return key.replace(".init_args", "").split(".", 1)[-1]


def shown(value: Any) -> str:
    """A value in a few words; a class by its name and those of the classes in it."""
    if isinstance(value, dict | list):
        first, *inner = dict.fromkeys(_classes(value)) or [str(value)]
        value = f"{first}({', '.join(inner)})" if inner else first
    text = str(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def _parts(values: Any) -> Iterable[tuple[Any, Any]]:
    return values.items() if isinstance(values, dict) else enumerate(values)


def _comparable(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.get("class_path") == two.get("class_path")
    return isinstance(one, list) and isinstance(two, list) and len(one) == len(two)


def _classes(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"]).rsplit(".", 1)[-1]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _classes(inner)
