"""Files that torch wrote, read as plain data and tensors alone: nothing in them is executed."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from llmx.errors import UserError


def read_archive(path: Path) -> Any:
    """What a file holds, on the CPU; torch's restricted unpickler reads it.

    Raises:
        UserError: for a file that is missing, damaged, holds more than plain data and tensors, or would unpack to more
            than its size.
    """
    if (path / ".metadata").is_file():
        raise UserError(
            f"ckpt_path: {path} is a folder of shards; python -m lightning.fabric.utilities.consolidate_checkpoint "
            f"{path} makes one file of it (and executes what it holds)"
        )
    if not path.is_file():
        raise UserError(f"ckpt_path: no checkpoint at {path}")
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except UnpicklingError as error:
        if "Unsupported" in str(error) or "weights_only" in str(error):
            raise UserError(
                f"ckpt_path: {path} holds more than tensors and plain data, and was refused without executing it"
            ) from error
        raise UserError(f"ckpt_path: {path} is damaged or no checkpoint") from error
    except Exception as error:  # the unpickler meets damaged bytes with whatever they lead to
        raise UserError(
            f"ckpt_path: {path} is damaged or no checkpoint ({' '.join(str(error).split())[:120]})"
        ) from error


def _check_archive(path: Path) -> None:
    """torch stores the members of its archive as they are; a small file that unpacks to a large one is not torch's.
    It writes checksums, too, and does not look at them: a changed weight would be read like any other.

    Raises:
        UserError: for compressed members, for names that lead out of the archive, and for a wrong checksum.
        OSError, zipfile.BadZipFile: for what cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return  # torch says what is wrong with it
    with zipfile.ZipFile(path) as archive:
        _check_members(path, archive.infolist())
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"ckpt_path: {path} is damaged: {damaged} does not have the checksum it was written with")


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > path.stat().st_size for m in members):
        raise UserError(f"ckpt_path: {path} would unpack to more than its size, and was refused")
    if any(m.filename.startswith("/") or ".." in m.filename.replace("\\", "/").split("/") for m in members):
        raise UserError(f"ckpt_path: {path} has members outside its own folder, and was refused")
