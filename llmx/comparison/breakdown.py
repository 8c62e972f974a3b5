"""Splits a loss by the place in the window and by the kind of the predicted character."""

import re
from functools import lru_cache
from typing import Any

import numpy as np

from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError

KINDS = ("speaker's name", "start of a word", "inside a word", "space", "new line", "punctuation")


def positions(count: int, window: int, stride: int | None) -> np.ndarray:
    """(count,): the place in its window, 0 to window - 1, of each prediction. Each character is predicted once: all of
    the first window, then the last `stride` of each following window."""
    stride = window if stride is None else stride
    index = np.arange(count)
    return np.where(index < window, index, window - stride + (index - window) % stride)


def by_position(losses: np.ndarray, window: int, stride: int | None) -> tuple[np.ndarray, np.ndarray]:
    """losses (N,) -> the places that occur, and the mean loss at each."""
    place = positions(len(losses), window, stride)
    count = np.bincount(place, minlength=window)
    total = np.bincount(place, losses, minlength=window)
    occurring = np.flatnonzero(count)
    return occurring, total[occurring] / count[occurring]


@lru_cache(maxsize=4)  # all networks of a comparison share a text
def kinds(text: str) -> np.ndarray:
    """(len(text),): an index into KINDS for each character. A speaker's name is a line that ends with its only colon
    and follows an empty line."""
    letters = np.array([character.isalnum() or character == "'" for character in text], dtype=bool)
    before = np.concatenate(([False], letters[:-1]))
    kind = np.full(len(text), KINDS.index("punctuation"))
    kind[letters & ~before] = KINDS.index("start of a word")
    kind[letters & before] = KINDS.index("inside a word")
    kind[[character == "\n" for character in text]] = KINDS.index("new line")
    kind[[character.isspace() and character != "\n" for character in text]] = KINDS.index("space")
    for name in re.finditer(r"(?:^|(?<=\n\n))[^\n:]+:(?=\n)", text):
        kind[slice(*name.span())] = KINDS.index("speaker's name")
    return kind


def by_kind(losses: np.ndarray, text: str) -> dict[str, float]:
    """losses (N,) of text[1:] -> the mean loss of each kind that occurs."""
    kind = kinds(text)[1:]
    return {name: float(losses[kind == index].mean()) for index, name in enumerate(KINDS) if (kind == index).any()}


def validation_text(data: dict[str, Any]) -> str | None:
    """The validation split of a run's data settings; None if it is gone, or its tokens are not characters."""
    try:
        module = TextDataModule(**data)
        text = module.tokenizer.decode(np.asarray(module.tokens("val")))
        return text if len(text) == len(module.tokens("val")) else None
    except (UserError, OSError):
        return None
