"""Text to token ids and back: by character or by byte, and a cache of encoded corpora on disk."""

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmx.data.corpora import Corpus, cache_folder
from llmx.errors import UserError

Ids = Iterable[int] | np.ndarray | torch.Tensor
PIECE = 2**22  # characters to encode at once; each takes 20 bytes meanwhile


class Tokenizer(ABC):
    """Maps text to token ids in [0, vocab_size) and back. `unit` names one token."""

    vocab_size: int
    unit = "character"

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds an id: uint8 or uint16."""
        return np.dtype(np.uint8 if self.vocab_size <= 256 else np.uint16)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Text -> ids, (N,), of type `dtype`. Raises UserError for text that has no ids."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """Ids, (N,) -> text."""

    @abstractmethod
    def to_config(self) -> dict[str, str]:
        """Plain data from which `tokenizer_from_config` rebuilds this tokenizer."""


class CharacterTokenizer(Tokenizer):
    """One id a character. `vocabulary` has the distinct characters in the order of their ids."""

    def __init__(self, vocabulary: str):
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        if not vocabulary:
            raise UserError("data.tokenizer: the vocabulary is empty")
        if len(set(vocabulary)) != self.vocab_size:
            raise UserError("data.tokenizer: a character stands twice in the vocabulary")
        if self.vocab_size > 65536:
            number = f"{self.vocab_size} different characters are more than the 65536 that fit two bytes"
            raise UserError(f"data.tokenizer: {number}; use the byte tokenizer")
        self._codes = _code_points(vocabulary)
        self._ids = np.full(int(self._codes.max()) + 2, -1, np.int32)  # by code point; the last entry stays unknown
        self._ids[self._codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text: str) -> "CharacterTokenizer":
        """The tokenizer whose vocabulary is the sorted distinct characters of a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        ids = np.empty(len(text), self.dtype)
        for start in range(0, len(text), PIECE):
            codes = _code_points(text[start : start + PIECE])
            piece = self._ids[np.minimum(codes, len(self._ids) - 1)]
            unknown = np.flatnonzero(piece < 0)
            if unknown.size:
                at = start + int(unknown[0])
                known = f"the {self.vocab_size} of the tokenizer's vocabulary"
                raise UserError(f"the character {text[at]!r} at position {at} is not among {known}")
            ids[start : start + len(piece)] = piece
        return ids

    def decode(self, ids: Ids) -> str:
        return self._codes[_array(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def to_config(self) -> dict[str, str]:
        return {"kind": "character", "vocabulary": self.vocabulary}


class ByteTokenizer(Tokenizer):
    """One id a byte of the text's UTF-8 form. A character cut in half decodes to U+FFFD."""

    vocab_size = 256
    unit = "byte"

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError as error:
            where = f"the character {text[error.start]!r} at position {error.start}"
            raise UserError(f"{where} is half a surrogate pair and has no bytes in UTF-8") from None

    def decode(self, ids: Ids) -> str:
        return _array(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def to_config(self) -> dict[str, str]:
        return {"kind": "byte"}


def tokenizer_from_config(config: dict[str, Any]) -> Tokenizer:
    """Rebuilds a tokenizer from the result of `to_config`."""
    match config:
        case {"kind": "character", "vocabulary": str(vocabulary), **rest} if not rest:
            return CharacterTokenizer(vocabulary)
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
    known = "write {kind: byte} or {kind: character, vocabulary: ...}"
    raise UserError(f"data.tokenizer: {config!r:.200} describes no tokenizer; {known}")


def cached_tokens(corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """The encoded corpus, (N,), read-only: a memory map of a file in the cache folder, written at first use.

    The file's name holds the digest of its content. A damaged file, or one with anything but ids of this vocabulary, is
    written again. Several processes may build it at once. If the cache folder is unusable, the tokens stay in memory.
    """
    folder = cache_folder() / "tokens"
    name = f"{corpus.sha256}\n{json.dumps(tokenizer.to_config(), sort_keys=True)}"
    key = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    try:
        for path in folder.glob(f"{key}-*.npy"):
            held = _held_tokens(path, key, tokenizer)
            if held is not None:
                return held
        tokens = tokenizer.encode(corpus.text)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = Path(temporary, "tokens.npy")
            np.save(file, tokens)
            path = folder / f"{key}-{_file_digest(file)}.npy"
            os.replace(file, path)
        return np.load(path, mmap_mode="r")
    except OSError:
        tokens = tokenizer.encode(corpus.text)
        tokens.flags.writeable = False
        return tokens


def token_cache() -> list[Path]:
    """The files of all encoded corpora in the cache folder."""
    return list((cache_folder() / "tokens").glob("*.npy"))


def _held_tokens(path: Path, key: str, tokenizer: Tokenizer) -> np.ndarray | None:
    """The tokens of a file in the cache, (N,); None if it is damaged, or no array of such ids."""
    if _file_digest(path) != path.stem.removeprefix(f"{key}-"):
        return None
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # a pickle, or a header that is missing or too long
        return None
    fits = tokens.dtype == tokenizer.dtype and tokens.ndim == 1 and tokens.size > 0
    return tokens if fits and tokens.max() < tokenizer.vocab_size else None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def _array(ids: Ids) -> np.ndarray:
    if isinstance(ids, torch.Tensor):
        return ids.cpu().numpy()
    return ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)
