"""Turns the parser's complaint into one message that names the key's full path, the fault, and the nearest valid name.

The parser reports the innermost key alone, or a page of nested namespaces. So the settings that the user gave are
walked along the constructors' signatures until one does not fit.
"""

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmx.config.command import Command
from llmx.config.paths import entries
from llmx.errors import one_line

_STRUCTURE = ("class_path", "init_args", "dict_kwargs")


def diagnose(
    complaint: str, command: Command, verbs: Sequence[str], groups: dict[str, type], options: Sequence[str]
) -> str:
    """The message to show. Raises UserError for a flag that leads through a value that holds nothing.

    Args:
        complaint: what the parser said.
        command: the command, as the parser got it.
        verbs: all verbs.
        groups: the classes behind the top-level keys (`model`, `data`, `trainer`).
        options: the other top-level keys.
    """
    given = command.given()
    for key, value in given.items():
        if key in groups:
            problem = _misfit(value, groups[key], key)
        else:
            problem = None if key in options else f"{key}: no such key{_nearest(key, [*groups, *options])}"
        if problem:
            return problem
    if 'expected "subcommand"' in complaint:
        return f"give a command: {', '.join(verbs[:-1])} or {verbs[-1]} (--help tells more)"
    sources = command.configs or command.flag("--ckpt_path")
    if complaint.endswith(".model.network") and not sources:
        return "model.network: not given; name a configuration (--config configs/transformer.yaml) or a --ckpt_path"
    lacking = re.match(r"the following arguments are required: (\w+)$", complaint)
    if lacking:
        for key, value in given.items():
            problem = _misfit(value, groups[key], key, lacking.group(1)) if key in groups else None
            if problem:
                return problem
    return _with_full_key(complaint, given)


def _misfit(value: Any, cls: type, path: str, required: str | None = None) -> str | None:
    """What is wrong below `path`: the first key that the constructor of `cls` does not know, or class that does not
    exist. With `required`: the first component that lacks this argument."""
    if not isinstance(value, dict):
        return None
    hints = typing.get_type_hints(inspect.getattr_static(cls, "__init__"))
    parameters = list(inspect.signature(cls).parameters)
    for name, given in value.items():
        if name not in parameters:
            return f"{path}.{name}: not an argument of {cls.__name__}{_nearest(name, parameters)}"
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(given, dict) and "class_path" in given:
            return f"{path}.{name}.class_path: nothing else can stand here; give keys and values"
        given = _with_class(given, inspect.signature(cls).parameters[name].default)
        for where, item in _items(given, f"{path}.{name}"):
            problem = _component(item, _built_by(hints.get(name)), where, required)
            if problem:
                return problem
    return None


def _component(given: Any, base: type | None, path: str, required: str | None) -> str | None:
    """What is wrong with a component given as a class name or as class_path and init_args."""
    if base is None:
        return None
    name = given if isinstance(given, str) else given.get("class_path") if isinstance(given, dict) else None
    if not isinstance(name, str):
        return f"{path}: give a class name, or class_path and init_args"
    cls = _find(name, base)
    if cls is None:
        other = _find(name, nn.Module)
        kind = None if other is None else _kind(other)
        valid = [c.__name__ for c in _subclasses(base)]
        if kind is not None:
            return f"{path}: {name} is a {kind.__name__}, and this is the place of a {base.__name__}{_listed(valid)}"
        return f"{path}: no {base.__name__} is called {name!r}{_nearest(name, valid)}"
    inside = given.get("init_args", {}) if isinstance(given, dict) else {}
    if not isinstance(inside, dict):
        return f"{path}.init_args: give keys and values"
    extra = {k: v for k, v in given.items() if k not in _STRUCTURE} if isinstance(given, dict) else {}
    arguments = {**inside, **extra}
    lacking = inspect.signature(cls).parameters.get(required) if required and required not in arguments else None
    if lacking is not None and lacking.default is lacking.empty:
        return f"{path}.{required}: not given, and {cls.__name__} needs it"
    return _misfit(arguments, cls, path, required)


def _with_class(given: Any, default: Any) -> Any:
    """init_args without class_path belong to the default class."""
    built = getattr(default, "func", default)
    known = isinstance(built, type) and built is not inspect.Parameter.empty
    if known and isinstance(given, dict) and "class_path" not in given:
        return {"class_path": f"{built.__module__}.{built.__qualname__}", "init_args": given}
    return given


def _kind(cls: type) -> type | None:
    """The abstract class of the protocol that a component implements: Mixer, FeedForward, Block, ..."""
    return next((c for c in reversed(cls.__mro__) if inspect.isabstract(c) and issubclass(c, nn.Module)), None)


def _items(given: Any, path: str) -> list[tuple[str, Any]]:
    return [(f"{path}.{i}", item) for i, item in enumerate(given)] if isinstance(given, list) else [(path, given)]


def _built_by(hint: Any) -> type | None:
    """`Base` of a factory that is annotated as Callable[..., Base], also inside a list or a union."""
    if typing.get_origin(hint) is collections.abc.Callable:
        built = typing.get_args(hint)[-1]
        return built if isinstance(built, type) else None
    for inner in typing.get_args(hint):
        found = _built_by(inner)
        if found:
            return found
    return None


def _find(name: str, base: type) -> type | None:
    module, _, short = name.rpartition(".")
    if not module:
        return next((cls for cls in _subclasses(base) if cls.__name__ == name), None)
    try:
        found = getattr(importlib.import_module(module), short, None)
    except (ImportError, TypeError, ValueError):  # the latter two if the text cannot be a name
        return None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _subclasses(base: type) -> list[type]:
    found = [] if inspect.isabstract(base) else [base]
    child: type
    for child in base.__subclasses__():
        found += _subclasses(child)
    return found


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], valid, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else _listed(valid)


def _listed(valid: list[str]) -> str:
    return f"; there are {', '.join(sorted(set(valid)))}"


def _with_full_key(complaint: str, given: dict[str, Any]) -> str:
    """`Parser key "heads": Expected ...` with the whole path of the key, if only one key fits."""
    text = one_line(complaint)
    match = re.match(r'(?:Parser|Configuration) key "([^"]+)":? ?(.*)', text)
    if not match:
        return text
    key, fault = match.groups()
    wanted = re.search(r"(?:Got value|Given value): (.*)$", text)
    named = [(path, value) for path, value in entries(given, "") if path == key or path.endswith(f".{key}")]
    exact = [path for path, value in named if wanted and str(value) == wanted.group(1)]
    path = exact[0] if exact else named[0][0] if len(named) == 1 else key
    if "Errors:" in fault:
        value = wanted.group(1) if wanted else ""
        subtypes = re.search(r"Subtypes: (.*?) Errors:", fault)
        fault = f"{value!r} is none of {subtypes.group(1) if subtypes else 'what is accepted'}"
    fault = re.sub(r"<class '([^']+)'>", r"\1", fault).replace("typing.", "")
    fault = fault.replace("Expected a ", "expected ")
    return f"{path}: {fault}"
