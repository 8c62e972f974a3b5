"""Checkpoints: Lightning's Trainer writes them atomically and reads them without executing anything. A network starts
from the weights of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from llmx.errors import UserError
from llmx.protocol import Network
from llmx.runs.archive import read_archive, read_checkpoint

PARTIAL = "checkpoint.partial"  # one name: the next write replaces what a killed process left behind


def load_network(network: Network, path: str | Path) -> dict[str, float]:
    """Gives a network the weights of a checkpoint.

    Returns:
        text sha256 -> fraction that these weights were trained on.

    Raises:
        UserError: for a checkpoint that cannot be read or holds another network.
    """
    checkpoint = read_checkpoint(path)
    weights = {
        key.removeprefix("network."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("network.")
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"model.warm_start: {path} holds another network: {shortened(error)}") from error
    return checkpoint.get("llmx", {}).get("trained_on", {})


def shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class CheckpointFiles(TorchCheckpointIO):
    """Writes to a temporary file, which takes the checkpoint's name once all of it is on the disk. Reads any archive
    safely, since forked processes hand back bare weights."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the whole file, or leaves the former one.

        Raises:
            UserError: if it cannot be written, as on a full disk.
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
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
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
    """Writes a renamed entry to the disk, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
