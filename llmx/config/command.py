"""What a user typed, read once at the door: `Command` is handed on, and nobody parses its text again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from llmx.config.base_files import mapping, merged, read_config
from llmx.config.factories import to_config
from llmx.config.paths import set_at
from llmx.config.yaml import parse_yaml

CONFIG = ("--config", "-c")


@dataclass(frozen=True)
class Command:
    """A verb with its configs and flags. Flags win over configs, and later configs over earlier ones.

    verb:    the first word; empty if there is none
    configs: the contents of --config, with their bases merged in
    flags:   all other words, as typed
    entries: flags that lead through a list by its index, which the parser cannot follow: (dotted path, value)
    """

    verb: str
    configs: tuple[dict[str, Any], ...] = ()
    flags: tuple[str, ...] = ()
    entries: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, words: Sequence[str]) -> Command:
        """Reads a command line, verb first. Raises UserError for a config, or its base, that cannot be used."""
        verb, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
        configs, entries, flags = [], [], list[str]()
        for name, value, typed in _options(rest):
            if name in CONFIG and value is not None:
                configs.append(to_config(_content(value)))  # a copy, in which YAML's aliases share nothing
            elif name.startswith("--") and any(part.isdecimal() for part in name.split(".")):
                entries.append((name.removeprefix("--"), value or ""))
            else:
                flags += typed
        return cls(verb, tuple(configs), tuple(flags), tuple(entries))

    def flag(self, name: str) -> str | None:
        """The last value of a flag, such as `--ckpt_path`; None where it is not given."""
        return next((value for given, value, _ in reversed([*_options(self.flags)]) if given == name), None)

    def without(self, name: str) -> Command:
        """The command without a flag."""
        kept = [word for given, _, typed in _options(self.flags) if given != name for word in typed]
        return replace(self, flags=tuple(kept))

    def having(self, name: str, value: str) -> Command:
        """The command with this value for a flag, in place of any that it has."""
        return replace(self, flags=(*self.without(name).flags, f"{name}={value}"))

    @property
    def config(self) -> dict[str, Any]:
        """All configs in one, without the flags."""
        return reduce(merged, self.configs, {})

    def given(self) -> dict[str, Any]:
        """Configs and flags as nested keys and values. Raises UserError for a flag that leads through a value that
        holds nothing."""
        result = copy.deepcopy(self.config)
        for name, value, _ in _options(self.flags):
            if name.startswith("-"):
                set_at(result, name.lstrip("-").removesuffix("+"), value or "")
        return result

    def with_entries(self) -> Command:
        """The command with its list entries set in the last config; without a config it stays as it is. Raises
        UserError for an index, or a list, that the config does not have."""
        if not self.entries or not self.configs:
            return self
        last = copy.deepcopy(self.configs[-1])
        for path, text in self.entries:
            set_at(last, path, text)
        return replace(self, configs=(*self.configs[:-1], last), entries=())

    def words(self) -> list[str]:
        """The command line that the parser takes, with configs as JSON."""
        verb = [self.verb] if self.verb else []
        configs = [word for config in self.configs for word in (CONFIG[0], _text(config))]
        return [*verb, *configs, *self.flags, *(f"--{path}={text}" for path, text in self.entries)]


def config_arguments(words: Sequence[str]) -> list[str]:
    """The values of --config on a command line: paths, and configs written in place."""
    return [value for name, value, _ in _options(words) if name in CONFIG and value is not None]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """(name, value, words as typed) for each of `--name value`, `--name=value` and a bare word."""
    place = 0
    while place < len(words):
        name, equals, value = words[place].partition("=")
        if not name.startswith("-") or equals:
            length, given = 1, value if equals and name.startswith("-") else None
        else:
            following = words[place + 1 : place + 2]
            length = 2 if following and not following[0].startswith("--") else 1
            given = following[0] if length == 2 else None
        yield (name if given is not None or not equals else words[place]), given, list(words[place : place + length])
        place += length


def _content(value: str) -> dict[str, Any]:
    """The argument of --config: a config written in place, or the path of a file."""
    in_place = value.lstrip().startswith("{")
    return mapping(parse_yaml(value, "config"), "config") if in_place else read_config(value)


def _text(config: dict[str, Any]) -> str:
    """A config as JSON. Characters that JSON escapes in pairs stay as they are, for YAML does not know the pairs."""
    return re.sub(r"\\ud[89ab]..\\ud[c-f]..", lambda pair: json.loads(f'"{pair[0]}"'), json.dumps(config))
