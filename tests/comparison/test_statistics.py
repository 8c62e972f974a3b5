"""Intervals and tests against scipy's, and against how often they hold what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmx.comparison.statistics import (
    BLOCK,
    FEWEST,
    block_means,
    difference_of_pairs,
    difference_over_seeds,
    difference_over_text,
    difference_under_spread,
    holm,
    mean_over_seeds,
    mean_over_text,
    mean_under_spread,
    pooled,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_a_mean_has_students_interval(count: int, level: float):
    values = RANDOM.normal(1.5, 0.01, count)
    estimate = mean_over_seeds(values, level)
    low, high = stats.t.interval(level, count - 1, values.mean(), stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.basis == "seeds"


@pytest.mark.parametrize(("here", "there"), [(2, 2), (3, 5), (10, 4)])
def test_a_difference_has_welchs_interval_and_p(here: int, there: int):
    values, baseline = RANDOM.normal(1.5, 0.01, here), RANDOM.normal(1.52, 0.03, there)
    estimate = difference_over_seeds(values, baseline)
    expected = stats.ttest_ind(values, baseline, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate.value == pytest.approx(values.mean() - baseline.mean())


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_difference_of_pairs_has_the_interval_and_p_of_the_paired_test(count: int):
    seeds = RANDOM.normal(0, 0.03, count)
    values, baseline = (mean + seeds + RANDOM.normal(0, 0.001, count) for mean in (1.5, 1.52))
    estimate = difference_of_pairs(values, baseline)
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.p == pytest.approx(expected.pvalue)
    assert estimate.basis == "pairs"
    assert (difference_of_pairs(values, values).value, difference_of_pairs(values, values).p) == (0, 1)


def test_a_pooled_spread_of_two_groups_gives_students_test_and_of_one_its_interval():
    values, baseline = RANDOM.normal(1.5, 0.01, 3), RANDOM.normal(1.52, 0.01, 4)
    spread = pooled([values, baseline])
    estimate = difference_under_spread(values, baseline, spread)
    expected = stats.ttest_ind(values, baseline, equal_var=True)
    interval = expected.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.p == pytest.approx(expected.pvalue)
    assert mean_under_spread(values, pooled([values])) == mean_over_seeds(values)
    assert pooled([values, baseline, RANDOM.normal(size=1)]) == spread
    with pytest.raises(ValueError, match="two values"):
        pooled([np.array([1.0])])


def test_runs_that_do_not_spread_at_all():
    same = difference_over_seeds(np.array([1.5, 1.5]), np.array([1.5, 1.5]))
    assert (same.value, same.p) == (0, 1)
    other = difference_over_seeds(np.array([1.5, 1.5]), np.array([1.25, 1.25]))
    assert (other.value, other.low, other.p) == (0.25, 0.25, 0)


def related(length: int, random: np.random.Generator) -> np.ndarray:
    """Numbers of mean 0 whose neighbours go together over about 20 places."""
    noise = random.normal(size=length + 19)
    return np.convolve(noise, np.ones(20) / 20**0.5, "valid")


def test_the_interval_over_text_covers_the_mean_as_often_as_it_says_though_neighbours_go_together():
    """Of 200 texts 95 % give 190 +- 3; blocks see a little less spread than there is. Single characters, in the place
    of blocks, would cover it in fewer than 40 % of the texts."""
    random = np.random.default_rng(1)
    blocks = single = 0
    for _ in range(200):
        losses = related(20_000, random)
        estimate = mean_over_text(losses)
        blocks += estimate.low <= 0 <= estimate.high
        single += abs(losses.mean()) <= 1.96 * losses.std() / len(losses) ** 0.5
    assert 178 <= blocks <= 198
    assert single < 100


def test_students_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(2000):
        estimate = mean_over_seeds(random.normal(size=3))
        covered += estimate.low <= 0 <= estimate.high
    assert 1860 <= covered <= 1940


def test_pairing_sees_a_difference_that_the_spread_of_the_text_would_hide():
    text = np.random.default_rng(3).exponential(1.5, 20_000)  # how hard each character is, for both
    baseline = text + np.random.default_rng(4).normal(0, 0.05, len(text))
    losses = text + 0.002 + np.random.default_rng(5).normal(0, 0.05, len(text))
    estimate = difference_over_text(losses, baseline)
    assert estimate.low > 0
    assert estimate.p < 0.01
    assert mean_over_text(losses).high - mean_over_text(losses).low > 20 * (estimate.high - estimate.low)


def test_no_difference_is_no_finding():
    losses = related(FEWEST * BLOCK, np.random.default_rng(6))
    assert difference_over_text(losses, losses).p == 1
    ps = [mean_over_text(related(FEWEST * BLOCK, np.random.default_rng(seed))).p for seed in range(100)]
    assert sum(p < 0.05 for p in ps) <= 15
    assert np.median(ps) > 0.3


def test_draws_repeat_and_a_constant_text_has_no_spread():
    losses = related(3000, np.random.default_rng(7))
    assert np.array_equal(block_means(losses, 1), block_means(losses, 1))
    assert block_means(np.full(3 * BLOCK + 1, 2.0), 0) == pytest.approx(2.0)


def test_of_a_short_text_nothing_is_known():
    short = related(FEWEST * BLOCK - 1, np.random.default_rng(8)) + 1
    estimate = mean_over_text(short)
    assert (estimate.value, estimate.half, estimate.p) == (short.mean(), math.inf, 1)


def test_a_text_shorter_than_a_block_is_one_block():
    assert block_means(np.arange(10.0), 0) == pytest.approx(4.5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_that_of_the_definition(ps: list[float]):
    adjusted = holm(ps)
    for p, mine in zip(ps, adjusted, strict=True):
        # rejected at a level if and only if all smaller ones are, each at its share of the level
        smaller = sorted(other for other in ps if other <= p)
        expected = max(min(1.0, (len(ps) - rank) * other) for rank, other in enumerate(smaller))
        assert mine == pytest.approx(expected)


def test_holm_on_known_numbers():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
