"""Checkpoints: how Lightning's Trainer writes and reads them (atomically, and executing nothing), the entry of llmx in
them, and how a network starts from one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from llmx.errors import UserError
from llmx.protocol import Network
from llmx.runs.archive import read_archive, read_checkpoint
from llmx.training.typed import text_data

if TYPE_CHECKING:
    from llmx.training.module import LanguageModel

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


def entry(model: LanguageModel) -> dict[str, Any]:
    """What a checkpoint holds under `llmx`."""
    trained_on, data = dict(model.trained_on), text_data(model.trainer)
    if data is not None:
        text = data.source.sha256
        trained_on[text] = max(data.split[0], trained_on.get(text, 0.0))
    return {
        "leaking": model.leaking,
        "trained_on": trained_on,
        "accumulate": model.trainer.accumulate_grad_batches,
        "precision": str(model.trainer.precision),
    }


def restore_entry(model: LanguageModel, held: dict[str, Any]) -> None:
    """Takes from an `entry` what the model has to know.

    Raises:
        UserError: for a fit with another accumulation of gradients than that of its run.
    """
    model.leaking = model.leaking or held.get("leaking", False)
    model.trained_on = held.get("trained_on", {})
    if model._trainer is not None and model.trainer.state.fn == "fit":
        accumulate = model.trainer.accumulate_grad_batches
        if held.get("accumulate", accumulate) != accumulate:  # Lightning counts the epoch's batches, not its steps
            raise UserError(
                f"trainer.accumulate_grad_batches: {accumulate} cannot continue a run that has {held['accumulate']}"
            )


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
