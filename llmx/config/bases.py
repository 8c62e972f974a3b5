"""Config files that build on another: `base: base.yaml` at the top level, relative to the file that says it.

The two are merged key by key, before the parser sees them: what the file says wins, lists are replaced whole, and
another `class_path` replaces the component with all its arguments.

The parser cannot reach an entry of a list from the command line, so that is done here too:
`--model.network.block.blocks.1.mixer.heads 4` changes the second block of a cycle.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmx.config.paths import set_at
from llmx.config.yaml import parse_yaml, read_yaml
from llmx.errors import UserError


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file with what it builds on.

    Raises:
        UserError: for a file that cannot be read or is no mapping, and for a base that is missing, or has a base of
            its own.
    """
    config = _mapping(read_yaml(path, "config: "), f"config: {path}")
    if "base" not in config:
        return config
    base_path = Path(path).parent / str(config.pop("base"))
    if not base_path.is_file():
        raise UserError(f"base: {path} builds on {base_path}, which does not exist")
    base = read_yaml(base_path, "base: ")
    if not isinstance(base, dict) or "base" in base:
        raise UserError(f"base: {base_path} must be a mapping of keys, and without a base of its own")
    return merged(base, config)


def _mapping(content: Any, where: str) -> dict[str, Any]:
    """The content of a config, which may be empty."""
    if not isinstance(content, dict | None):
        raise UserError(f"{where}: is no config: give keys and values, such as those of configs/transformer.yaml")
    return content or {}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, and where they differ `over`."""
    result = dict(base)
    for key, value in over.items():
        held = base.get(key)
        result[key] = value
        if isinstance(held, str) and isinstance(value, dict) and "init_args" in value:  # a component by its name alone
            held = {"class_path": held}
        if isinstance(held, dict) and isinstance(value, dict):
            same = value.get("class_path", held.get("class_path")) == held.get("class_path")
            result[key] = merged(held, value) if same else value
    return result


def with_bases(arguments: list[str]) -> list[str]:
    """The arguments, with every config replaced by its content and that of what it builds on.

    Raises:
        UserError: for a config, or a base, that cannot be used.
    """
    result = list(arguments)
    for place in _config_places(arguments):
        name, value = _option(arguments[place])
        result[place] = f"{name}{config_text(_content(value))}"
    return result


def with_list_entries(arguments: list[str]) -> list[str]:
    """The arguments, with every option that goes through a list by index carried out in the last config given.

    Without a config they stay as they are.

    Raises:
        UserError: for an index, or a list, that the config does not have, and for a config that cannot be used.
    """
    kept: list[str] = []
    changes: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and any(part.isdecimal() for part in name.split(".")):
            changes.append((name.removeprefix("--"), value if equals else next(rest, "")))
        else:
            kept.append(argument)
    places = _config_places(kept)
    if not changes or not places:
        return arguments
    name, value = _option(kept[places[-1]])
    config = _content(value)
    for path, text in changes:
        set_at(config, path, text)
    kept[places[-1]] = f"{name}{config_text(config)}"
    return kept


def _content(value: str) -> dict[str, Any]:
    """What the argument of --config holds: a config itself, or the path of one."""
    if value.lstrip().startswith("{"):
        return _mapping(parse_yaml(value, "config"), "config")
    return read_config(value)


def config_text(config: dict[str, Any]) -> str:
    """A config as an argument: JSON, with the characters that it would escape in pairs, which YAML does not know."""
    return re.sub(r"\\ud[89ab]..\\ud[c-f]..", lambda pair: json.loads(f'"{pair[0]}"'), json.dumps(config))


def configs_of(arguments: list[str]) -> list[str]:
    """What a command line gives as configs: paths, and configs themselves."""
    return [_option(arguments[place])[1] for place in _config_places(arguments)]


def _config_places(arguments: list[str]) -> list[int]:
    """The indices of the arguments that hold a config, as `--config=VALUE` or as a VALUE of its own."""
    return [
        i
        for i, argument in enumerate(arguments)
        if argument.startswith(("--config=", "-c=")) or (i > 0 and arguments[i - 1] in ("--config", "-c"))
    ]


def _option(argument: str) -> tuple[str, str]:
    """`--config=VALUE` as ("--config=", VALUE), and a bare VALUE as ("", VALUE)."""
    name, equals, value = argument.partition("=")
    return (f"{name}=", value) if equals and name in ("--config", "-c") else ("", argument)
