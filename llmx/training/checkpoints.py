"""Reading checkpoints: plain data only, with one readable message for whatever is wrong with a file."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from llmx.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of a LanguageModel onto the CPU; nothing in the file is executed.

    Raises:
        UserError: for a file that is missing, damaged, holds more than plain data and tensors, or is no LanguageModel.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"ckpt_path: no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "Unsupported" in str(error) or "weights_only" in str(error):
            raise UserError(
                f"ckpt_path: {path} holds more than tensors and plain data, and was refused without executing it"
            ) from error
        raise UserError(f"ckpt_path: {path} is damaged or no checkpoint") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"ckpt_path: {path} is damaged or no checkpoint ({' '.join(str(error).split())[:120]})"
        ) from error
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise UserError(f"ckpt_path: {path} is not a checkpoint of a LanguageModel")
    return checkpoint
