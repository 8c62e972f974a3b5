"""From sampling settings to text: checks the settings, with messages that name their keys, and decides whether
decoding is compiled."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from llmx.errors import UserError
from llmx.generation import Sampling, check_drafts, generate
from llmx.protocol import Network, Tokens
from llmx.training.compilation import COMPILE_DECODING_FROM, can_compile, compiled_decode

if TYPE_CHECKING:
    from llmx.training.module import LanguageModel

KEY = "model.sampling."


def sampling_from(settings: Sampling | dict[str, Any], key: str = KEY) -> Sampling:
    """Settings as plain data or as they are.

    Raises:
        UserError: for a value out of range, or something else than settings; the message starts with the key.
    """
    if isinstance(settings, Sampling):
        return settings
    if not isinstance(settings, dict):
        raise UserError(f"{key.rstrip('.')}: {settings!r:.100} is no Sampling; give keys and values")
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise UserError(f"{key}{error}") from error


def check_speculation(network: Network, sampling: Sampling, key: str = KEY) -> None:
    """Refuses to speculate further than the network's heads predict.

    Raises:
        UserError: the message starts with the key.
    """
    try:
        check_drafts(network, sampling)
    except ValueError as error:
        raise UserError(f"{key}{error}") from error


def changed(model: LanguageModel, changes: dict[str, Any]) -> Sampling:
    """The model's sampling settings with some of them changed, checked.

    Raises:
        UserError: for an unknown name, a value out of range or one that the network does not support.
    """
    own = asdict(model.sampling)
    unknown = changes.keys() - own.keys()
    if unknown:
        raise UserError(f"{unknown.pop()}: not a sampling option; there are {', '.join(own)}")
    sampling = sampling_from({**own, **changes}, key="")
    check_speculation(model.network, sampling, key="")
    return sampling


def continue_prompts(model: LanguageModel, prompts: Tokens, sampling: Sampling) -> Tokens:
    """(B, T) -> (B, max_new_tokens). Compiles the step of a long generation, if that makes it faster."""
    long = sampling.max_new_tokens >= COMPILE_DECODING_FROM and not sampling.speculate
    faster = long and model.network.stateful and model.learning.compiles_decoding
    if not faster or model.hparams["compile"] is False or not can_compile():
        return generate(model.network, prompts, model.window, sampling)
    rank_zero_info("A long generation: its step is compiled first, in half a minute, or seconds if it was before.")
    return generate(model.network, prompts, model.window, sampling, compiled_decode())
