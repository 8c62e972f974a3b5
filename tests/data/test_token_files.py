import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmx.data import token_files
from llmx.data.datamodule import TextDataModule
from llmx.data.token_files import is_token_folder, open_tokens, write_tokens
from llmx.data.tokenizers import ByteTokenizer, CharacterTokenizer
from llmx.data.windows import EpochWindows, KeyedEpochWindows
from llmx.errors import UserError

ROOT = Path(__file__).parents[2]
LARGE = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))  # a vocabulary whose ids take two bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokens 0, 1, ..., 999 in files of three kinds, so that a token tells its position."""
    tokens = np.arange(1000, dtype="<u2")
    (tmp_path / "tokenizer.json").write_text(json.dumps(CharacterTokenizer(LARGE).to_config()))
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", tokens[:200].astype(np.uint8))
    tokens[200:203].tofile(tmp_path / "b.bin")
    (tmp_path / "c.bin").touch()
    np.save(tmp_path / "d.npy", tokens[203:])
    return tmp_path


def test_files_are_one_stream_in_order_of_their_paths(folder: Path) -> None:
    corpus = open_tokens(str(folder))
    assert np.asarray(corpus.tokens).tolist() == list(range(1000))
    assert torch.from_numpy(np.array(corpus.tokens[:8])).tolist() == list(range(8))
    assert np.asarray(corpus.tokens[150:260][30:], np.int64).tolist() == list(range(180, 260))
    assert (corpus.characters, corpus.source) == (1000, f"{folder} (3 files)")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    part=st.tuples(st.integers(0, 20), st.integers(1, 20)),
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=9),
)
def test_take_is_that_of_the_joined_array(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], part: tuple[int, int], starts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "tokenizer.json").write_text('{"kind": "byte"}')
    joined = np.random.default_rng(0).integers(256, size=sum(lengths)).astype(np.uint8)
    for index, piece in enumerate(np.split(joined, np.cumsum(lengths)[:-1])):
        piece.tofile(folder / f"{index}.bin")
    begin = min(part[0], len(joined) - 1)
    stretch = slice(begin, begin + part[1])
    positions = np.array(starts)[:, None] + np.arange(5)
    taken = open_tokens(str(folder)).tokens[stretch].take(positions, mode="clip")
    assert taken.tolist() == joined[stretch].take(positions, mode="clip").tolist()


def test_training_and_evaluation_read_over_the_borders_of_files(folder: Path) -> None:
    data = TextDataModule(str(folder), window=8, batch_size=64, split=[0.5, 0.5, 0.0])
    starts = []
    for batch in data.train_dataloader():
        rows = (batch.targets >= 0).any(1)  # the others are padding
        starts += batch.inputs[rows, 0].tolist()
        assert (batch.inputs[rows] == batch.inputs[rows, :1] + torch.arange(8)).all()
        assert (batch.targets[rows] == batch.inputs[rows] + 1).all()
    assert sorted(starts) == list(range(492))
    targets = [target for batch in data.val_dataloader() for target in batch.targets[batch.targets >= 0].tolist()]
    assert targets == list(range(501, 1000))


def test_maps_are_closed_once_much_was_read_or_many_are_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "OPEN_MAPS", 1)
    tokens = open_tokens(str(folder)).tokens
    assert tokens.take(np.arange(1000)[None]).tolist() == [list(range(1000))]
    assert len(tokens._maps._open) == 1
    monkeypatch.setattr(token_files, "MAPPED_BYTES", 1000)
    assert tokens.take(np.arange(3)[None]).tolist() == [[0, 1, 2]]
    assert len(tokens._maps._open) == 0


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("\n aeé"), CharacterTokenizer(LARGE + "\n")])
def test_what_is_written_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    text = "a\n éé\n" if len(getattr(tokenizer, "vocabulary", "")) < 10 else LARGE + "\n"
    write_tokens(tmp_path / "tokens", text.splitlines(keepends=True), tokenizer, file_tokens=4)
    data = TextDataModule(str(tmp_path / "tokens"))
    assert data.tokenizer.to_config() == tokenizer.to_config()
    assert data.tokenizer.decode(np.asarray(data.source.tokens)) == text  # type: ignore[union-attr]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "tokens").glob("*.bin"))]
    assert set(sizes[:-1]) == {4 * tokenizer.dtype.itemsize}
    with pytest.raises(UserError, match="has token files already"):
        write_tokens(tmp_path / "tokens", ["a"], tokenizer)


def test_a_folder_half_written_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'b' at position 1"):
        write_tokens(tmp_path / "tokens", ["aa", "ab"], CharacterTokenizer("a"))
    assert not is_token_folder(str(tmp_path / "tokens"))


def test_protocol_and_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TextDataModule(str(folder), window=8)
    protocol = data.protocol
    assert protocol["corpus"] == protocol["requested"] == str(folder)
    assert (protocol["characters"], protocol["vocab_size"], protocol["split"]) == (1000, 1000, [0.9, 0.1, 0.0])
    monkeypatch.setattr(token_files, "VALIDATION_TOKENS", 20)
    data = TextDataModule(str(folder), window=8)
    assert [len(data.tokens(split)) for split in ("train", "val", "test")] == [980, 20, 0]
    before = protocol["sha256"]
    assert before == data.protocol["sha256"]
    np.array([7], "<u2").tofile(folder / "b.bin")
    assert open_tokens(str(folder)).sha256 != before


