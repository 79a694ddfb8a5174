"""Many tests at once: p-values adjusted so that `adjusted <= q` keeps the promise for the whole table.

Each function takes (M,) p-values in any order and returns (M,) float64 in the same order. The first two promise a
share q of false discoveries among those reported, the last two a probability q of any false one.
"""

import numpy as np
from numpy.typing import ArrayLike

from calledshot.stats.intervals import Floats


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """False-discovery rate for independent or positively dependent tests (Benjamini and Hochberg 1995)."""
    p_values = _checked(p_values)
    return _step_up(p_values, factor=1.0)


def benjamini_yekutieli(p_values: ArrayLike) -> Floats:
    """False-discovery rate under any dependence (Benjamini and Yekutieli 2001): dearer by 1 + 1/2 + ... + 1/M."""
    p_values = _checked(p_values)
    return _step_up(p_values, factor=float(np.sum(1 / np.arange(1, len(p_values) + 1))))


def holm(p_values: ArrayLike) -> Floats:
    """Family-wise error under any dependence, never weaker than Bonferroni (Holm 1979)."""
    p_values = _checked(p_values)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(adjusted, 1.0)


def bonferroni(p_values: ArrayLike) -> Floats:
    """Family-wise error under any dependence: each p-value times M."""
    p_values = _checked(p_values)
    return np.minimum(p_values * len(p_values), 1.0)


def _checked(p_values: ArrayLike) -> Floats:
    p_values = np.asarray(p_values, dtype=np.float64)
    if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError("p-values are a list of numbers from 0 to 1: leave out the cells without a test")
    return p_values


def _step_up(p_values: Floats, *, factor: float) -> Floats:
    descending = np.argsort(-p_values, kind="stable")
    ranks = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[descending] = np.minimum.accumulate(p_values[descending] * (len(p_values) / ranks) * factor)
    return np.minimum(adjusted, 1.0)
