"""What seeds alone do to a number, and whether a difference is more than that.

Arms with several seeds lend their spread to those with one: it is pooled over them, as in an analysis of variance. Runs
of one seed see the same data in the same order in every arm, which can only make true differences steadier than the
pooled spread says; the tests are timid then, never bold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from calledshot.stats import Interval

LEVEL = 0.95


@dataclass(frozen=True)
class Noise:
    """A pooled standard deviation between seeds."""

    sd: float
    degrees: int
    """Degrees of freedom: runs less arms, of the arms with several seeds."""
    arms: int
    """Arms that it comes from."""


@dataclass(frozen=True)
class Contrast:
    """A difference of two means with its t interval (`LEVEL`) and the two-sided p-value of "no difference"."""

    difference: Interval
    p_value: float


def pooled(groups: Iterable[Sequence[float]]) -> Noise | None:
    """The noise of groups of numbers, one group an arm and size; None where no group has two."""
    groups = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    if not degrees:
        return None
    squares = sum(float(np.var(group, ddof=1)) * (len(group) - 1) for group in groups)
    return Noise(math.sqrt(squares / degrees), degrees, len(groups))


def own(group: Sequence[float]) -> Noise | None:
    """The noise of one arm alone, for arms that are not like the others."""
    return pooled([group])


def contrast(
    a: Sequence[float], b: Sequence[float], noise_a: Noise, noise_b: Noise, shift: float = 0.0, more: float = 0.0
) -> Contrast:
    """mean(a) - mean(b) + `shift`, where one observation of each side has its noise: Student's t where the noise is the
    same, else Welch's with Satterthwaite's degrees of freedom. `more` is the variance of `shift`."""
    value = float(np.mean(a) - np.mean(b)) + shift
    part_a, part_b = noise_a.sd**2 / len(a), noise_b.sd**2 / len(b)
    variance, degrees = part_a + part_b, float(noise_a.degrees)
    if noise_a != noise_b and variance:
        degrees = variance**2 / (part_a**2 / noise_a.degrees + part_b**2 / noise_b.degrees)
    error = math.sqrt(variance + more)
    reach = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
    statistic = abs(value) / error if error else math.inf if value else 0.0
    return Contrast(Interval(value, value - reach, value + reach, LEVEL), float(2 * special.stdtr(degrees, -statistic)))


def smallest(noise: Noise, seeds: int, against: int) -> float:
    """The smallest difference between `seeds` and `against` runs that a single test at 5 % tells from noise."""
    return float(special.stdtrit(noise.degrees, (1 + LEVEL) / 2)) * noise.sd * math.sqrt(1 / seeds + 1 / against)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: 1 for the same order, -1 for the reverse; None below three pairs or where all are tied."""
    if len(a) < 3:
        return None
    first, second = ranks(a), ranks(b)
    first, second = first - first.mean(), second - second.mean()
    size = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else None


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, (N,) float64; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[place]
