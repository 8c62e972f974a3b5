"""Where the text comes from: a named corpus, a local file, or a folder of text files.

A named corpus is looked for in the data folder of the project, then in the folders of LLMX_DATA_PATH, then in the
user's cache folder; found nowhere, it is downloaded into the cache folder. Its checksum is pinned.
"""

import difflib
import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pooch

from llmx.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSHAKESPEARE_FILE = Path("tinyshakespeare", "input.txt")
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds

CHECKOUT = Path(__file__).resolve().parents[2]
STDLIB_MODULES = (  # plain ASCII, and there since Python 3.11: about 1 MB
    *("argparse", "ast", "codecs", "configparser", "contextlib", "csv", "dataclasses", "difflib", "enum", "gettext"),
    *("ipaddress", "mimetypes", "os", "pickle", "plistlib", "pprint", "shutil", "socket", "subprocess", "textwrap"),
    *("threading", "traceback"),
)


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from; `requested` is the corpus that was asked for."""

    name: str
    text: str
    sha256: str
    source: str
    requested: str

    @property
    def substituted(self) -> bool:
        """Whether this is the offline stand-in of the corpus that was asked for."""
        return self.name != self.requested


class Unreachable(UserError):
    """A named corpus is on no disk and cannot be downloaded."""


def cache_folder() -> Path:
    """The user's folder for downloads and encoded corpora: LLMX_CACHE, or the system's place for caches."""
    return Path(os.environ.get("LLMX_CACHE") or pooch.os_cache("llmx"))


def load_corpus(name: str, root: str | Path = "data", offline_corpus: str | None = None) -> Corpus:
    """Loads a corpus.

    Args:
        name: `tinyshakespeare`, `stdlib`, a text file, or a folder whose *.txt files are joined in order of their path.
        root: The project's data folder, the first place where a named corpus is looked for.
        offline_corpus: Stands in for a named corpus that is on no disk and cannot be downloaded.

    Raises:
        UserError: There is no such corpus, it cannot be had, is empty, is not UTF-8 or has a wrong checksum.
    """
    try:
        return _load(name, Path(root), "data.corpus")
    except Unreachable:
        if offline_corpus is None:
            raise
    return replace(_load(offline_corpus, Path(root), "data.offline_corpus"), requested=name)


def _load(name: str, root: Path, key: str) -> Corpus:
    text, source = NAMED[name](root) if name in NAMED else _local(name, key)
    if not text:
        raise UserError(f"{key}: {source} is empty; a corpus needs text")
    return Corpus(name, text, hashlib.sha256(text.encode()).hexdigest(), source, requested=name)


def _read(path: Path, key: str) -> str:
    """The text as it is: no newline is translated."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path} is not UTF-8 text: the byte at offset {error.start} is 0x{data[error.start]:02x}; "
            "convert the file to UTF-8"
        ) from None


def _local(name: str, key: str) -> tuple[str, str]:
    path = Path(name).expanduser()
    if os.path.isfile(path):
        return _read(path, key), str(path)
    if not name or not os.path.isdir(path):
        near = difflib.get_close_matches(name.lower(), NAMED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"named corpora are {', '.join(NAMED)}"
        raise UserError(f"{key}: {name!r} is no named corpus, no file and no folder; {hint}")
    files = sorted((file for file in path.rglob("*.txt") if file.is_file()), key=lambda f: f.relative_to(path).parts)
    if not files:
        raise UserError(f"{key}: the folder {path} has no *.txt file in it")
    return "".join(_read(file, key) for file in files), f"{path} ({len(files)} files)"


def _stdlib(root: Path) -> tuple[str, str]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in STDLIB_MODULES]
    texts = [_read(file, "data.corpus") for file in files if file.is_file()]
    return "".join(text for text in texts if text.isascii()), f"Python's standard library in {folder}"


def _tinyshakespeare(root: Path) -> tuple[str, str]:
    shared = os.environ.get("LLMX_DATA_PATH") or str(CHECKOUT.parent / "shared" / "data")
    cache = cache_folder()
    folders = [root, *(Path(folder) for folder in shared.split(os.pathsep) if folder), cache]
    for folder in folders:
        path = folder / TINYSHAKESPEARE_FILE
        if path.is_file():
            text = _read(path, "data.corpus")
            found = hashlib.sha256(text.encode()).hexdigest()
            if found != TINYSHAKESPEARE_SHA256:
                raise UserError(
                    f"data.corpus: {path} is not the published tinyshakespeare: its sha256 is {found} instead of "
                    f"{TINYSHAKESPEARE_SHA256}; delete or replace the file, or pass the path itself as data.corpus"
                )
            return text, str(path)
    path = cache / TINYSHAKESPEARE_FILE
    try:
        # pooch writes to a temporary file beside `path` and renames it once the checksum is right
        pooch.retrieve(
            TINYSHAKESPEARE_URL,
            known_hash=f"sha256:{TINYSHAKESPEARE_SHA256}",
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)),
        )
    except OSError as error:  # what requests raises is an OSError too
        raise Unreachable(
            f"data.corpus: tinyshakespeare is in none of {', '.join(str(folder) for folder in folders)}, and cannot "
            f"be downloaded ({type(error).__name__}: {error}). Place the file by hand as {root / TINYSHAKESPEARE_FILE} "
            f"(from {TINYSHAKESPEARE_URL}), name a folder that has {TINYSHAKESPEARE_FILE} in LLMX_DATA_PATH, or use "
            "a corpus that needs no network: --data.corpus stdlib"
        ) from None
    except ValueError as error:  # pooch's message has both sums
        raise UserError(
            f"data.corpus: the download of {TINYSHAKESPEARE_URL} for {path} is not the published file: {error}"
        ) from None
    return _read(path, "data.corpus"), TINYSHAKESPEARE_URL


NAMED: dict[str, Callable[[Path], tuple[str, str]]] = {"tinyshakespeare": _tinyshakespeare, "stdlib": _stdlib}
