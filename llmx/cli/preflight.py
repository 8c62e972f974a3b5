"""Runs one window through a network before it is trained, and reports a failure in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmx.costs.from_config import failing_frame, window_failure
from llmx.errors import UserError
from llmx.protocol import Network


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
        if isinstance(error, ValueError) and failing_frame(error).filename.startswith(str(Path(__file__).parents[1])):
            raise UserError(f"model.network does not take windows of {window} (data.window): {error}") from error
        raise UserError(window_failure(window, error)) from error
    finally:
        for handle in handles:
            handle.remove()
