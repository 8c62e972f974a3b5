import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.data import repeated
from llmx.data.repeated import repeated_share
from llmx.data.token_files import TokenStream, open_tokens

RANDOM = np.random.default_rng(1).integers(100, size=4000).astype(np.uint8)


def reference(split: np.ndarray, within: np.ndarray) -> float:
    """The same by its definition."""
    length = repeated.STRETCH
    known = {tuple(within[i : i + length]) for i in range(len(within) - length + 1)}
    stretches = [range(i, i + length) for i in range(len(split) - length + 1) if tuple(split[i : i + length]) in known]
    return len(set().union(*stretches)) / len(split) if len(split) else 0.0


def in_files(folder: Path, tokens: np.ndarray, most: int) -> TokenStream:
    """The same tokens in files of at most `most`."""
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    for index, begin in enumerate(range(0, len(tokens), most)):
        tokens[begin : begin + most].tofile(folder / f"{index:04}.bin")
    return open_tokens(str(folder)).tokens


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short stretches, chunks and pieces, so that small texts have many of them."""
    for name, value in {"STRETCH": 3, "CHUNK": 5, "PIECE": 7, "BLOCK": 2}.items():
        monkeypatch.setattr(repeated, name, value)


texts = st.integers(1, 4).flatmap(lambda ids: st.lists(st.integers(0, ids - 1), max_size=60))


@pytest.mark.usefixtures("small")
@given(split=texts, within=texts)
def test_the_share_is_that_of_its_definition(
    tmp_path_factory: pytest.TempPathFactory, split: list[int], within: list[int]
) -> None:
    arrays = np.array(split, np.uint8), np.array(within, np.uint8)
    assert repeated_share(*arrays) == reference(*arrays)
    if split and within:
        streams = [in_files(tmp_path_factory.mktemp("tokens"), tokens, most=8) for tokens in arrays]
        assert repeated_share(*streams) == reference(*arrays)


@given(copies=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(40, 120)), max_size=4))
def test_copies_of_any_place_and_length_count_as_the_definition_says(copies: list[tuple[int, int, int]]) -> None:
    split, within = RANDOM[:1000].copy(), RANDOM[1000:2000]
    for to, begin, length in copies:
        part = within[begin : begin + length][: len(split) - to]
        split[to : to + len(part)] = part
    assert repeated_share(split, within) == reference(split, within)


@pytest.mark.parametrize(("length", "counted"), [(49, 0), (50, 50), (51, 51)])
def test_fifty_tokens_in_a_row_count_and_fewer_do_not(length: int, counted: int) -> None:
    within = np.concatenate((RANDOM[:1000], RANDOM[2000 : 2000 + length], RANDOM[3000:3100]))
    split = np.concatenate((RANDOM[1000:1500], RANDOM[2000 : 2000 + length], RANDOM[3200:3300]))
    assert repeated_share(split, within) == counted / len(split)


@pytest.mark.parametrize("shift", range(-60, 11, 10))
def test_a_copy_over_the_border_of_two_chunks_counts(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    monkeypatch.setattr(repeated, "CHUNK", 1000)
    begin = 1000 + shift
    assert repeated_share(RANDOM[begin : begin + 60], RANDOM) == 1.0


def test_equal_tokens_alone_count_wherever_there_are_fifty() -> None:
    ones = np.ones(200, np.uint8)
    assert repeated_share(ones, ones[:50]) == 1.0
    assert repeated_share(ones, ones[:49]) == 0.0
    assert repeated_share(np.append(ones, RANDOM[:200]), ones[:50]) == 0.5


def test_splits_that_are_empty_or_too_short_repeat_nothing() -> None:
    nothing = np.zeros(0, np.uint8)
    assert repeated_share(nothing, RANDOM) == 0.0
    assert repeated_share(RANDOM, nothing) == 0.0
    assert repeated_share(RANDOM[:49], RANDOM) == 0.0


def test_ids_of_two_bytes_are_told_apart() -> None:
    split = RANDOM.astype(np.uint16)
    assert repeated_share(split + 256, split) == 0.0
    assert repeated_share(split + 256, split + 256) == 1.0


@pytest.mark.parametrize("length", [50, 51])  # the hash is of a stretch of the other split, or of this one's other
def test_other_numbers_are_drawn_where_two_stretches_have_one_hash(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    class Colliding(repeated._RollingHash):
        made = 0

        def __init__(self, generator: np.random.Generator) -> None:
            super().__init__(generator)
            Colliding.made += 1
            if Colliding.made < 3:
                self.numbers[:] = 7

    monkeypatch.setattr(repeated, "_RollingHash", Colliding)
    assert repeated_share(RANDOM[:length], RANDOM[100:200]) == 0.0
    assert Colliding.made == 3
