import hashlib
import io
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llmx.data import corpora
from llmx.data.corpora import load_corpus
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError

TEXT = "First Citizen:\nBefore we proceed\r\n"
SHARED = corpora.CHECKOUT.parent / "shared" / "data"


def publish(monkeypatch: pytest.MonkeyPatch, name: str = "tinyshakespeare", **changes: str) -> None:
    monkeypatch.setitem(corpora.PUBLISHED, name, replace(corpora.PUBLISHED[name], **changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder has a corpus, the pinned checksum is TEXT's, and the server does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMX_DATA_PATH", os.pathsep.join([str(tmp_path / "first"), str(tmp_path / "second")]))
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    publish(monkeypatch, url=f"http://127.0.0.1:{port}/input.txt", sha256=sha256)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, int], None]]:
    """serve(body, promised) makes the download's address answer with `body` and a Content-Length of `promised`."""
    servers = []

    def start(body: bytes, promised: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(promised))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for name in ("tinyshakespeare", "text8", "enwik8"):
            publish(monkeypatch, name, url=f"http://127.0.0.1:{server.server_port}/input.txt")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def place(folder: Path, text: str = TEXT) -> Path:
    path = folder / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode())
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(not (SHARED / "tinyshakespeare").is_dir(), reason="needs the real corpus beside the checkout")
def test_tinyshakespeare_is_the_published_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("LLMX_DATA_PATH", raising=False)
    corpus = load_corpus("tinyshakespeare")
    assert len(corpus.text) == 1_115_394
    assert len(set(corpus.text)) == 65
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert not corpus.substituted


def test_folders_are_searched_in_order_root_then_path_then_cache(tmp_path: Path) -> None:
    for folder in ("cache", "second", "first", "root"):  # each is searched before those already filled
        path = place(tmp_path / folder)
        assert load_corpus("tinyshakespeare", tmp_path / "root").source == str(path)


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = place(tmp_path / "root")
    corpus = load_corpus("tinyshakespeare", tmp_path / "root")
    assert corpus.text == TEXT
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_wrong_checksum_of_a_found_file_names_both_sums_and_is_not_substituted(tmp_path: Path) -> None:
    path = place(tmp_path / "root", "something else")
    with pytest.raises(UserError) as error:
        load_corpus("tinyshakespeare", tmp_path / "root", offline_corpus="stdlib")
    for part in (
        "data.corpus",
        str(path),
        hashlib.sha256(b"something else").hexdigest(),
        corpora.PUBLISHED["tinyshakespeare"].sha256,
    ):
        assert part in str(error.value)


