"""Config files that build on another: `base: base.yaml` at the top level, relative to the file that says it.

The two are merged key by key, before the parser sees them: what the file says wins, lists are replaced whole, and
another `class_path` replaces the component with all its arguments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from llmx.errors import UserError


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file with what it builds on.

    Raises:
        UserError: for a base that is missing, is no mapping, or has a base of its own.
        OSError, yaml.YAMLError: for a file that cannot be read.
    """
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "base" not in config:
        return config
    base_path = Path(path).parent / str(config.pop("base"))
    if not base_path.is_file():
        raise UserError(f"base: {path} builds on {base_path}, which does not exist")
    base = yaml.safe_load(base_path.read_text(encoding="utf-8"))
    if not isinstance(base, dict) or "base" in base:
        raise UserError(f"base: {base_path} must be a mapping of keys, and without a base of its own")
    return merged(base, config)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, and where they differ `over`."""
    result = dict(base)
    for key, value in over.items():
        held = base.get(key)
        result[key] = value
        if isinstance(held, dict) and isinstance(value, dict):
            same = value.get("class_path", held.get("class_path")) == held.get("class_path")
            result[key] = merged(held, value) if same else value
    return result


def with_bases(arguments: list[str]) -> list[str]:
    """The arguments, with every config file that builds on another replaced by the content of both."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            continue
        place = i if equals else i + 1
        value = value if equals else arguments[place] if place < len(arguments) else ""
        try:
            built = read_config(value)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        if isinstance(built, dict):
            result[place] = f"{name}={json.dumps(built)}" if equals else json.dumps(built)
    return result
