import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.training.schedules import Cosine, WarmupStableDecay

runs = st.integers(2, 200).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1)))
ratios = st.floats(0, 1)


@given(runs, ratios)
def test_cosine_rises_by_equal_steps_in_the_warm_up_and_reaches_1_after_it(run: tuple[int, int], ratio: float):
    total, warmup = run
    factor = Cosine(total, warmup, ratio)
    for step in range(warmup + 1):
        assert factor(step) == pytest.approx((step + 1) / (warmup + 1))


@given(runs, st.floats(0, 0.99))
def test_cosine_never_rises_after_the_warm_up_and_ends_at_the_minimum(run: tuple[int, int], ratio: float):
    total, warmup = run
    factor = Cosine(total, warmup, ratio)
    after = [factor(step) for step in range(warmup, total + 1)]
    assert all(later < earlier for earlier, later in pairwise(after))
    assert factor(total) == pytest.approx(ratio)
    assert all(ratio <= value <= 1 for value in after)


@given(runs, ratios, st.integers(0, 1000))
def test_cosine_stays_at_the_minimum_past_the_end(run: tuple[int, int], ratio: float, beyond: int):
    assert Cosine(*run, ratio)(run[0] + beyond) == pytest.approx(ratio)


def test_cosine_is_half_way_in_the_middle():
    assert Cosine(100, 0, 0.2)(50) == pytest.approx(0.6)
    assert Cosine(110, 10, 0.2)(60) == pytest.approx(0.6)
    assert Cosine(100, 0, 0.0)(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("total", [0, 1, 3])
def test_a_warm_up_longer_than_the_run_only_rises(total: int):
    factor = Cosine(total, warmup_steps=9)
    assert [factor(step) for step in range(total)] == pytest.approx([(step + 1) / 10 for step in range(total)])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("warmup_steps", {"warmup_steps": -1}),
        ("minimum_ratio", {"minimum_ratio": -0.1}),
        ("minimum_ratio", {"minimum_ratio": 1.1}),
        ("minimum_ratio", {"minimum_ratio": math.nan}),
    ],
)
def test_cosine_names_the_value_that_is_out_of_range(name: str, arguments: dict[str, float]):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Cosine(100, **arguments)


@given(runs, st.floats(0, 1), ratios)
def test_stable_is_1_between_warm_up_and_decay_and_ends_at_the_minimum(run, decay, ratio):
    total, warmup = run
    factor = WarmupStableDecay(total, warmup, decay, ratio)
    for step in range(total + 1):
        rise = min(1.0, (step + 1) / (warmup + 1))
        share = 1 - min(1.0, (total - step) / (decay * total)) if decay * total > 0 else 0.0
        assert factor(step) == pytest.approx(min(rise, 1 - (1 - ratio) * share))
    if warmup == 0 and decay * total > 0:
        assert factor(total) == factor(total + 7) == pytest.approx(ratio)


@pytest.mark.parametrize("name", ["decay", "minimum_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_stable_names_the_value_that_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        WarmupStableDecay(100, **{name: value})
