"""Two systems on the same items: which is better, and could it be chance?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calledshot.stats.binomial import binomial_test
from calledshot.stats.intervals import DRAWN_AT_ONCE, Floats, Interval, bootstrap_interval, cluster_sums


@dataclass(frozen=True)
class Comparison:
    """The mean of `a - b` over the same items with its interval, and the two-sided p-value of "no difference"."""

    difference: Interval
    p_value: float


def paired_comparison(
    a: ArrayLike,
    b: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """BCa interval of the mean difference (of few clusters Student's t), with the p-value of `paired_permutation` on
    the same clusters.

    Args:
        a, b: (N,) scores of two systems on the same items, in the same order; 0 and 1 for wrong and right.
        weights, clusters: (N,) as for `mean_interval`.

    The interval comes from resampling, the p-value from flipping signs: a bootstrap's own p-value (Koehn 2004) is too
    small on few items. So on few items the two may disagree about a difference at the edge: believe the p-value.
    """
    differences = _differences(a, b)
    interval = bootstrap_interval(
        differences, weights=weights, clusters=clusters, level=level, resamples=resamples, seed=seed
    )
    p_value = paired_permutation(a, b, weights=weights, clusters=clusters, resamples=resamples, seed=seed)
    return Comparison(interval, p_value)


def paired_permutation(
    a: ArrayLike,
    b: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of the mean difference when the two systems are swapped at random within each cluster.

    Exact, over all swaps, where there are at most `resamples` of them; else (hits + 1) / (resamples + 1), which is
    never 0 and keeps its level (Phipson and Smyth 2010). The method is Fisher's (The Design of Experiments, 1935, §21).
    """
    sums, _ = cluster_sums(_differences(a, b), weights, clusters)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    # A swap that gives the same total in another order of summation is as extreme as what was seen.
    seen = abs(float(sums.sum())) * (1 - 1e-9)
    if 2 ** len(sums) <= resamples:
        every = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float(np.mean(np.abs((1 - 2 * every) @ sums) >= seen))
    hits = sum(int(np.sum(np.abs(totals) >= seen)) for totals in _swapped_totals(sums, resamples, seed))
    return (hits + 1) / (resamples + 1)


def mcnemar(only_a: int, only_b: int, *, mid_p: bool = False) -> float:
    """Exact two-sided p-value of two systems that answer the same items right or wrong.

    Args:
        only_a, only_b: items that only the one, or only the other, has right; where both agree, nothing is learnt.
        mid_p: count the outcome that was seen half. Nearly always still at most its level, and less timid than the
            exact test (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91).
    """
    return binomial_test(only_a, only_a + only_b, 0.5, mid_p=mid_p) if only_a + only_b else 1.0


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores need the same items on both sides, not {first.shape} and {second.shape}")
    return first - second


def _swapped_totals(sums: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """Totals of the cluster sums with random signs, in chunks; clusters of one size are drawn together."""
    rng = np.random.default_rng(seed)
    sizes, copies = np.unique(np.abs(sums), return_counts=True)
    chunk = max(1, DRAWN_AT_ONCE // len(sizes))
    for start in range(0, resamples, chunk):
        positive = rng.binomial(copies, 0.5, size=(min(chunk, resamples - start), len(sizes)))
        yield (2 * positive - copies) @ sizes
