import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.data.corpora import Corpus
from llmx.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, cached_tokens, tokenizer_from_config
from llmx.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def corpus_of(text: str) -> Corpus:
    return Corpus("test", text, hashlib.sha256(text.encode()).hexdigest(), "a test", requested="test")


@pytest.mark.parametrize("make", [CharacterTokenizer.from_text, lambda text: ByteTokenizer()])
@given(text=st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_text_survives_encoding_and_the_config(make: Callable[[str], Tokenizer], text: str) -> None:
    tokenizer = make(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.max() < tokenizer.vocab_size
    again = tokenizer_from_config(tokenizer.to_config())
    for form in (ids, torch.from_numpy(ids.astype(np.int64)), ids.tolist(), iter(ids.tolist())):
        assert again.decode(form) == text


def test_characters_are_numbered_in_order() -> None:
    assert CharacterTokenizer.from_text("hello").encode("ehlo").tolist() == [0, 1, 2, 3]


def test_large_vocabulary_takes_two_bytes_and_a_huge_one_is_refused() -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + 65536)))
    ids = CharacterTokenizer.from_text(text).encode(text)
    assert ids.dtype == np.uint16
    assert (ids == np.arange(65536)).all()
    with pytest.raises(UserError, match=r"data\.tokenizer: 65537 .*byte tokenizer"):
        CharacterTokenizer.from_text(text + "a")


@pytest.mark.parametrize("unknown", ["A", "b", "d", "\U0001f600", "\n"])  # below, between, above the known ones
def test_unknown_character_is_named_with_its_position(unknown: str) -> None:
    with pytest.raises(UserError) as error:
        CharacterTokenizer("ac").encode(f"aca{unknown}c{unknown}")
    assert repr(unknown) in str(error.value)
    assert "position 3" in str(error.value)


def test_half_a_surrogate_pair_has_no_bytes() -> None:
    with pytest.raises(UserError, match=r"'\\udc80' at position 1"):
        ByteTokenizer().encode("a\udc80")


def test_bytes_that_are_no_character_are_decoded_as_replacements() -> None:
    assert ByteTokenizer().decode([0x61, 0xE9]) == "a\ufffd"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kind": "word"},
        {"kind": "character"},
        {"kind": "character", "vocabulary": ["a"]},
        {"kind": "character", "vocabulary": ""},
        {"kind": "character", "vocabulary": "aa"},
        {"kind": "byte", "vocabulary": "a"},
    ],
)
def test_bad_description_of_a_tokenizer_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        tokenizer_from_config(config)


def test_cache_gives_the_encoded_corpus_read_only_and_from_one_file(cache: Path) -> None:
    tokenizer = CharacterTokenizer("abc")
    for _ in range(2):
        tokens = cached_tokens(corpus_of("abcab"), tokenizer)
        assert tokens.tolist() == [0, 1, 2, 0, 1]
        assert isinstance(tokens, np.memmap)
        assert not tokens.flags.writeable
        assert len(list(cache.iterdir())) == 1


def test_cache_keeps_corpora_and_tokenizers_apart() -> None:
    for text in ("abc", "cba"):
        for tokenizer in (CharacterTokenizer("abc"), CharacterTokenizer("xabc"), ByteTokenizer()):
            for _ in range(2):
                assert (cached_tokens(corpus_of(text), tokenizer) == tokenizer.encode(text)).all()


@pytest.mark.parametrize("damage", ["header", "data", "truncated", "empty"])
def test_damaged_cache_file_is_built_again(damage: str, cache: Path) -> None:
    corpus, tokenizer = corpus_of("abc" * 100), CharacterTokenizer("abc")
    cached_tokens(corpus, tokenizer)
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    damaged = bytearray(intact)
    damaged[5 if damage == "header" else -5] ^= 1
    file.write_bytes({"truncated": intact[:-7], "empty": b""}.get(damage, bytes(damaged)))
    assert (cached_tokens(corpus, tokenizer) == tokenizer.encode(corpus.text)).all()
    assert [path.read_bytes() for path in cache.iterdir()] == [intact]


def test_tokens_stay_in_memory_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "file"))
    tokens = cached_tokens(corpus_of("abcab"), CharacterTokenizer("abc"))
    assert tokens.tolist() == [0, 1, 2, 0, 1]
    assert not tokens.flags.writeable


ROUNDS = 20


def build_caches(cache: str, barrier, results) -> None:  # type: ignore[no-untyped-def]
    os.environ["LLMX_CACHE"] = cache
    tokenizer = ByteTokenizer()
    right = True
    for number in range(ROUNDS):
        corpus = corpus_of(f"{number} " * 20000)
        barrier.wait(60)
        right &= bool((cached_tokens(corpus, tokenizer) == tokenizer.encode(corpus.text)).all())
    results.put(right)


def test_two_processes_build_the_same_cache_at_once(cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=build_caches, args=(str(cache.parent), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert len(list(cache.iterdir())) == ROUNDS  # and no temporary files


def test_a_long_text_is_encoded_piece_by_piece_as_if_at_once(monkeypatch):
    monkeypatch.setattr("llmx.data.tokenizers.PIECE", 7)
    tokenizer = CharacterTokenizer("abcé\U0001f600")
    text = "abcé\U0001f600" * 9
    np.testing.assert_array_equal(tokenizer.encode(text), np.tile(np.arange(5), 9))
    with pytest.raises(UserError, match="'x' at position 45"):
        tokenizer.encode(text + "x")
