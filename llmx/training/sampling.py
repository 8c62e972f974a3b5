"""From sampling settings to text: checks the settings, with messages that name their keys, and generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from llmx.data.prompts import Prompts
from llmx.errors import UserError
from llmx.generation import Sampling, check_drafts, generate
from llmx.protocol import Network, Tokens
from llmx.training.hardware import COMPILE_DECODING_FROM, can_compile, compiled_decode
from llmx.training.lightning_types import Model

KEY = "model.sampling."


def sampling_from(settings: Sampling | dict[str, Any], key: str = KEY) -> Sampling:
    """Settings from plain data, or as they are. Raises UserError, which starts with the key, for any other value."""
    if isinstance(settings, dict):
        with _naming(key):
            return Sampling(**settings)
    if not isinstance(settings, Sampling):
        raise UserError(f"{key.rstrip('.')}: {settings!r:.100} is no Sampling; give keys and values")
    return settings


def check_speculation(network: Network, sampling: Sampling, key: str = KEY) -> None:
    """Refuses to speculate further than the network's heads predict, by a UserError that starts with the key."""
    with _naming(key):
        check_drafts(network, sampling)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{key}{error}") from error


def _generated(model: Model, prompts: Tokens, sampling: Sampling) -> Tokens:
    """(B, T) -> (B, max_new_tokens). Compiles the step of a long generation, if that makes it faster."""
    long = sampling.max_new_tokens >= COMPILE_DECODING_FROM and not sampling.speculate
    faster = long and model.network.stateful and model.learning.compiles_decoding
    if not faster or model.hparams["compile"] is False or not can_compile():
        return generate(model.network, prompts, model.window, sampling)
    rank_zero_info("A long generation: its step is compiled first, in half a minute, or seconds if it was before.")
    return generate(model.network, prompts, model.window, sampling, compiled_decode())


def continued(model: Model, prompt: str, changes: dict[str, Any]) -> str:
    """A prompt and its continuation; see `LanguageModel.generate`."""
    if not prompt:
        raise UserError("prompt: give at least one character")
    own = asdict(model.sampling)
    unknown = changes.keys() - own.keys()
    if unknown:
        raise UserError(f"{unknown.pop()}: not a sampling option; there are {', '.join(own)}")
    sampling = sampling_from({**own, **changes}, key="")
    check_speculation(model.network, sampling, key="")
    tokens = torch.tensor(model.tokenizer.encode(prompt), dtype=torch.int64, device=model.device)[None]
    return prompt + model.tokenizer.decode(_generated(model, tokens, sampling)[0].tolist())


def predictions(model: Model, batch: Prompts) -> list[dict[str, Any]]:
    """One record a row: index of the prompt, prompt, completion, text (prompt and completion)."""
    tokens = _generated(model, batch.tokens, model.sampling)
    completions = [model.tokenizer.decode(row) for row in tokens.tolist()]
    return [
        {"prompt_index": index, "prompt": prompt, "completion": completion, "text": prompt + completion}
        for index, prompt, completion in zip(batch.indices, batch.texts, completions, strict=True)
    ]
