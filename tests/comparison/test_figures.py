"""Losses by place and by kind, on texts small enough to count by hand."""

import numpy as np
import pytest

from llmx.comparison.figures import KINDS, by_kind, by_position, kinds, positions, validation_text
from llmx.data.windows import EvaluationBatches
from llmx.protocol import IGNORE


@pytest.mark.parametrize(("window", "stride"), [(4, None), (4, 1), (5, 2), (4, 4), (3, 3)])
@pytest.mark.parametrize("length", [6, 14, 15])
def test_places_are_those_of_the_windows_that_evaluation_takes(window: int, stride: int | None, length: int):
    batches = EvaluationBatches(np.arange(length), window, 3, stride or window)
    places = [np.nonzero(row)[0] for batch in batches for row in (batch.targets != IGNORE).numpy()]
    assert positions(length - 1, window, stride).tolist() == np.concatenate(places).tolist()


def test_the_mean_at_each_place():
    place, loss = by_position(np.array([1.0, 2, 3, 5, 6, 9]), 4, None)
    assert place.tolist() == [0, 1, 2, 3]
    assert loss.tolist() == [3.5, 5.5, 3, 5]


def test_each_character_has_one_kind():
    text = "\n\nKING LEAR:\nI'll go, thou\tsay'st."
    by_name = [KINDS[index] for index in kinds(text)]
    assert by_name[:2] == ["new line"] * 2
    assert by_name[2:12] == ["speaker's name"] * 10
    assert by_name[12] == "new line"
    rest = dict(enumerate(by_name[13:]))
    assert [i for i, kind in rest.items() if kind == "start of a word"] == [0, 5, 9, 14]
    assert [i for i, kind in rest.items() if kind == "space"] == [4, 8, 13]
    assert [i for i, kind in rest.items() if kind == "punctuation"] == [7, 20]


def test_a_colon_within_a_speech_makes_no_speaker():
    text = "he said: no\nthus:\nyes"
    assert KINDS.index("speaker's name") not in kinds(text)


def test_the_mean_of_each_kind_leaves_out_the_first_character_which_nothing_predicts():
    assert by_kind(np.array([1.0, 3.0, 8.0]), "ab b") == {
        "start of a word": 8.0,
        "inside a word": 1.0,
        "space": 3.0,
    }


def test_a_corpus_that_is_gone_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert validation_text({"corpus": "gone.txt"}) is None
