"""`--ckpt_path`: the checkpoint that a command begins from, and the run that it belongs to."""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmx.config.base_files import read_config
from llmx.config.command import Command
from llmx.config.factories import check_imports
from llmx.errors import UserError
from llmx.runs.archive import read_checkpoint
from llmx.runs.folder import CONFIG, is_best, newest_run, run_of
from llmx.training.module import LanguageModel


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read, and the folder of its run."""

    path: str
    content: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return run_of(self.path)

    @property
    def in_run(self) -> bool:
        """Whether its folder is that of a run, so that a fit goes on in it."""
        return (self.run / CONFIG).is_file()

    @property
    def chosen(self) -> bool:
        """Whether its weights were chosen for their validation loss."""
        return is_best(self.path)

    @property
    def tokenizer(self) -> Any:
        return self.content["hyper_parameters"]["tokenizer"]

    @property
    def precision(self) -> str | None:
        return self.content.get("llmx", {}).get("precision")


def with_checkpoint(command: Command) -> tuple[Command, Checkpoint | None]:
    """The command with the settings of the run that --ckpt_path names, which come before its own. Raises UserError for
    a module of --trust that cannot be imported, for a checkpoint that cannot be used, and for settings in it that would
    make the parser import something."""
    command = _trusting(command)
    path = command.flag("--ckpt_path")
    if path is None:
        return command.with_entries(), None
    if path == "last":
        path = str(newest_run(_root(command)))
        command = command.having("--ckpt_path", path)
    checkpoint = Checkpoint(path, read_checkpoint(path))
    resumable = {"optimizer_states", "lr_schedulers"} <= checkpoint.content.keys()
    if command.verb == "fit" and not (resumable and "fit_loop" in checkpoint.content.get("loops", {})):
        raise UserError(f"ckpt_path: {path} holds weights alone, which --model.warm_start takes, and no state of a run")
    if not command.configs:
        command = replace(command, configs=(_settings_of(checkpoint, command.verb),))
    return command.with_entries(), checkpoint


def check_same_network(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Compares shapes, for a checkpoint of another architecture would be told by a page of missing keys. Raises
    UserError for another network than that of the checkpoint."""
    state = checkpoint.content["state_dict"]
    held = {k: v.shape for k, v in state.items() if k.startswith("network.")}
    built = {k: v.shape for k, v in model.state_dict().items() if k.startswith("network.")}
    if not model.learning.fixed_shapes:  # the sizes of its tables are those of the text
        built |= {name: held[name] for name in built.keys() & held.keys()}
    if held != built:
        name = next(k for k in [*built, *held] if held.get(k) != built.get(k))
        raise UserError(
            f"ckpt_path: the checkpoint holds another network than model.network describes: {name} has shape "
            f"{_shape(held.get(name))} in the checkpoint and {_shape(built.get(name))} in the network. "
            "Without --config a checkpoint brings its own network along."
        )


def _trusting(command: Command) -> Command:
    """Imports the modules that --trust names, and takes the flag out."""
    names = command.flag("--trust")
    if names is None:
        return command
    for name in names.split(","):
        try:
            importlib.import_module(name.strip())
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"trust: {name!r} cannot be imported: {error}") from error
    return command.without("--trust")


def _root(command: Command) -> Path:
    """The folder that the runs are below."""
    trainer = command.config.get("trainer")
    config = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
    return Path(command.flag("--trainer.default_root_dir") or config or ".")


def _settings_of(checkpoint: Checkpoint, verb: str) -> dict[str, Any]:
    """The settings of the run where a fit goes on in it, else those that the checkpoint holds."""
    path = checkpoint.path
    if verb == "fit" and checkpoint.in_run:
        config = checkpoint.run / CONFIG
        content = read_config(config)
        for group in ("model", "trainer"):  # the data's settings are plain
            check_imports(content.get(group), f"{config}: {group}")
        return content
    model = dict(checkpoint.content["hyper_parameters"])
    data = checkpoint.content.get("datamodule_hyper_parameters")
    if data is None or not {"tokenizer", "window"} <= model.keys():
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a LanguageModel and its TextDataModule")
    del model["tokenizer"], model["window"]
    check_imports(model, f"ckpt_path: {path}")
    content = {"model": model, "data": dict(data)}
    try:
        json.dumps(content)
    except (TypeError, ValueError) as error:
        raise UserError(f"ckpt_path: {path}: its settings are not plain data: {error}") from error
    return content


def _shape(shape: torch.Size | None) -> str:
    return "no such parameter" if shape is None else str(tuple(shape))
