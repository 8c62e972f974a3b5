"""Networks of a configuration built and tried, with one message for what does not fit."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from llmx.config.factories import build
from llmx.costs.describe import Description, describe
from llmx.errors import UserError
from llmx.protocol import Network

SMALL = 50_000_000  # parameters of a network that is described by running it, where shapes alone do not do


def check_window(network: Network, window: int) -> None:
    """Runs the network on a whole window.

    Raises:
        UserError: for a network that does not take it, and for a component whose output has another shape than its
            input.
    """
    names = {module: name for name, module in network.named_modules()}

    def check(part: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.shape != args[0].shape:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise UserError(
                f"model.network: {names[part]} ({type(part).__name__}) gives {what} for {tuple(args[0].shape)}; "
                "its output has the shape of its input"
            )

    parts = {part for block in network.layers for part in (block.mixer, block.feed_forward)}
    handles = [part.register_forward_hook(check) for part in parts]
    try:
        with torch.no_grad():
            outputs = network(torch.zeros(1, window, dtype=torch.int64))
        if outputs.ndim != 3:
            raise UserError(
                f"model.network: gives {tuple(outputs.shape)} for {(1, window)}, not a row of logits a token; "
                "blocks of several streams stand at all layers or at none"
            )
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _frame(error).filename.startswith(str(Path(__file__).parents[1])):
            raise UserError(f"model.network does not take windows of {window} (data.window): {error}") from error
        raise UserError(_stuck(window, error)) from error
    finally:
        for handle in handles:
            handle.remove()


def described_network(config: Any, vocab_size: int, length: int) -> Description:
    """Builds the network where it takes no memory, and for real only where that fails or says too little."""

    def described(device: str) -> Description:
        return describe(built_network(config, vocab_size, device), length)

    try:
        description = described("meta")
        return described("cpu") if description.uncounted and description.parameters <= SMALL else description
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.network does not take a sequence of {length} (--length): {error}") from error
    except (RuntimeError, TypeError):  # not what a shape alone allows
        pass
    try:
        return described("cpu")
    except RuntimeError as error:
        raise UserError(_stuck(length, error)) from error


def built_network(config: Any, vocab_size: int, device: str) -> Network:
    """Raises UserError for a network that cannot be built, RuntimeError for one that needs numbers where none are."""
    try:
        with torch.device(device):
            return build(config, vocab_size, "model.network")
    except UserError as error:
        if device == "meta" and isinstance(error.__cause__, RuntimeError):
            raise error.__cause__ from None
        raise


def _stuck(length: int, error: Exception) -> str:
    """What torch says of shapes and memory, or Python of a mistake, with the line of the component."""
    frame = _frame(error)
    place = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"model.network: a window of {length} does not pass {place}: {kind}{' '.join(str(error).split())[:300]}"


def _frame(error: Exception) -> traceback.FrameSummary:
    """The last place outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(str(Path(torch.__file__).parent))][-1]
