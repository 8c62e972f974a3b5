"""A few cases of `python -m benchmarks.robustness.fuzz`, always the same ones."""

import sys

import pytest

from benchmarks.robustness.fuzz.laboratory import FuzzLaboratory, outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")
def test_bad_input_is_refused_by_the_name_of_its_key_and_leaves_nothing_behind(tmp_path):
    with FuzzLaboratory(tmp_path) as lab:
        done = list(outcomes(lab, cases=70, seed=1))
    assert [outcome.report() for outcome in done if outcome.failed] == []
    assert {outcome.what for outcome in done} == {"ran", "refused"}
