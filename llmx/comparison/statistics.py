"""Confidence intervals of mean losses and of their differences.

Over seeds, a mean has Student's t interval. A difference has Student's paired one if both networks have the same seeds:
runs of one seed read the same windows, and networks of one shape begin with the same weights. Otherwise it has Welch's.

One run tells nothing about the spread over seeds, only how much depends on the validation text. Its interval is a
bootstrap over blocks of the text (circular, Politis and Romano 1992). A difference is paired, since both networks read
the same characters. Neighbouring losses are related, so drawing single characters would make intervals too narrow.

Holm (1979) corrects many comparisons: the chance of one false finding among all stays that of a single comparison.

A few seeds tell little about the spread of one network. If many networks have a few seeds each and spread alike, their
deviations from their own means are pooled: one standard deviation, with the degrees of freedom of all of them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
BLOCK = 500  # characters, about a speech: losses further apart are unrelated
FEWEST = 20  # blocks: with 10 the interval misses twice as often as it says, with 1 it covers nothing
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, (-inf, inf) if that is unknown."""

    value: float
    low: float
    high: float
    basis: Literal["seeds", "pairs", "text"]  # the interval is over seeds, pairs of runs of one seed, or the text
    p: float | None = None  # two-sided, of the hypothesis that the number is 0; None for a mean

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        return math.isfinite(self.half)


def mean_over_seeds(values: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,), K >= 2: mean and Student's interval."""
    return mean_under_spread(values, pooled([values]), level)


def difference_over_seeds(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (J,), K and J >= 2: Welch's interval and test."""
    parts = [x.var(ddof=1) / len(x) for x in (values, baseline)]
    weights = sum(v**2 / (len(x) - 1) for v, x in zip(parts, (values, baseline), strict=True))
    freedom = sum(parts) ** 2 / weights if weights else math.inf
    return _student(float(values.mean() - baseline.mean()), math.sqrt(sum(parts)), freedom, level)


def difference_of_pairs(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (K,), in the same order of seeds, K >= 2: Student's paired interval and test."""
    differences = values - baseline
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return replace(_student(float(differences.mean()), error, len(differences) - 1, level), basis="pairs")


@dataclass(frozen=True)
class Spread:
    """A standard deviation and its degrees of freedom."""

    deviation: float
    freedom: int


def pooled(groups: Iterable[np.ndarray]) -> Spread:
    """One standard deviation for groups of values (K,), K >= 1, around the mean of each group. Raises ValueError if no
    group has two values."""
    groups = list(groups)
    freedom = sum(len(values) - 1 for values in groups)
    if freedom == 0:
        raise ValueError("groups: none has two values, so their spread is unknown")
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return Spread(math.sqrt(squares / freedom), freedom)


def mean_under_spread(values: np.ndarray, spread: Spread, level: float = LEVEL) -> Estimate:
    """values (K,), K >= 1: mean and Student's interval under a known spread."""
    half = stdtrit(spread.freedom, (1 + level) / 2) * spread.deviation / math.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half), "seeds")


def difference_under_spread(values: np.ndarray, baseline: np.ndarray, spread: Spread, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (J,): Student's interval and test under one spread of both."""
    error = spread.deviation * math.sqrt(1 / len(values) + 1 / len(baseline))
    return _student(float(values.mean() - baseline.mean()), error, spread.freedom, level)


def _student(difference: float, error: float, freedom: float, level: float) -> Estimate:
    """A difference of means with its standard error: Student's interval and test."""
    if error == 0:
        return Estimate(difference, difference, difference, "seeds", 1.0 if difference == 0 else 0.0)
    half = stdtrit(freedom, (1 + level) / 2) * error
    p = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Estimate(difference, difference - half, difference + half, "seeds", p)


def mean_over_text(losses: np.ndarray, level: float = LEVEL, seed: int = 0) -> Estimate:
    """losses (N,) of consecutive characters, or their differences: mean, bootstrap interval and two-sided p of a mean
    of 0, at least 2 / (DRAWS + 1). With fewer than FEWEST blocks the interval is unknown."""
    if len(losses) < FEWEST * BLOCK:
        return Estimate(float(losses.mean()), -math.inf, math.inf, "text", 1.0)
    means = block_means(losses, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (DRAWS + 1))
    return Estimate(float(losses.mean()), float(low), float(high), "text", float(p))


def difference_over_text(losses: np.ndarray, baseline: np.ndarray, level: float = LEVEL, seed: int = 0) -> Estimate:
    """losses (N,) minus baseline (N,), character by character."""
    if np.array_equal(losses, baseline):
        return Estimate(0.0, 0.0, 0.0, "text", 1.0)
    return mean_over_text(losses - baseline, level, seed)


def block_means(values: np.ndarray, seed: int) -> np.ndarray:
    """(N,) -> (DRAWS,) means of ceil(N / BLOCK) blocks, drawn with replacement. The text is a circle: its
    end continues at its beginning."""
    length, block = len(values), min(BLOCK, len(values))
    sums = np.concatenate(([0.0], np.concatenate((values, values[: block - 1])).cumsum()))
    of_block = (sums[block:] - sums[:-block]) / block  # (N,), by their start
    starts = np.random.default_rng(seed).integers(length, size=(DRAWS, -(-length // block)))
    return of_block[starts].mean(1)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the given order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
