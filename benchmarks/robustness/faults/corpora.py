"""Faults of the text: a damaged corpus or cache, two processes that write at once, a download that breaks."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import numpy as np

from benchmarks.robustness.faults.checkpoints import damaged
from benchmarks.robustness.faults.laboratory import FaultLaboratory, failure, wrong_refusal
from llmx.data import corpora
from llmx.data.datamodule import TextDataModule
from llmx.data.token_files import open_tokens, write_tokens
from llmx.data.tokenizers import ByteTokenizer
from llmx.errors import UserError
from testbed.forked import ForkedProcess
from testbed.tiny import TEXT


def damaged_corpus(lab: FaultLaboratory, random: Random) -> str:
    """A named corpus with a changed byte, or cut: one message with the file's name."""
    file = lab.folder / "data/tinyshakespeare/input.txt"
    file.parent.mkdir(parents=True)
    content = bytearray(TEXT.encode())
    at = random.randrange(len(content))
    file.write_bytes(random.choice([content[:at], content[:at] + b"~" + content[at + 1 :], content + b"\n"]))
    publish = partial(_publish, "http://127.0.0.1:9/")
    processes = lab.fit("plain", "--data.corpus", "tinyshakespeare", before=publish)
    return wrong_refusal(processes, str(file.name), "sha256")


def damaged_cache(lab: FaultLaboratory, random: Random) -> str:
    """An encoded corpus with a changed byte, or cut: it is encoded again, and the run is the same."""
    cache = lab.folder / "cache/tokens"
    process = ForkedProcess(lab.folder, call=_encode, environment={"LLMX_CACHE": str(cache.parent)})
    if lost := failure([process]):
        return lost
    (held,) = cache.glob("*.npy")
    held.write_bytes(damaged(held.read_bytes(), random.choice(["cut", "flipped", "empty", "foreign"]), random))
    return failure(lab.fit("plain")) or lab.loss_against_reference("plain")


def _encode() -> int:
    TextDataModule("corpus.txt").tokens("train")
    return 0


def cache_written_by_two(lab: FaultLaboratory, random: Random) -> str:
    """Two processes encode a corpus at once, and one is killed. The others have the right tokens."""
    text = "".join(random.choices("abcdefgh \n", k=2_000_000))
    (lab.folder / "large.txt").write_text(text)
    expected = hashlib.sha256(np.frombuffer(text.encode(), np.uint8).tobytes()).hexdigest()

    def encode() -> int:
        data = TextDataModule("large.txt", tokenizer="byte", split=[1.0, 0.0, 0.0])
        digest = hashlib.sha256(np.asarray(data.tokens("train")).tobytes()).hexdigest()
        return int(digest != expected)

    environment = {"LLMX_CACHE": str(lab.folder / "cache")}
    first, second = (ForkedProcess(lab.folder, call=encode, environment=environment) for _ in range(2))
    time.sleep(random.uniform(0, 0.1))
    first.kill()
    return failure([second]) or failure([ForkedProcess(lab.folder, call=encode, environment=environment)])


def token_files_written_by_two(lab: FaultLaboratory, random: Random) -> str:
    """Two processes write a folder of token files at once, and one is killed. It is complete, or refused."""
    text = "".join(random.choices("abcdefgh \n", k=400_000))
    place = lab.folder / "tokens"
    pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]

    def write() -> int:
        try:
            write_tokens(place, pieces, ByteTokenizer(), file_tokens=50_000)
        except UserError:
            return 2
        return 0

    first, second = (ForkedProcess(lab.folder, call=write) for _ in range(2))
    time.sleep(random.uniform(0, 0.05))
    first.kill()
    if second.wait() is None:
        return "hangs"
    if (place / "tokenizer.json").exists():
        held = np.asarray(open_tokens(str(place)).tokens)
        return "" if held.tobytes() == text.encode() else "a corpus that is not the text"
    lost = wrong_refusal(lab.fit("plain", "--data.corpus", "tokens"), "tokens") if place.exists() else ""
    shutil.rmtree(place, ignore_errors=True)
    return lost or ("" if write() == 0 else "cannot be written again")


class Slow(http.server.BaseHTTPRequestHandler):
    """Serves the corpus in pieces. The fault "cut" stops half-way, "changed" alters the text."""

    fault = ""

    def do_GET(self) -> None:
        content = TEXT.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for at in range(0, len(content), 500):
            if self.fault == "cut" and at > len(content) // 2:
                return
            piece = content[at : at + 500]
            self.wfile.write(piece.upper() if self.fault == "changed" and at else piece)
            time.sleep(0.02)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(server: http.server.HTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def _publish(url: str) -> None:
    """Makes tinyshakespeare a small text at a URL."""
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    corpora.PUBLISHED["tinyshakespeare"] = corpora.Published(url, digest)
    os.environ["LLMX_DATA_PATH"] = "nowhere"


def broken_download(lab: FaultLaboratory, random: Random) -> str:
    """A download is killed, cut off or changed. No file appears, and the next download works."""
    fault = random.choice(["killed", "cut", "changed"])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (Slow,), {"fault": fault}))
    publish = partial(_publish, f"http://127.0.0.1:{server.server_port}/")

    def load() -> int:
        return int(corpora.load_corpus("tinyshakespeare").text != TEXT)

    environment = {"LLMX_CACHE": str(lab.folder / "cache")}
    start: Callable[[], ForkedProcess] = partial(
        ForkedProcess, lab.folder, call=load, environment=environment, before=publish
    )
    # a process forks before the server's threads start; the server answers once they run
    corpus = ("--data.corpus", "tinyshakespeare")
    processes = [start()] if fault == "killed" else lab.fit("plain", *corpus, before=publish)
    with serving(server):
        if fault == "killed":
            time.sleep(random.uniform(0.05, 0.4))
            processes[0].kill()
        elif lost := wrong_refusal(processes, "downloaded" if fault == "cut" else "download"):
            return lost
        if (file := lab.folder / "cache/tinyshakespeare/input.txt").exists() and file.read_text() != TEXT:
            return "a file that is not the corpus"
    server.RequestHandlerClass = Slow
    after = start()
    with server, serving(server):
        return failure([after])
