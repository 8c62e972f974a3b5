"""Loads text: a named corpus, a local file, or a folder of text files.

A named corpus comes from the project's data folder, else from the folders of LLMX_DATA_PATH, else from the user's cache
folder. If none has it, it is downloaded into the cache folder. Its checksum is pinned.
"""

import difflib
import hashlib
import os
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pooch

from llmx.errors import UserError

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds
SPLIT = (0.9, 0.1, 0.0)  # of a corpus without a split of its own

CHECKOUT = Path(__file__).resolve().parents[2]
STDLIB_MODULES = (  # plain ASCII, in Python since 3.11: about 1 MB
    *("argparse", "ast", "codecs", "configparser", "contextlib", "csv", "dataclasses", "difflib", "enum", "gettext"),
    *("ipaddress", "mimetypes", "os", "pickle", "plistlib", "pprint", "shutil", "socket", "subprocess", "textwrap"),
    *("threading", "traceback"),
)


@dataclass(frozen=True)
class Published:
    """A text to download."""

    url: str  # of the text itself, or of a zip file, if `archive` has the file's SHA-256
    sha256: str  # of the text
    archive: str | None = None  # the text is the zip file's member of the corpus' name
    tokenizer: Literal["character", "byte"] = "character"
    split: tuple[float, float, float] = SPLIT


# text8 and enwik8 (mattmahoney.net/dc/textdata.html) have 100,000,000 bytes each, by convention cut into 90, 5 and 5
# millions: Mikolov et al., "Subword language modeling with neural networks", 2012; Chung et al., arXiv 1502.02367
PUBLISHED = {
    "tinyshakespeare": Published(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "text8": Published(
        "https://mattmahoney.net/dc/text8.zip",
        "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
        archive="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        split=(0.9, 0.05, 0.05),
    ),
    "enwik8": Published(
        "https://mattmahoney.net/dc/enwik8.zip",
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        archive="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        tokenizer="byte",
        split=(0.9, 0.05, 0.05),
    ),
}
NAMED = (*PUBLISHED, "stdlib")


@dataclass(frozen=True)
class Corpus:
    """A text and its source; `requested` is the corpus that the user named. `tokenizer`, `split`: its defaults.
    `files`: all that hold the text, copies in other data folders among them."""

    name: str
    text: str
    sha256: str
    source: str
    requested: str
    tokenizer: Literal["character", "byte"] = "character"
    split: tuple[float, float, float] = SPLIT
    files: tuple[Path, ...] = ()

    @property
    def characters(self) -> int:
        return len(self.text)

    @property
    def substituted(self) -> bool:
        """Whether this is the offline stand-in for the requested corpus."""
        return self.name != self.requested


class Unreachable(UserError):
    """A named corpus is neither on disk nor downloadable."""


def cache_folder() -> Path:
    """The user's folder for downloads and encoded corpora: LLMX_CACHE, or the system's cache folder."""
    return Path(os.environ.get("LLMX_CACHE") or pooch.os_cache("llmx"))


def load_corpus(name: str, root: str | Path = "data", offline_corpus: str | None = None) -> Corpus:
    """Loads `tinyshakespeare`, `text8`, `enwik8`, `stdlib`, a text file, or a folder whose *.txt files are joined in
    order of their path.

    `root`, the project's data folder, is the first place to look for a named corpus. `offline_corpus` stands in for one
    that is neither on disk nor downloadable. Raises UserError if the corpus does not exist, cannot be had, is empty, is
    not UTF-8 or has a wrong checksum.
    """
    try:
        return _load(name, Path(root), "data.corpus")
    except Unreachable:
        if offline_corpus is None:
            raise
    return replace(_load(offline_corpus, Path(root), "data.offline_corpus"), requested=name)


def _load(name: str, root: Path, key: str) -> Corpus:
    if name in PUBLISHED:
        return _published(name, PUBLISHED[name], root)
    text, source, files = _stdlib() if name == "stdlib" else _local(name, key)
    if not text:
        raise UserError(f"{key}: {source} is empty; a corpus needs text")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, text, digest, source, requested=name, files=tuple(files))


def _read(path: Path, key: str) -> str:
    """The text, without any translation of newlines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = f"the byte at offset {error.start} is 0x{data[error.start]:02x}"
        raise UserError(f"{key}: {path} is not UTF-8 text: {place}; convert the file to UTF-8") from None


def _local(name: str, key: str) -> tuple[str, str, list[Path]]:
    path = Path(name).expanduser()
    if os.path.isfile(path):
        return _read(path, key), str(path), [path]
    if not name or not os.path.isdir(path):
        near = difflib.get_close_matches(name.lower(), NAMED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"named corpora are {', '.join(NAMED)}"
        raise UserError(f"{key}: {name!r} is no named corpus, file or folder; {hint}")
    files = sorted((file for file in path.rglob("*.txt") if file.is_file()), key=lambda f: f.relative_to(path).parts)
    if not files:
        raise UserError(f"{key}: the folder {path} has no *.txt file in it")
    return "".join(_read(file, key) for file in files), f"{path} ({len(files)} files)", files


def _stdlib() -> tuple[str, str, list[Path]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in STDLIB_MODULES]
    texts = [_read(file, "data.corpus") for file in files if file.is_file()]
    return "".join(text for text in texts if text.isascii()), f"Python's standard library in {folder}", files


def _published(name: str, published: Published, root: Path) -> Corpus:
    file = Path(name, "input.txt")
    shared = os.environ.get("LLMX_DATA_PATH") or str(CHECKOUT.parent / "shared" / "data")
    folders = [root, *(Path(folder) for folder in shared.split(os.pathsep) if folder), cache_folder()]
    found = next((folder / file for folder in folders if (folder / file).is_file()), None)
    path = found or folders[-1] / file
    if found is None:
        _download(name, published, path, folders)
    text = _read(path, "data.corpus")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != published.sha256:
        raise UserError(
            f"data.corpus: {path} is not the published {name}: its sha256 is {digest} instead of "
            f"{published.sha256}; delete or replace the file, or pass the path itself as data.corpus"
        )
    source = published.url if found is None else str(path)
    files = tuple(folder / file for folder in folders if (folder / file).is_file())
    return Corpus(name, text, digest, source, name, published.tokenizer, published.split, files)


def _download(name: str, published: Published, path: Path, folders: list[Path]) -> None:
    """Downloads a published corpus to `path`. The file appears only when it is complete."""
    served = path if published.archive is None else path.with_suffix(".zip")
    try:
        # pooch writes to a temporary file beside `served` and renames it once the checksum is right
        pooch.retrieve(
            published.url,
            known_hash=f"sha256:{published.archive or published.sha256}",
            fname=served.name,
            path=served.parent,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)),
        )
    except OSError as error:  # requests' errors are OSErrors too
        file = Path(name, path.name)
        raise Unreachable(
            f"data.corpus: {name} is in none of {', '.join(map(str, folders))}, and cannot be downloaded "
            f"({type(error).__name__}: {error}). Place the file by hand as {folders[0] / file} "
            f"(from {published.url}{', unpacked' if published.archive else ''}), name a folder that has {file} in "
            "LLMX_DATA_PATH, or use a corpus that needs no network: --data.corpus stdlib"
        ) from None
    except ValueError as error:  # pooch's message has both checksums
        where = f"the download of {published.url} for {path}"
        raise UserError(f"data.corpus: {where} is not the published file: {error}") from None
    if published.archive is not None:
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary, zipfile.ZipFile(served) as archive:
            os.replace(archive.extract(name, temporary), path)
        served.unlink(missing_ok=True)
