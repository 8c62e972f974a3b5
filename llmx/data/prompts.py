"""Prompts for a language model to continue, in batches that need no padding."""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmx.data.tokenizers import Tokenizer
from llmx.errors import UserError


class Prompts(NamedTuple):
    """A batch of prompts of equal length."""

    tokens: Tensor  # (B, T) int64
    indices: list[int]  # the number of each row's prompt
    texts: list[str]


class PromptBatches:
    """Each prompt `samples` times, in batches of equal token length; a rank takes every world_size-th batch."""

    def __init__(self, encoded: list[tuple[str, np.ndarray]], samples: int, batch_size: int, rank: int, world: int):
        rows = [(index, text, ids) for index, (text, ids) in enumerate(encoded) for _ in range(samples)]
        rows.sort(key=lambda row: len(row[2]))
        groups = [list(group) for _, group in groupby(rows, key=lambda row: len(row[2]))]
        batches = [group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)]
        self.batches = batches[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Prompts]:
        for batch in self.batches:
            indices, texts, ids = zip(*batch, strict=True)
            yield Prompts(torch.from_numpy(np.stack(ids).astype(np.int64)), list(indices), list(texts))


def encoded_prompts(prompts: list[str] | str | None, tokenizer: Tokenizer) -> list[tuple[str, np.ndarray]]:
    """Each prompt of a list, of a UTF-8 file with one prompt a line, or the one prompt, with its token ids. None is a
    newline. Raises UserError if there is no prompt, or one is empty or has a character outside the vocabulary."""
    encoded = []
    for number, prompt in enumerate(_read(prompts)):
        if not prompt:
            raise UserError(f"data.prompts: prompt {number} is empty; give it at least one character")
        try:
            encoded.append((prompt, tokenizer.encode(prompt)))
        except UserError as error:
            raise UserError(f"data.prompts: prompt {number}, {prompt!r:.100}: {error}") from None
    return encoded


def _read(prompts: list[str] | str | None) -> list[str]:
    if prompts == []:
        raise UserError("data.prompts is an empty list: give at least one prompt, or null for a newline")
    if not isinstance(prompts, str):
        return prompts or ["\n"]
    if not os.path.isfile(prompts):
        return [prompts]
    try:
        return Path(prompts).read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.prompts: {prompts} cannot be read as UTF-8 text: {error}") from None
