"""What a fit tries before step 1, on copies: whether the forms of the network agree, and whether gradients reach it."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from llmx.audits import equivalence
from llmx.audits.equivalence import TOLERANCE, compare, find_culprit, segmentations
from llmx.audits.network_copies import copy_network, exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.audits.rounding import CAST_TOLERANCE, RoundingWatch
from llmx.costs.from_config import described, failing_frame
from llmx.errors import UserError, one_line
from llmx.protocol import Network, Tokens
from llmx.training.lightning_types import Model

LENGTH = 7  # tokens: a piece of three, one, and three more
ROWS = 3  # two outputs would pass for an output and a state
NAMED = 5  # parameters, in one line


def try_forms(model: Model) -> None:
    """Compares forward, prefill and step over a few tokens. Where they differ, `model.audit: error` raises UserError
    with component, file and line, and `warn` says it in one line."""
    if not model.network.stateful:
        return
    try:
        fault = difference_of_forms(model.network, model.window)
    except UserError as error:
        fault = str(error)
    if fault is None:
        return
    message = f"model.network: it would generate as another network than the one that learns: {fault}"
    if model.hparams["audit"] == "error":
        raise UserError(f"{message}. Fix it, or train the network anyway with `--model.audit warn`")
    rank_zero_warn(message)


def difference_of_forms(network: Network, max_length: int, seed: int = 0) -> str | None:
    """Compares the outputs of forward, prefill and step over a few tokens, at most `max_length`. Says what is wrong,
    with component, file and line; None if nothing is.

    The network and the caller's random state stay as they are. A form that fails in float64 is tried again in its own
    precision, for which alone it may be written. Raises UserError for what the network itself refuses.
    """
    with preserve_rng_state(), torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(network.vocab_size, (ROWS, min(max_length, LENGTH)), generator=generator)
        copy = perturbed_copy(exact_copy(network), 0.1, generator).eval()
        seed_cpu(seed)
        try:
            if not compare(copy, tokens, None):
                return None
            with RoundingWatch() as rounding:
                compare(copy, tokens, None, math.inf)
            return _difference(copy, tokens, 10 * max(TOLERANCE, rounding.tolerance))
        except UserError:
            raise
        except Exception:
            copy = perturbed_copy(copy_network(network).cpu(), 0.1, generator).eval()
        tolerance = 10 * max((CAST_TOLERANCE.get(weight.dtype, 0) for weight in copy.parameters()), default=TOLERANCE)
        try:
            return _difference(copy, tokens, tolerance)
        except UserError:
            raise
        except Exception as error:
            return _failure(copy, tokens, tolerance, error)


def _difference(network: Network, tokens: Tokens, tolerance: float) -> str | None:
    for found in compare(network, tokens, None, tolerance):
        part, _, _, shapes = find_culprit(network, tokens, found.lengths, tolerance)
        said = str(found) if shapes is None else f"{found.component} gives {_shapes(shapes, found.lengths)}"
        return f"{said}; see its {_place(part, found.lengths)}"
    return None


def _failure(network: Network, tokens: Tokens, tolerance: float, error: Exception) -> str:
    """Names the component that makes the network's recurrent form raise `error`."""
    found = [(find_culprit(network, tokens, lengths, tolerance), lengths) for lengths in segmentations(tokens.shape[1])]
    (part, name, own, shapes), lengths = next((pair for pair in found if pair[0].part is not network), found[0])
    if shapes is not None:
        return f"{name} gives {_shapes(shapes, lengths)}; see its {_place(part, lengths)}"
    if part is network:
        own = error
    if own is not None and failing_frame(own).filename != equivalence.__file__:
        return f"{name} fails in {described(own)}"
    said = one_line(own or error, 200)
    return f"{name} fails: {said}; see its {_place(part, lengths)}"


def _shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]], lengths: Sequence[int]) -> str:
    """The shapes that a form gives and should give, without the axis of time for `step`."""
    own, right = [(shape[:1] + shape[2:]) if set(lengths) == {1} else shape for shape in shapes]
    return f"{own}, not {right}"


def _place(part: Any, lengths: Sequence[int]) -> str:
    """Where the method that takes these pieces is defined."""
    method = "step" if set(lengths) == {1} else "prefill"
    code = inspect.unwrap(getattr(type(part), method)).__code__
    return f"{method} in {code.co_filename}, line {code.co_firstlineno}"


@rank_zero_only
def tell_silent_parameters(model: Model) -> None:
    """One line where a parameter gets no gradient, and never an error."""
    try:
        silent = [name for report in model.learning.audits(model) for name in report.silent]
    except Exception as error:  # whatever a component raises, in a precision that is not its own
        print(f"model.network: nobody knows whether a gradient reaches every parameter: {described(error)}")
        return
    if silent:
        count = sum(model.network.get_parameter(name).numel() for name in silent)
        names = ", ".join(silent[:NAMED]) + (f" and {len(silent) - NAMED} others" if len(silent) > NAMED else "")
        print(f"model.network: no gradient reaches {names} ({count:,} parameters)")
