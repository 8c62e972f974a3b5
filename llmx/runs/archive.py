"""Reads files that torch wrote as tensors and plain data. Nothing in a file is executed.

Checkpoints name classes. `llmx.config.factories` decides which of them are imported.
"""

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from llmx.errors import UserError, one_line

_DICTS = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "llmx", "loops", "callbacks")
CHECKPOINT: dict[str, type] = {  # the parts of a fit's checkpoint that llmx or Lightning reads
    **dict.fromkeys(_DICTS, dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    **dict.fromkeys(("epoch", "global_step"), int),
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of a LanguageModel onto the CPU. Raises UserError for any other file, as `read_archive`."""
    checkpoint = read_archive(Path(path))
    required = {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
    other = f"ckpt_path: {path} is not a checkpoint of a LanguageModel"
    if not isinstance(checkpoint, dict) or not required <= checkpoint.keys():
        raise UserError(other)
    for part, kind in CHECKPOINT.items():
        if not isinstance(checkpoint.get(part, kind()), kind):
            raise UserError(f"{other}: its {part} is no {kind.__name__}")
    if not re.match(r"\d+(\.\d+)+", checkpoint["pytorch-lightning_version"]):
        raise UserError(f"ckpt_path: {path} is damaged: its pytorch-lightning_version is no version")
    return checkpoint


def read_archive(path: Path) -> Any:
    """Loads what a file holds onto the CPU, with torch's restricted unpickler.

    Raises UserError if the file is missing or damaged, holds more than plain data and tensors, or would unpack to more
    than its size.
    """
    if (path / ".metadata").is_file():
        raise UserError(
            f"ckpt_path: {path} is a folder of shards; python -m lightning.fabric.utilities.consolidate_checkpoint "
            f"{path} makes one file of it (and executes what it holds)"
        )
    if not path.is_file():
        raise UserError(f"ckpt_path: no checkpoint at {path}")
    damaged = f"ckpt_path: {path} is damaged or no checkpoint"
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except UnpicklingError as error:
        if "Unsupported" in str(error) or "weights_only" in str(error):
            damaged = f"ckpt_path: {path} holds more than tensors and plain data, and was refused without executing it"
        raise UserError(damaged) from error
    except Exception as error:  # damaged bytes can raise anything in the unpickler
        raise UserError(f"{damaged} ({one_line(error, 120)})") from error


def _check_archive(path: Path) -> None:
    """Checks what torch does not. torch stores members uncompressed, so a small file that unpacks to a large one is
    not torch's. torch writes checksums but never compares them, so it would read a changed weight like any other."""
    if not zipfile.is_zipfile(path):
        return  # torch says what is wrong with it
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > path.stat().st_size for m in members):
            raise UserError(f"ckpt_path: {path} would unpack to more than its size, and was refused")
        if any(m.filename.startswith("/") or ".." in m.filename.replace("\\", "/").split("/") for m in members):
            raise UserError(f"ckpt_path: {path} has members outside its own folder, and was refused")
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"ckpt_path: {path} is damaged: {damaged} does not have the checksum it was written with")
