"""Components as plain data: `{"class_path": ..., "init_args": {...}}` and `functools.partial(Class, ...)` are equal.

`to_config` writes factories as data, so that checkpoints load without executing anything. `from_config` reads them.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import partial
from typing import Any

import yaml
from torch import nn
from torch.optim import Optimizer

from llmx.errors import UserError
from llmx.protocol import Schedule

_PLAIN = (str, int, float, bool, type(None))
# a constructor raises these for bad arguments; torch does for negative sizes and for lack of memory
_WRONG = (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError)
BUILDABLE = (nn.Module, Optimizer, Schedule)  # a config may build these, whatever else is imported


def to_config(value: Any) -> Any:
    """Writes classes and partials of classes (nested, in lists too) as plain data; plain data stays as it is. Raises
    UserError for a value without a name to find it by, such as a lambda or an object already built."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [to_config(item) for item in value]
    if isinstance(value, dict):
        return {key: to_config(item) for key, item in value.items()}
    cls, arguments = (value.func, value.keywords) if isinstance(value, partial) else (value, {})
    findable = isinstance(cls, type) and "." not in cls.__qualname__
    if not findable or (isinstance(value, partial) and value.args):
        raise UserError(
            f"cannot write {value!r} into a checkpoint: give a class of a module, "
            "functools.partial(Class, key=value, ...), or {'class_path': ..., 'init_args': {...}}"
        )
    config: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    if arguments:
        config["init_args"] = to_config(arguments)
    return config


def from_config(config: Any, key: str = "") -> Any:
    """Turns plain data into factories, the inverse of `to_config`.

    It looks only into llmx, torch.optim and modules that are imported already. So data from
    elsewhere cannot make Python import something new. Raises UserError where a class cannot be found, or its module may
    not be imported.

    Args:
        config: the data.
        key: the path of the data in the config; with it, the factories name a bad argument by its full path.
    """
    if isinstance(config, list | tuple):
        return [from_config(item, key and f"{key}.{i}") for i, item in enumerate(config)]
    if isinstance(config, dict) and "class_path" in config:
        cls = find_class(config["class_path"])
        given = config.get("init_args") or {}
        arguments = {name: from_config(item, key and f"{key}.{name}") for name, item in given.items()}
        if key and not issubclass(cls, BUILDABLE):
            raise UserError(f"class_path {config['class_path']!r}: is no component")
        factory = Placed(cls, **arguments) if key else partial(cls, **arguments)
        if isinstance(factory, Placed):
            factory.key = key
        return factory
    if isinstance(config, dict):
        return {name: from_config(item, key and f"{key}.{name}") for name, item in config.items()}
    return config


def build(config: Any, argument: Any, key: str) -> Any:
    """Builds the component at `key` of a config. A bad argument becomes one line with its full path. Raises UserError
    for a class that cannot be found, and for a component that cannot be built."""
    try:
        factory = from_config(config, key=key)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return factory(argument)


class Placed(partial):
    """A factory that knows its place in the config: an error of its constructor (`heads: 3 heads must divide ...`) is
    raised with the whole path of the key."""

    key = ""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in inspect.signature(self.func).parameters.items():
            optional = parameter.default is None or "None" in str(parameter.annotation)
            if self.keywords.get(name, ...) is None and not optional:
                raise UserError(f"{self.key}.{name}: null is not a value for it")
        try:
            return super().__call__(*args, **kwargs)
        except UserError:
            raise  # from an inner component, whose path is longer
        except _WRONG as error:
            name, colon, _ = str(error).partition(": ")
            names_argument = colon and name in inspect.signature(self.func).parameters
            where = f"{self.key}." if names_argument else f"{self.key}: {self.func.__name__}: "
            raise UserError(f"{where}{error}") from error


def check_imports(config: Any, where: str) -> None:
    """Refuses data from elsewhere that would make the parser import something new.

    Two things do: a `class_path` outside llmx, torch.optim and the imported modules; and text that the parser reads as
    more than text, which is a mapping, a list, or the dotted path of something in an installed module. Raises UserError
    for such data; the message begins with `where`, its source.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if key != "class_path" or not isinstance(value, str):
                check_imports(value, where)
            elif "." in value and not _is_ours(module := value.rpartition(".")[0]) and module not in sys.modules:
                raise UserError(
                    f"{where}: class_path {value!r} is outside llmx, and a checkpoint may not import modules by "
                    f"itself: --trust {module} if you trust it"
                )
    elif isinstance(config, list | tuple):
        for item in config:
            check_imports(item, where)
    elif isinstance(config, str) and _names_code(config):
        raise UserError(
            f"{where}: {config!r:.100} is more than plain text: give these settings by --config if you trust them"
        )


def _names_code(text: str) -> bool:
    """Whether the parser, which reads text as YAML, would find a component in it or import what it names."""
    try:
        text = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    if not isinstance(text, str):
        return isinstance(text, dict | list)
    module, _, name = text.rpartition(".")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")) or _is_ours(module):
        return False
    top = module.split(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "llmx" or module == "torch.optim" or module.startswith("torch.optim.")


def find_class(path: str) -> type:
    """The class at a dotted path, under the import rule of `from_config`."""
    module, _, name = path.rpartition(".")
    if _is_ours(module):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"class_path {path!r}: {error}") from error
    if module not in sys.modules:
        raise UserError(
            f"class_path {path!r} is outside llmx, and a checkpoint may not import modules by itself: "
            f"import {module or path!r} first if you trust it"
        )
    found = getattr(sys.modules[module], name, None)
    if not isinstance(found, type):
        raise UserError(f"class_path {path!r}: module {module!r} has no class {name!r}")
    return found


def import_collection() -> None:
    """Imports every component of the collection: short class names are found among the imported classes."""
    for name in ("parts", "mixers", "feedforward", "blocks", "networks"):
        package = importlib.import_module(f"llmx.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def components_by_name() -> dict[str, type]:
    """The classes of the collection by their short names."""
    import_collection()
    return {
        name: cls
        for module in [m for n, m in sys.modules.items() if n.startswith("llmx.")]
        for name, cls in vars(module).items()
        if isinstance(cls, type) and cls.__module__ == module.__name__
    }
