"""Reads YAML from any source as plain data, or refuses it with one readable message."""

from pathlib import Path
from typing import Any

import yaml

from llmx.errors import UserError, one_line

MAX_DEPTH = 100  # of nested values
MAX_VALUES = 100_000  # counted with those that an alias repeats


def read_yaml(path: str | Path, where: str = "", loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The content of a file. Raises UserError for a file that cannot be read, and for content that `parse_yaml`
    refuses.

    Args:
        path: the file.
        where: the beginning of messages, before the path.
        loader: the YAML loader, which decides how scalars are read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where}{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or a path that cannot be one
        raise UserError(f"{where}{path}: cannot be read: {error}") from None
    return parse_yaml(text, f"{where}{path}", loader)


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Mappings, lists, text, numbers, true, false and null. Raises UserError for text that is no YAML, holds another
    kind of value (a date, a set), or unfolds without an end."""
    try:
        content = yaml.load(text, loader)
        _check_plain(content, where)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that Python does not have
        raise UserError(f"{where}: not valid YAML: {one_line(error, 300)}") from None
    return content


def _check_plain(content: Any, where: str) -> None:
    seen = 0
    rest: list[tuple[Any, str, int]] = [(content, "", 0)]
    while rest:
        value, path, depth = rest.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise UserError(f"{where}: {path[:100]}: is nested too deeply, or repeats itself by its aliases too often")
        if isinstance(value, dict):
            inner = [(k, f"{path}.{k}".lstrip("."), depth + 1) for k in value]  # a key is a value without a path
            rest += inner + [(value[k], p, d) for k, p, d in inner]
        elif isinstance(value, list):
            rest += [(item, f"{path}.{i}", depth + 1) for i, item in enumerate(value)]
        elif isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise UserError(f"{where}: {path}: half of a surrogate pair is no character")
        elif not isinstance(value, int | float | None):
            kind = type(value).__name__
            raise UserError(f"{where}: {path}: a {kind} is not plain data; put it in quotes, or leave out its tag")