def test_another_tokenizer_is_refused_and_its_own_is_not(folder: Path) -> None:
    own = CharacterTokenizer(LARGE).to_config()
    for tokenizer in (None, own, "character"):
        TextDataModule(str(folder), tokenizer=tokenizer).prepare()
    for tokenizer in ("byte", {"kind": "byte"}):
        with pytest.raises(UserError, match=r"data\.tokenizer is not the one"):
            TextDataModule(str(folder), tokenizer=tokenizer).prepare()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json: "),
        ("tokenizer.json", b'{"kind": "word"}', r"tokenizer\.json: .*describes no tokenizer"),
        ("b.bin", b"odd", r"b\.bin cannot be read as tokens of type uint16"),
        ("d.npy", b"no array", r"d\.npy cannot be read"),
    ],
)
def test_bad_files_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.corpus: .*{message}"):
        open_tokens(str(folder))


def test_other_shapes_and_types_are_refused_and_so_is_a_folder_without_tokens(folder: Path) -> None:
    for array in (np.zeros((2, 2), np.uint8), np.zeros(4)):
        np.save(folder / "d.npy", array)
        with pytest.raises(UserError, match=r"d\.npy has shape .* and type"):
            open_tokens(str(folder))
    for name in ("a/1.npy", "b.bin", "c.bin", "d.npy"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no \*\.bin or \*\.npy file"):
        open_tokens(str(folder))


def test_token_outside_the_vocabulary_and_a_file_that_shrank_are_named(folder: Path) -> None:
    tokens = open_tokens(str(folder)).tokens
    np.array([1000, 1000, 1000], "<u2").tofile(folder / "b.bin")
    with pytest.raises(UserError, match=r"b\.bin has the token 1000, but the vocabulary .* has 1000"):
        tokens.take(np.arange(150, 250)[None])
    (folder / "d.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"d\.npy cannot be read any more"):
        tokens.take(np.arange(300, 400)[None])


def test_order_is_computed_where_it_would_not_be_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(TextDataModule(str(folder), window=8).sampler, EpochWindows)
    monkeypatch.setattr(EpochWindows, "most", 100)
    data = TextDataModule(str(folder), window=8)
    assert isinstance(data.sampler, KeyedEpochWindows)
    starts = [start for step in range(data.steps_per_epoch) for start in data.sampler.starts(step).tolist()]
    assert sorted(starts) == list(range(892))


FIT = """
import sys, time
from functools import partial
from lightning.pytorch import Trainer
from llmx import Decoder, LanguageModel, TextDataModule
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.runs.memory import peak_bytes

started = time.perf_counter()
data = TextDataModule(corpus=sys.argv[1], window=8)
data.prepare()
next(iter(data.train_dataloader()))
ready = time.perf_counter() - started
block = partial(PreNormBlock, mixer=partial(Attention, heads=2), feed_forward=SwiGLU)
model = LanguageModel(
    partial(Decoder, dim=8, depth=1, block=block), tokenizer=data.tokenizer, window=8, audit="off", compile=False
)
Trainer(
    max_steps=40, val_check_interval=40, check_val_every_n_epoch=None, limit_val_batches=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
).fit(model, datamodule=data)
many = TextDataModule(corpus=sys.argv[1], window=8, batch_size=4096)
for batch, _ in zip(many.train_dataloader(), range(80)):  # 330,000 windows, each on pages of its own
    pass
print(len(data.tokens("train")) + len(data.tokens("val")), ready, peak_bytes())
"""


def test_training_on_twenty_gigabytes_takes_one_of_memory_and_starts_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(CharacterTokenizer(LARGE).to_config()))
    for number in range(10):  # sparse: they take no room on the disk
        (folder / f"{number}.bin").touch()
        os.truncate(folder / f"{number}.bin", 2 * 10**9)
    result = subprocess.run(
        [sys.executable, "-c", FIT, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    tokens, ready, peak = map(float, result.stdout.split("\n")[-2].split())
    assert tokens == 10**10
    assert ready < 20  # seconds; a tenth of one on an idle machine, where a permutation would take minutes
    assert peak < 1e9  # bytes, of which libraries take half; the pages of all windows read are 1.3e9


def test_of_two_processes_that_write_into_one_folder_the_second_stops(tmp_path: Path) -> None:
    """The other one writes it all between this one's look at the folder and its first file."""

    def pieces() -> Iterator[str]:
        write_tokens(tmp_path, ["first"], ByteTokenizer())
        yield "second, which is longer"

    with pytest.raises(UserError, match="has token files already"):
        write_tokens(tmp_path, pieces(), ByteTokenizer())
    assert np.asarray(open_tokens(str(tmp_path)).tokens).tobytes() == b"first"
