"""Corpora larger than memory: a folder of token files, read through memory maps.

The folder has `tokenizer.json`, the result of the tokenizer's `to_config`, and the tokens: *.npy files of uint8 or
uint16, or *.bin files of bare little-endian tokens in the smallest type that holds the vocabulary. In order of their
paths the files are one stream: a window may reach from one file into the next.
"""

import hashlib
import json
import mmap
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llmx.data.tokenizers import Tokenizer, tokenizer_from_config
from llmx.errors import UserError

TOKENIZER = "tokenizer.json"
VALIDATION_TOKENS = 10_000_000  # the default at most: each validation would read a tenth of billions
FAULT_AROUND = 65536  # bytes that the system maps when one is read
MAPPED_BYTES = 64 * 2**20  # beyond, all maps are closed
OPEN_MAPS = 128  # at most, for each keeps a file open
SAMPLED_BYTES = 65536  # of each end of a file, for the digest


@dataclass(frozen=True)
class TokenFile:
    """`length` tokens of type `dtype` from byte `offset` on."""

    path: Path
    dtype: np.dtype
    offset: int
    length: int


class _Maps:
    """The memory maps of some files, opened when needed. Pages count as the process' memory from their reading until
    their map closes, so all maps close from time to time."""

    def __init__(self, files: list[TokenFile], vocab_size: int):
        self.files = files
        self.vocab_size = vocab_size
        self.dtype = np.result_type(*(file.dtype for file in files))
        self.ends = np.cumsum([file.length for file in files])  # in the stream
        self._open: dict[int, np.ndarray] = {}
        self._mapped = 0

    def read(self, index: int, where: np.ndarray | slice) -> np.ndarray:
        """Tokens of a file, by their positions in it. Raises UserError for a token outside the vocabulary."""
        file = self.files[index]
        if index not in self._open:
            if len(self._open) == OPEN_MAPS:
                self._open.clear()
            try:
                with file.path.open("rb") as content:
                    mapped = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
                if sys.platform != "win32":
                    mapped.madvise(mmap.MADV_RANDOM)  # otherwise each window reads 128 KiB
                self._open[index] = np.frombuffer(mapped, file.dtype, file.length, file.offset)
            except (OSError, ValueError) as error:
                raise UserError(f"data.corpus: {file.path} cannot be read any more: {error}") from None
        tokens = np.array(self._open[index][where])
        if tokens.size and tokens.max() >= self.vocab_size:
            known = f"the vocabulary of {TOKENIZER} beside it has {self.vocab_size}"
            raise UserError(f"data.corpus: {file.path} has the token {tokens.max()}, but {known}")
        return tokens

    def count(self, mapped: int) -> None:
        self._mapped += mapped
        if self._mapped > MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A stretch of the stream, (L,), with `len`, slices and `take` as of an array; np.asarray reads it all."""

    _maps: _Maps
    _begin: int
    _end: int

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, part: slice) -> "TokenStream":
        begin, end, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a stretch has no steps")
        return TokenStream(self._maps, self._begin + begin, self._begin + max(begin, end))

    def take(self, positions: np.ndarray, mode: Literal["clip"] = "clip") -> np.ndarray:
        """The tokens at positions (..., T), whose last axis is a window; positions outside are clipped to the ends."""
        positions = np.clip(positions, 0, len(self) - 1) + self._begin
        number = np.searchsorted(self._maps.ends, positions, side="right")  # of the file
        tokens = np.empty(positions.shape, self._maps.dtype)
        for index in np.unique(number):
            here = number == index
            first = self._maps.ends[index] - self._maps.files[index].length
            tokens[here] = self._maps.read(index, positions[here] - first)
        self._maps.count(positions.size // positions.shape[-1] * FAULT_AROUND + tokens.nbytes)
        return tokens

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        tokens = np.empty(len(self), self._maps.dtype)
        for index, end in enumerate(self._maps.ends.tolist()):
            first = end - self._maps.files[index].length
            begin, stop = max(first, self._begin), min(end, self._end)
            if begin < stop:
                part = self._maps.read(index, slice(begin - first, stop - first))
                tokens[begin - self._begin : stop - self._begin] = part
                self._maps.count(part.nbytes)
        return tokens if dtype is None else tokens.astype(dtype)


@dataclass(frozen=True)
class TokenCorpus:
    """A folder of token files. `sha256` covers the tokenizer, and the name, type, length and first and last 64 KiB of
    each file: reading whole files would take minutes."""

    name: str
    tokenizer: Tokenizer
    tokens: TokenStream
    sha256: str
    source: str
    files: tuple[Path, ...]  # with tokens
    substituted = False

    @property
    def requested(self) -> str:
        return self.name

    @property
    def characters(self) -> int:
        """The number of tokens, which are characters or bytes."""
        return len(self.tokens)

    @property
    def split(self) -> list[float]:
        validation = min(0.1, VALIDATION_TOKENS / len(self.tokens))
        return [1 - validation, validation, 0.0]


def is_token_folder(name: str) -> bool:
    return bool(name) and (Path(name).expanduser() / TOKENIZER).is_file()


def open_tokens(name: str) -> TokenCorpus:
    """Opens a folder of token files, in a time that does not depend on their size. Raises UserError if the tokenizer or
    a file cannot be read, a file has another type, or there is no token."""
    folder = Path(name).expanduser()
    try:
        tokenizer = tokenizer_from_config(json.loads((folder / TOKENIZER).read_text("utf-8")))
    except (OSError, ValueError) as error:  # a UserError among them
        raise UserError(f"data.corpus: {folder / TOKENIZER}: {error}") from None
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".bin", ".npy") and path.stat().st_size)
    files = [_opened(path, tokenizer.dtype) for path in paths]
    if not files:
        raise UserError(f"data.corpus: the folder {folder} has no *.bin or *.npy file with tokens in it")
    digest = hashlib.sha256(json.dumps(tokenizer.to_config(), sort_keys=True).encode(errors="surrogatepass"))
    for file in files:
        place = file.path.relative_to(folder).as_posix()
        digest.update(f"\n{place} {file.dtype.itemsize} {file.length}\n".encode(errors="surrogateescape"))
        with file.path.open("rb") as content:
            for start in (file.offset, max(file.offset, file.path.stat().st_size - SAMPLED_BYTES)):
                content.seek(start)
                digest.update(content.read(SAMPLED_BYTES))
    stream = TokenStream(_Maps(files, tokenizer.vocab_size), 0, sum(file.length for file in files))
    source = f"{folder} ({len(files)} files)"
    return TokenCorpus(name, tokenizer, stream, digest.hexdigest(), source, tuple(file.path for file in files))


def _opened(path: Path, dtype: np.dtype) -> TokenFile:
    try:
        if path.suffix == ".bin":
            little = dtype.newbyteorder("<")
            return TokenFile(path, little, 0, len(np.memmap(path, little, "r")))
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus: {path} cannot be read as tokens of type {dtype}: {error}") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.dtype("u1"), np.dtype("<u2")):
        needed = "token files have one axis and the type uint8 or uint16, little-endian"
        raise UserError(f"data.corpus: {path} has shape {tokens.shape} and type {tokens.dtype}, but {needed}")
    return TokenFile(path, tokens.dtype, tokens.offset, len(tokens))


def write_tokens(folder: str | Path, texts: Iterable[str], tokenizer: Tokenizer, file_tokens: int = 2**28) -> None:
    """Encodes a text that comes in pieces, such as the lines of a file, into a folder of token files.

    Creates the folder. Only one piece at a time is in memory. Each file but the last has `file_tokens`. The folder
    keeps the tokenizer's description. Raises UserError if it has token files already, or a piece has no ids.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    taken = UserError(f"{folder} has token files already; give an empty folder")
    if any(folder.rglob("*.bin")) or any(folder.rglob("*.npy")):
        raise taken
    number = left = 0
    try:
        with ExitStack() as opened:
            for text in texts:
                ids = tokenizer.encode(text)
                while len(ids):
                    if not left:
                        opened.close()
                        file = opened.enter_context((folder / f"{number:06}.bin").open("xb"))
                        left, number = file_tokens, number + 1
                    part, ids = ids[:left], ids[left:]
                    file.write(part.astype(part.dtype.newbyteorder("<")).tobytes())
                    left -= len(part)
    except FileExistsError:  # another process writes here at the same time
        raise taken from None
    # last, so that a half-written folder is no corpus
    (folder / TOKENIZER).write_text(json.dumps(tokenizer.to_config()) + "\n", "utf-8")
