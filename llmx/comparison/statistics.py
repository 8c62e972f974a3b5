"""How sure a mean, and a difference of two, is.

Over seeds: Student's t for a mean. For a difference Student's over pairs where both networks have the same seeds, since
runs of one seed read the same windows (and begin from the same weights, where those are alike); else Welch's. Where a
network was run once, nothing is known about the spread over seeds, and what can be said is how much the validation
text itself decides: a bootstrap over blocks of it (circular, Politis and Romano 1992), paired, for both networks read
the same characters. Blocks, because neighbouring losses go together; single characters drawn by themselves would make
intervals too narrow. Many comparisons are corrected after Holm (1979): the chance of one false finding among all of
them stays at the level of a single one.

A few seeds tell little about the spread of one network. Where many networks have a few seeds each, and spread alike,
their deviations from their own means are pooled: one standard deviation, with the degrees of freedom of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
BLOCK = 500  # characters, about a speech: the losses of neighbours are no longer related beyond it
FEWEST = 20  # blocks: of 10 the interval misses twice as often as it says, one covers nothing
DRAWS = 2000

Basis = Literal["seeds", "pairs", "text"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, which is (-inf, inf) where nothing is known.

    basis: what the interval is over: `seeds`, `pairs` of runs of one seed, or the validation `text`
    p:     two-sided, of the hypothesis that the number is 0; for differences
    """

    value: float
    low: float
    high: float
    basis: Basis
    p: float | None = None

    @property
    def half(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.half)


def mean_over_seeds(values: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,), K >= 2: mean and Student's interval."""
    return mean_under_spread(values, pooled([values]), level)


def difference_over_seeds(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (J,), both of two at least: Welch's interval and test."""
    parts = [x.var(ddof=1) / len(x) for x in (values, baseline)]
    weights = sum(v**2 / (len(x) - 1) for v, x in zip(parts, (values, baseline), strict=True))
    freedom = sum(parts) ** 2 / weights if weights else math.inf
    return _student(float(values.mean() - baseline.mean()), math.sqrt(sum(parts)), freedom, level)


def difference_of_pairs(values: np.ndarray, baseline: np.ndarray, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (K,), both by seed, K >= 2: the interval and test of Student's paired t."""
    differences = values - baseline
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return replace(_student(float(differences.mean()), error, len(differences) - 1, level), basis="pairs")


@dataclass(frozen=True)
class Spread:
    """A standard deviation, and the degrees of freedom that it is known with."""

    deviation: float
    freedom: int


def pooled(groups: Iterable[np.ndarray]) -> Spread:
    """The one standard deviation of values (K,), K >= 1, around the mean of their own group.

    Raises:
        ValueError: where no group has two values.
    """
    groups = list(groups)
    freedom = sum(len(values) - 1 for values in groups)
    if freedom == 0:
        raise ValueError("groups: none has two values, so nothing is known of their spread")
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return Spread(math.sqrt(squares / freedom), freedom)


def mean_under_spread(values: np.ndarray, spread: Spread, level: float = LEVEL) -> Estimate:
    """values (K,), K >= 1, of a known spread: mean and Student's interval."""
    half = stdtrit(spread.freedom, (1 + level) / 2) * spread.deviation / math.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half), "seeds")


def difference_under_spread(values: np.ndarray, baseline: np.ndarray, spread: Spread, level: float = LEVEL) -> Estimate:
    """values (K,) minus baseline (J,), both of one spread: Student's interval and test."""
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
    """losses (N,) of consecutive characters, or differences of such: their mean, its bootstrap interval and the
    two-sided p of a mean of 0, which DRAWS bound below. Of fewer than FEWEST blocks nothing is known."""
    if len(losses) < FEWEST * BLOCK:
        return Estimate(float(losses.mean()), -math.inf, math.inf, "text", 1.0)
    means = block_means(losses, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return Estimate(
        float(losses.mean()), float(low), float(high), "text", float(min(1.0, 2 * (beyond + 1) / (DRAWS + 1)))
    )


def difference_over_text(losses: np.ndarray, baseline: np.ndarray, level: float = LEVEL, seed: int = 0) -> Estimate:
    """losses (N,) minus baseline (N,), character by character."""
    if np.array_equal(losses, baseline):
        return Estimate(0.0, 0.0, 0.0, "text", 1.0)
    return mean_over_text(losses - baseline, level, seed)


def block_means(values: np.ndarray, seed: int) -> np.ndarray:
    """(N,) -> (DRAWS,) means of as many blocks, drawn with replacement, as make up the length; the end of the text
    goes on at its beginning."""
    length, block = len(values), min(BLOCK, len(values))
    sums = np.concatenate(([0.0], np.concatenate((values, values[: block - 1])).cumsum()))
    of_block = (sums[block:] - sums[:-block]) / block  # (N,), by where they start
    starts = np.random.default_rng(seed).integers(length, size=(DRAWS, -(-length // block)))
    return of_block[starts].mean(1)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order of those given."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
