"""Intervals for a share of successes and for a mean, by Student's t or by bootstrap, over items or clusters of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]

# Resamples are drawn so many at a time that the drawn numbers take about 32 MB.
DRAWN_AT_ONCE = 4_000_000
FEW = 10
"""Clusters below which an interval is wide, and should be said to be of few."""


@dataclass(frozen=True)
class Interval:
    """An estimate and a range that covers the truth in a share `level` of repetitions; infinite ends say nothing."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def __contains__(self, truth: float) -> bool:
        """Whether `truth` is compatible with what was seen: 0 for a difference, chance for an accuracy."""
        return self.low <= truth <= self.high

    @property
    def half_width(self) -> float:
        """Half of the distance between the ends: the ± of a symmetrical interval."""
        return (self.high - self.low) / 2


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Score interval for a share, such as an accuracy: never outside [0, 1], and honest at 0 and 100 %.

    Source: Wilson (1927); Newcombe (1998, Statistics in Medicine 17:857), method 3.
    """
    check_counts(successes, trials)
    z = two_sided_z(level)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = z * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    # At 0 and 100 % one end is exact, and rounding must not push it past the share itself.
    low = 0.0 if successes == 0 else float(centre - spread)
    high = 1.0 if successes == trials else float(centre + spread)
    return Interval(share, low, high, level)


def mean_interval(
    values: ArrayLike, *, weights: ArrayLike | None = None, clusters: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Student's t interval for a mean, with as many degrees of freedom as there are clusters, less one.

    Args:
        values: (N,) what was measured on each item, such as the bits per byte of a document.
        weights: (N,) positive; the mean is sum(weights * values) / sum(weights). All alike when left out.
        clusters: (N,) a label an item; items of one label (a passage, a prompt, a worker) may depend on each other.

    Without weights and clusters the standard error is s / sqrt(N), for outcomes of 0 and 1 sqrt(p(1-p)/(N-1)); with
    them it is the cluster-robust one (Miller 2024, "Adding Error Bars to Evals", times G/(G-1) for G clusters).
    One cluster alone says nothing about the spread: the ends are then infinite.
    """
    sums, sizes = cluster_sums(values, weights, clusters)
    return _student(sums, sizes, len(sums) - 1, level)


def bootstrap_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval for a mean: whole clusters are drawn with replacement. Arguments as for `mean_interval`.

    Of fewer clusters than `FEW` no resampling tells the spread (of two documents it covers the truth every other time):
    they get Student's t, with the degrees of freedom of Kish's effective number of clusters less one, at least 1/2.

    The same arguments and seed give the same interval. Equal clusters are drawn together, so a million outcomes of 0
    and 1 take a quarter of a second; numbers that all differ take some 8 ns for each of N * resamples draws.

    Source: Efron (1987), "Better Bootstrap Confidence Intervals", for BCa, with ties counted half; "percentile"
    corrects neither bias nor skewness.
    """
    sums, sizes = cluster_sums(values, weights, clusters)
    if len(sums) < FEW:
        return _student(sums, sizes, max(0.5, float(sizes.sum() ** 2 / np.sum(sizes**2)) - 1), level)
    value = float(sums.sum() / sizes.sum())
    means = np.concatenate(list(_resampled_means(sums, sizes, resamples, np.random.default_rng(seed))))
    ends = np.array([1 - upper_end(level), upper_end(level)])
    if method == "bca":
        ends = _bca_ends(ends, means, value, sums, sizes)
    low, high = np.quantile(means, ends)
    # At a low level, or in a very skewed sample, the quantiles can leave out the estimate itself.
    return Interval(value, min(float(low), value), max(float(high), value), level)


def check_counts(successes: int, trials: int) -> None:
    """Raises ValueError unless 0 <= successes <= trials and trials > 0."""
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is no share")


def upper_end(level: float) -> float:
    """The quantile at the upper end of a two-sided interval: 0.975 for 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, not at {level}")
    return (1 + level) / 2


def two_sided_z(level: float) -> float:
    """The upper end in standard errors of a normal estimate: 1.96 for 0.95."""
    return float(special.ndtri(upper_end(level)))


def cluster_sums(values: ArrayLike, weights: ArrayLike | None, clusters: ArrayLike | None) -> tuple[Floats, Floats]:
    """Weighted sums and total weights by cluster, (G,) float64 each; one cluster an item where `clusters` is None."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not values.size or values.shape != weights.shape:
        raise ValueError(f"one number an item is needed, not shapes {values.shape} and weights {weights.shape}")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("values must be finite and weights positive: leave out items without a result, and say so")
    if clusters is None:
        return values * weights, weights
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    if cluster.shape != values.shape:
        raise ValueError(f"{values.size} items need as many cluster labels, not {cluster.size}")
    # numpy's annotations take weighted counts for integers.
    sums, sizes = (np.bincount(cluster, weights=each).astype(np.float64) for each in (values * weights, weights))
    return sums, sizes


def _student(sums: Floats, sizes: Floats, freedom: float, level: float) -> Interval:
    """Student's t interval around the mean of clusters, with the cluster-robust standard error."""
    value, count, end = float(sums.sum() / sizes.sum()), len(sums), upper_end(level)
    if count == 1:
        return Interval(value, -np.inf, np.inf, level)
    error = np.sqrt(count / (count - 1) * np.sum((sums - value * sizes) ** 2)) / sizes.sum()
    reach = float(special.stdtrit(freedom, end) * error)
    return Interval(value, value - reach, value + reach, level)


def _resampled_means(sums: Floats, sizes: Floats, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Means of `resamples` draws of G clusters out of G with replacement, in chunks."""
    count = len(sums)
    # A complex number sorts as a pair does, and several times faster than rows of two.
    kinds, copies = np.unique(sums + 1j * sizes, return_counts=True)
    # Drawing how often each kind comes up has the same distribution as drawing clusters one by one. A binomial draw
    # costs about ten times an index.
    by_kind = 10 * len(kinds) < count
    chunk = max(1, DRAWN_AT_ONCE // (len(kinds) if by_kind else count))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        if by_kind:
            drawn = rng.multinomial(count, copies / count, size=rows)
            yield (drawn @ kinds.real) / (drawn @ kinds.imag)
        else:
            picked = rng.integers(0, count, size=(rows, count))
            yield sums[picked].sum(axis=1) / sizes[picked].sum(axis=1)


def _bca_ends(ends: Floats, means: Floats, value: float, sums: Floats, sizes: Floats) -> Floats:
    """The quantiles of the resampled means that stand for `ends` once bias and skewness are corrected for."""
    # Means that differ from the estimate by the order of summation alone are ties.
    tie = 1e-12 * max(1.0, float(np.abs(means).max()))
    below = np.mean(means < value - tie) + np.mean(np.abs(means - value) <= tie) / 2
    bias = special.ndtri(np.clip(below, 0.5 / len(means), 1 - 0.5 / len(means)))
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    pull = without.mean() - without
    spread = float(np.sum(pull**2))
    if spread <= (tie**2) * len(sums):
        return ends
    acceleration = np.sum(pull**3) / (6 * spread**1.5)
    shifted = bias + special.ndtri(ends)
    return special.ndtr(bias + shifted / (1 - acceleration * shifted))
