"""The command line as words, before it is parsed."""

from __future__ import annotations

import importlib
from pathlib import Path

from llmx.config.yaml import parse_yaml
from llmx.errors import UserError


def option(arguments: list[str], name: str) -> str | None:
    """The last value of an option, given as `--name value` or `--name=value`."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == name:
            value = following
        elif argument.startswith(f"{name}="):
            value = argument.split("=", 1)[1]
    return value


def replaced(arguments: list[str], name: str, value: str) -> list[str]:
    """The arguments with another value for an option that is given."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == name:
            result[i + 1] = value
        elif argument.startswith(f"{name}="):
            result[i] = f"{name}={value}"
    return result


def without_trust(arguments: list[str]) -> list[str]:
    """The arguments without --trust, once the modules that it names are imported.

    Raises:
        UserError: for a module that cannot be imported.
    """
    names = option(arguments, "--trust")
    if names is None:
        return arguments
    for name in names.split(","):
        try:
            importlib.import_module(name.strip())
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"trust: {name!r} cannot be imported: {error}") from error
    place = next(i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--trust")
    rest = place + (1 if "=" in arguments[place] else 2)
    return without_trust([*arguments[:place], *arguments[rest:]])


def root_of(arguments: list[str]) -> Path:
    """The folder that the runs are below: as the command line or its config says, or here."""
    root = option(arguments, "--trainer.default_root_dir")
    config = option(arguments, "--config") or option(arguments, "-c")
    if root is None and config is not None:
        trainer = parse_yaml(config, "config").get("trainer")  # `with_bases` has read it
        root = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
    return Path(root or ".")
