"""Builds and describes the network of a config, without memory for its weights where that is possible."""

import traceback
from pathlib import Path
from typing import Any

import torch

from llmx.config.factories import build
from llmx.costs.describe import Description, describe
from llmx.errors import UserError, one_line
from llmx.protocol import Network

SMALL = 50_000_000  # a network with up to so many parameters is run with numbers if shapes alone do not suffice


def describe_config(config: Any, vocab_size: int, length: int) -> Description:
    """Describes the network on the meta device, or with numbers if that fails or counts no FLOPs of a small one.

    Raises UserError for a network that cannot be built, or does not take the length.
    """

    def described(device: str) -> Description:
        return describe(build_on(device, config, vocab_size), length)

    try:
        description = described("meta")
        return described("cpu") if description.uncounted and description.parameters <= SMALL else description
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.network does not take a sequence of {length} (--length): {error}") from error
    except (RuntimeError, TypeError):  # needs numbers
        try:
            return described("cpu")
        except RuntimeError as error:
            raise UserError(window_failure(length, error)) from error


def build_without_memory(config: Any, vocab_size: int) -> Network:
    """The network on the meta device; with numbers if its constructors need them."""
    try:
        return build_on("meta", config, vocab_size)
    except (RuntimeError, TypeError):
        return build_on("cpu", config, vocab_size)


def build_on(device: str, config: Any, vocab_size: int) -> Network:
    """Builds the network on a device. Raises UserError for a network that cannot be built, and RuntimeError on the meta
    device for a network whose constructors need numbers."""
    try:
        with torch.device(device):
            return build(config, vocab_size, "model.network")
    except UserError as error:
        if device == "meta" and isinstance(error.__cause__, RuntimeError):
            raise error.__cause__ from None
        raise


def window_failure(length: int, error: Exception) -> str:
    """One line for an error of torch or of a component's code, with the component's line."""
    return f"model.network: a window of {length} does not pass {described(error)}"


def described(error: Exception) -> str:
    """Where an error of torch or of a component's code was raised, and what it says."""
    frame = failing_frame(error)
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}: {kind}{one_line(error, 300)}"


def failing_frame(error: Exception) -> traceback.FrameSummary:
    """The last place outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(str(Path(torch.__file__).parent))][-1]
