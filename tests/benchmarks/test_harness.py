"""The arithmetic of the benchmarks; nothing here looks at a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Timer
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import (
    CHECKOUT,
    Case,
    Contender,
    Measure,
    Result,
    measure_in_turns,
    record,
    speedups,
    summarise,
)
from benchmarks.peers import SETTINGS, ours
from benchmarks.train import flops_per_token

RATES = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=9)
RATE, SECONDS = Case("rate"), Case("time", "s")


def counting(log: Path, name: str) -> Measure:
    """A contender that notes its turns, and answers with how many it had."""
    turns = []

    def measure(case: Case) -> float:
        turns.append(case)
        with log.open("a") as file:
            file.write(name)
        return float(len(turns))

    return measure


def missing() -> Measure:
    import no_such_package_anywhere  # noqa: F401

    raise AssertionError


def failing_in_its_second_turn(log: Path) -> Measure:
    measure = counting(log, "f")

    def fail(case: Case) -> float:
        if (value := measure(case)) > 1:
            raise ValueError("no more")
        return value

    return fail


def dying() -> Measure:
    os._exit(3)


def dying_between_turns() -> Measure:
    def answer(case: Case) -> float:
        Timer(0.1, os._exit, (4,)).start()
        return 1.0

    return answer


def slow() -> Measure:
    def answer(case: Case) -> float:
        sleep(1)
        return 1.0

    return answer


def result(contender: str, values: list[float], case: Case = RATE, error: str | None = None) -> Result:
    return Result(case, contender, {}, values, error=error)


@given(RATES)
def test_the_median_lies_between_the_extremes(values: list[float]):
    summary = summarise(values)
    assert summary.low == min(values)
    assert summary.high == max(values)
    assert summary.low <= summary.median <= summary.high


def test_a_ratio_is_taken_within_a_round_and_not_between_medians():
    ours_, theirs = [2.0, 30.0, 4.0], [1.0, 10.0, 4.0]  # the machine was faster in the second round
    assert speedups(ours_, theirs, "tokens/s") == [2, 3, 1]
    assert summarise(speedups(ours_, theirs, "tokens/s")).median != summarise(ours_).median / summarise(theirs).median


def test_half_the_seconds_are_twice_as_fast():
    assert speedups([1.0], [2.0], "s") == [2]
    assert speedups([1.0], [2.0], "tokens/s") == [0.5]


@given(RATES, st.floats(1e-2, 1e2))
def test_a_drift_of_the_machine_leaves_the_ratios_alone(values: list[float], factor: float):
    theirs = [value / factor for value in values]
    # two roundings of a float64 each
    assert speedups(values, theirs, "tokens/s") == pytest.approx([factor] * len(values), rel=1e-12)
    assert speedups(theirs, values, "s") == pytest.approx([factor] * len(values), rel=1e-12)


def test_unequal_numbers_of_rounds_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        speedups([1.0, 2.0], [1.0], "tokens/s")


def test_contenders_take_turns_and_the_first_round_does_not_count(tmp_path: Path):
    log = tmp_path / "turns"
    contenders = [Contender(name, partial(counting, log, name)) for name in "AB"]
    results = measure_in_turns(contenders, [RATE, SECONDS], repeats=2)
    assert log.read_text() == "ABABAB" * 2
    assert [(r.case, r.contender, r.values) for r in results] == [
        (RATE, "A", [2, 3]),
        (RATE, "B", [2, 3]),
        (SECONDS, "A", [5, 6]),
        (SECONDS, "B", [5, 6]),
    ]
    assert all(r.peak_bytes > 0 and r.error is None for r in results)


def test_a_contender_that_fails_says_why_and_the_others_go_on(tmp_path: Path):
    log = tmp_path / "turns"
    contenders = [
        Contender("good", partial(counting, log, "g")),
        Contender("missing", missing),
        Contender("failing", partial(failing_in_its_second_turn, log)),
        Contender("dying", dying),
    ]
    results = measure_in_turns(contenders, [RATE, SECONDS], repeats=1)
    assert log.read_text() == "gfgf" + "gg"
    for case in (RATE, SECONDS):
        errors = {r.contender: r.error for r in results if r.case == case}
        assert errors == {
            "good": None,
            "missing": "no_such_package_anywhere is not installed",
            "failing": "ValueError: no more",
            "dying": "its process ended with exit code 3",
        }
    assert [r.values for r in results if r.error is not None] == [[]] * 6


def test_a_contender_may_die_while_it_is_not_asked():
    contenders = [Contender("dying", dying_between_turns), Contender("slow", slow)]
    dead, alive = measure_in_turns(contenders, [RATE], repeats=1)
    assert (dead.values, dead.error) == ([], "its process ended with exit code 4")
    assert alive.values == [1.0]


def test_the_record_is_json_with_every_round_and_the_ratios_to_ours():
    results = [
        result("ours", [4.0, 9.0]),
        result("theirs", [2.0, 3.0]),
        result("absent", [], error="not installed"),
        result("ours", [1.0], SECONDS),
        result("theirs", [3.0], SECONDS),
    ]
    told = json.loads(json.dumps(record("title", results, {"threads": 3, "out": Path("x.json")})))
    rows = told["results"]
    assert [row["values"] for row in rows] == [[4, 9], [2, 3], [], [1], [3]]
    assert rows[1]["ours_times_as_fast"] == [2, 3]
    assert rows[4]["ours_times_as_fast"] == [3]
    assert rows[1]["summary"] == {"median": 2.5, "low": 2, "high": 3}
    assert rows[2]["error"] == "not installed"
    assert "summary" not in rows[2]
    assert told["hardware"]["threads"] == 3
    assert told["options"]["out"] == "x.json"


@pytest.mark.parametrize("setting", SETTINGS)
def test_counted_flops_are_six_per_matrix_weight_and_twelve_dim_window_per_layer(setting: str):
    shape = SETTINGS[setting]
    layer = 4 * shape.dim**2 + 3 * shape.dim * shape.hidden
    weights = shape.depth * layer + shape.dim * shape.vocab_size
    attention = 12 * shape.depth * shape.dim * shape.window  # arXiv 2204.02311, appendix B
    assert flops_per_token(ours, shape) == 6 * weights + attention


def test_the_benchmarks_import_without_any_peer_installed():
    hidden = "import sys; sys.modules.update(dict.fromkeys(('transformers', 'litgpt', 'x_transformers')))"
    modules = "import benchmarks.train, benchmarks.generate, benchmarks.startup"
    subprocess.run([sys.executable, "-c", f"{hidden}; {modules}"], cwd=CHECKOUT, check=True)
