"""Dotted paths into nested config data: `model.network.block.blocks.1.mixer.heads`.

A path leads through mappings, through lists by index, and through components; it may leave out their `init_args`.
"""

from typing import Any

from llmx.config.yaml import parse_yaml
from llmx.errors import UserError


def entries(value: Any, path: str) -> list[tuple[str, Any]]:
    """(path, value) of everything that a value holds, itself first; paths leave out `init_args`."""
    found = [(path, value)]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        found += entries(inner, path if key == "init_args" else f"{path}.{key}" if path else str(key))
    return found


def set_at(config: Any, path: str, text: str) -> None:
    """Sets the value that `text` holds in YAML at a path, in place. Raises UserError for a path that leads through a
    key or past an end that the config does not have."""
    value = parse_yaml(text, path)
    parts = path.split(".")
    node = config
    for i, part in enumerate(parts):
        if isinstance(node, dict) and "class_path" in node and part not in ("class_path", "init_args"):
            node = node.setdefault("init_args", {})
        here = ".".join(parts[: i + 1])
        if not isinstance(node, list if part.isdecimal() else dict):
            raise UserError(f"{here}: the config has no such {'list' if part.isdecimal() else 'key'}")
        if isinstance(node, list) and int(part) >= len(node):
            raise UserError(f"{here}: the last index of the list is {len(node) - 1}")
        key: Any = int(part) if isinstance(node, list) else part
        held = node[key] if isinstance(node, list) else node.get(key)
        if i < len(parts) - 1:  # a component given by its name alone may have arguments
            node[key] = {"class_path": held} if isinstance(held, str) else {} if held is None else held
        else:
            component = isinstance(value, str) and isinstance(held, dict) and "class_path" in held
            if key == "class_path" and value != held:
                node.clear()  # the arguments belong to the old class
            node[key] = {"class_path": value} if component else value
        node = node[key]
