"""No component may read the text that its network is measured on: a watch on the files that components open.

Python tells an audit hook (PEP 578) of every file that Python code opens. An opening counts where a component has not
returned yet, in its constructor or in a pass: the lab's own reading is never accused. The watch only keeps what it
sees, and is judged after the call, so a component that swallows exceptions hides nothing.

Not seen: files that C++ opens (torch.from_file), files that another process opens, and what a module of one's own reads
while the config is parsed.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from llmx.data import corpora
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.training.lightning_types import Model, language_model, text_data
from llmx.training.stopping import stop_together

# the source that a message names lies outside of these
LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), "<frozen")
READERS = os.path.dirname(corpora.__file__)  # of the laboratory
# the modules that read Python's own sources, which are a corpus too (stdlib)
SOURCE_READERS = ("importlib._bootstrap_external", "_frozen_importlib_external", "tokenize")

Identity = tuple[int, int]  # device and inode: the same for all names of a file


@dataclass(frozen=True)
class Opening:
    """A file that a component opened."""

    file: Identity
    who: str  # the component
    where: str  # file and line of the source


class Watch:
    """What components open while it is on. `files` are those of the corpus; until they are known, it keeps all."""

    def __init__(self) -> None:
        self.files: dict[Identity, Path] | None = None
        self.opened: list[Opening] = []
        self.said: set[str] = set()  # warnings

    def __enter__(self) -> Watch:
        _install()
        _on.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _on.remove(self)

    def note(self, file: Identity, frame: FrameType) -> None:
        if self.files is None or file in self.files:
            opening = _by_component(file, frame)
            if opening is not None:
                self.opened.append(opening)


class CorpusWatch(Callback):
    """Watches while a trainer runs the network, outside of prediction. A LanguageModel brings it to every trainer."""

    def __init__(self) -> None:
        self.on = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        model, data = language_model(pl_module), text_data(trainer)
        if stage != "predict" and data is not None and model.hparams["audit"] != "off":
            model.watch.files = _identities(data.files)
            self.on.enter_context(model.watch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        _judge(language_model(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _judge(language_model(pl_module))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _judge(language_model(pl_module))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.on.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on.close()


@contextmanager
def watched(model: Model, data: TextDataModule | None) -> Iterator[None]:
    """Watches the network while it runs inside, and judges what it opened then and when it was built. Does nothing
    without data or under `audit: off`. Raises UserError if a component opened a file of the corpus."""
    if data is None or model.hparams["audit"] == "off":
        yield
        return
    model.watch.files = _identities(data.files)
    with model.watch:
        yield
    _judge(model)


def _judge(model: Model) -> None:
    """Ends the run for a file of the corpus that a component opened; under `audit: warn` it marks the run."""
    opened, model.watch.opened = model.watch.opened, []
    files = model.watch.files or {}  # unknown under `audit: off`, and where a notebook gave loaders of its own
    for opening in opened:
        path = files.get(opening.file)
        message = f"{opening.who} opens the corpus {path} ({opening.where})"
        if path is None or message in model.watch.said:
            continue
        if model.hparams["audit"] == "error":
            advice = "Keep what it needs in a file of its own, or train it anyway with `--model.audit warn`"
            error = UserError(f"{message}. A network may not read its validation text. {advice}, which marks the run.")
            if model._trainer is None:
                raise error
            stop_together(model.trainer, error)
        model.watch.said.add(message)
        model.leaking = True
        rank_zero_warn(f"LEAKING: {message}.")


# ---------------------------------------------------------------------------------------------------------- the hook
_on: list[Watch] = []  # the last one listens


@cache  # a hook cannot be removed
def _install() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _on:
        return
    frame, path = sys._getframe(1), arguments[0]
    if frame.f_globals.get("__name__") in SOURCE_READERS and str(path).endswith((".py", ".pyc")):
        return
    try:
        status = os.stat(path)
    except (OSError, ValueError, TypeError):  # no such file, or no path
        return
    _on[-1].note((status.st_dev, status.st_ino), frame)


def _identities(paths: Iterable[Path]) -> dict[Identity, Path]:
    found = {}
    for path in paths:
        with suppress(OSError):  # gone meanwhile
            status = path.stat()
            found[status.st_dev, status.st_ino] = path
    return found


def _by_component(file: Identity, frame: FrameType) -> Opening | None:
    """The opening, if the network's code is on the stack: a component, or a function that builds it."""
    frames = [frame]
    while frames[-1].f_back is not None:
        frames.append(frames[-1].f_back)
    owners = [_first_argument(frame) for frame in frames]
    modules = [index for index, owner in enumerate(owners) if isinstance(owner, nn.Module)]
    parts = [index for index in modules if not isinstance(owners[index], pl.LightningModule)]
    lab = any(isinstance(owner, Callback | pl.LightningDataModule) for owner in owners)
    if not parts and (lab or not modules):
        return None
    last = (parts or modules)[0]
    own = (frame for frame in frames[:last] if not frame.f_code.co_filename.startswith((*LIBRARIES, READERS)))
    place = next(own, frames[last])
    who = _name([owners[index] for index in parts]) if parts else "model.network"
    return Opening(file, who, f"{_shown(place.f_code.co_filename)}, line {place.f_lineno}")


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _name(stack: list[nn.Module]) -> str:
    """The class of the innermost of these modules, after its dotted name in the outermost that holds it; a network
    that is still built holds none."""
    kind = type(stack[0]).__name__
    for network in reversed(stack):
        for name, module in network.named_modules() if "_modules" in vars(network) else ():
            if module is stack[0] and name:
                return f"{name} ({kind})"
    return kind


def _shown(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
