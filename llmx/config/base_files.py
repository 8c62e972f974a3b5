"""Config files that build on another file: `base: base.yaml` at the top level, relative to the file that says it.

The two are merged key by key before the parser sees them. The file wins over its base. Lists are replaced whole.
Another `class_path` replaces the component with all its arguments.
"""

from pathlib import Path
from typing import Any

from llmx.config.yaml import read_yaml
from llmx.errors import UserError


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file merged with its base. Raises UserError for a file that cannot be read or is no mapping, and for a
    base that is missing or has a base of its own."""
    config = mapping(read_yaml(path, "config: "), f"config: {path}")
    if "base" not in config:
        return config
    base_path = Path(path).parent / str(config.pop("base"))
    if not base_path.is_file():
        raise UserError(f"base: {path} builds on {base_path}, which does not exist")
    base = read_yaml(base_path, "base: ")
    if not isinstance(base, dict) or "base" in base:
        raise UserError(f"base: {base_path} must be a mapping of keys, and without a base of its own")
    return merged(base, config)


def mapping(content: Any, where: str) -> dict[str, Any]:
    """The content of a config, which may be empty. Raises UserError for anything but a mapping; the message begins with
    `where`."""
    if not isinstance(content, dict | None):
        raise UserError(f"{where}: is no config: give keys and values, such as those of configs/transformer.yaml")
    return content or {}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both configs in one; where they differ, `over` wins."""
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
