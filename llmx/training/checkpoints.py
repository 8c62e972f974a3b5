"""Checkpoints on disk: read as plain data alone, written whole or not at all, one readable message for what is wrong.

Of the classes that a file names only those are imported that `llmx.config.factories` lets through.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from llmx.errors import UserError
from llmx.runs.archive import read_archive

PARTIAL = "checkpoint.partial"  # one name: what a kill left behind the next write replaces
PARTS: dict[str, type] = {  # what is in a checkpoint of a fit, as far as it is read
    **dict.fromkeys(
        ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "llmx", "loops", "callbacks"), dict
    ),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    **dict.fromkeys(("epoch", "global_step"), int),
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of a LanguageModel onto the CPU; nothing in the file is executed.

    Raises:
        UserError: for a file that is missing, damaged, holds more than plain data and tensors, would unpack to more
            than its size, or is no LanguageModel.
    """
    checkpoint = read_archive(Path(path))
    written = {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
    if not isinstance(checkpoint, dict) or not written <= checkpoint.keys():
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a LanguageModel")
    for part, kind in PARTS.items():
        if not isinstance(checkpoint.get(part, kind()), kind):
            raise UserError(
                f"ckpt_path: {path} is not a checkpoint of a LanguageModel: its {part} is no {kind.__name__}"
            )
    if not re.match(r"\d+(\.\d+)+", checkpoint["pytorch-lightning_version"]):
        raise UserError(f"ckpt_path: {path} is damaged: its pytorch-lightning_version is no version")
    return checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """How a trainer writes and reads checkpoints: to a temporary file beside the place, which takes the name once all
    of it is on the disk; and as `read_checkpoint` reads, whatever it is: forked processes hand bare weights back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the file whole, or leaves what was there before.

        Raises:
            UserError: where it cannot be written, as on a full disk.
        """
        path = Path(path)
        partial = path.with_name(PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
            partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: the checkpoint could not be written ({reason}); the one before it, if any, is still there"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_archive(Path(path))


def _sync_folder(folder: Path) -> None:
    """Puts a renamed entry on the disk, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