def test_download_goes_to_the_cache_and_is_found_there(
    tmp_path: Path, serve: Callable[[bytes, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(TEXT.encode(), len(TEXT))
    assert load_corpus("tinyshakespeare", tmp_path / "root").text == TEXT
    publish(monkeypatch, url="http://127.0.0.1:1/gone")
    assert load_corpus("tinyshakespeare", tmp_path / "root").source == str(
        tmp_path / "cache" / "tinyshakespeare" / "input.txt"
    )


def test_wrong_checksum_of_a_download_names_both_sums_and_leaves_nothing(
    tmp_path: Path, serve: Callable[[bytes, int], None]
) -> None:
    serve(b"<html>log in first</html>", 25)
    with pytest.raises(UserError) as error:
        load_corpus("tinyshakespeare", tmp_path / "root", offline_corpus="stdlib")
    served = hashlib.sha256(b"<html>log in first</html>").hexdigest()
    for part in ("data.corpus", "input.txt", served, corpora.PUBLISHED["tinyshakespeare"].sha256):
        assert part in str(error.value)
    assert files_below(tmp_path) == []


def test_interrupted_download_leaves_nothing(tmp_path: Path, serve: Callable[[bytes, int], None]) -> None:
    serve(TEXT.encode()[:10], len(TEXT))
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_corpus("tinyshakespeare", tmp_path / "root")
    assert files_below(tmp_path) == []


def test_unreachable_corpus_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_corpus("tinyshakespeare", tmp_path / "root")
    message = str(error.value)
    folders = [str(tmp_path / folder) for folder in ("root", "first", "second", "cache")]
    place_it = str(tmp_path / "root" / "tinyshakespeare" / "input.txt")
    for part in ("data.corpus", *folders, place_it, corpora.PUBLISHED["tinyshakespeare"].url, "--data.corpus stdlib"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["text8", "enwik8"])
def test_zipped_corpus_is_downloaded_unpacked_and_found_again(
    name: str, tmp_path: Path, serve: Callable[[bytes, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, TEXT)
    body = zipped.getvalue()
    serve(body, len(body))
    publish(monkeypatch, name, sha256=hashlib.sha256(TEXT.encode()).hexdigest())
    with pytest.raises(UserError, match=r"is not the published file"):
        load_corpus(name, tmp_path / "root")
    publish(monkeypatch, name, archive=hashlib.sha256(body).hexdigest())
    assert load_corpus(name, tmp_path / "root").source == corpora.PUBLISHED[name].url
    assert files_below(tmp_path) == [f"cache/{name}/input.txt"]
    assert load_corpus(name, tmp_path / "root").source == str(tmp_path / "cache" / name / "input.txt")
    publish(monkeypatch, name, sha256="0")
    with pytest.raises(UserError, match=rf"is not the published {name}: its sha256"):
        load_corpus(name, tmp_path / "root")


@pytest.mark.parametrize(("name", "vocabulary"), [("text8", 27), ("enwik8", 256)])
def test_hundred_million_bytes_are_split_into_90_5_and_5(
    name: str, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " abcdefghijklmnopqrstuvwxyz" if name == "text8" else "<p>\n\u00e9\U00010330" + 18 * "x"  # 27 and 28 bytes
    size = len(text.encode())
    path = tmp_path / "root" / name / "input.txt"
    path.parent.mkdir(parents=True)
    data = (text.encode() * (100_000 // size + 1))[: 100_000 // size * size]
    data += b" " * (100_000 - len(data))
    path.write_bytes(data)
    publish(monkeypatch, name, sha256=hashlib.sha256(data).hexdigest())
    module = TextDataModule(name, root=str(tmp_path / "root"))
    assert [len(module.tokens(split)) for split in ("train", "val", "test")] == [90_000, 5_000, 5_000]
    assert module.tokenizer.vocab_size == vocabulary
    fractions = corpora.PUBLISHED[name].split
    ends = [int(sum(fractions[:parts]) * 100_000_000) for parts in (1, 2)]
    assert ends == [90_000_000, 95_000_000]


def test_offline_corpus_stands_in_for_an_unreachable_one(tmp_path: Path) -> None:
    corpus = load_corpus("tinyshakespeare", tmp_path / "root", offline_corpus="stdlib")
    assert corpus.substituted
    assert (corpus.name, corpus.requested) == ("stdlib", "tinyshakespeare")
    assert corpus.text == load_corpus("stdlib").text


def test_offline_corpus_does_not_stand_in_for_a_typing_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpus: 'tinyshakespear'.*did you mean tinyshakespeare\?"):
        load_corpus("tinyshakespear", tmp_path, offline_corpus="stdlib")


def test_unknown_offline_corpus_is_named_by_its_own_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.offline_corpus: 'stdlibb'.*did you mean stdlib\?"):
        load_corpus("tinyshakespeare", tmp_path, offline_corpus="stdlibb")


def test_stdlib_is_about_a_megabyte_of_ascii_and_always_the_same() -> None:
    corpus = load_corpus("stdlib")
    assert 0.7e6 < len(corpus.text) < 1.5e6  # it varies with the version of Python
    assert corpus.text.isascii()
    assert load_corpus("stdlib") == corpus
    assert not corpus.substituted


def test_folder_joins_its_text_files_in_order_of_path(tmp_path: Path) -> None:
    for name, text in {"b.txt": "2", "a/z.txt": "1", "c.txt": "3", "a.md": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_corpus(str(tmp_path)).text == "123"


def test_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    for name in (path, tmp_path):
        with pytest.raises(UserError, match=r"data\.corpus: .*latin\.txt is not UTF-8.*offset 3 is 0xe9"):
            load_corpus(str(name))


@pytest.mark.parametrize("name", ["empty.txt", "folder", ""])
def test_corpus_without_text_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data\.corpus.*{name}"):
        load_corpus(name)
