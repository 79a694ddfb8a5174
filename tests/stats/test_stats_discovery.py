"""Adjusted p-values against the papers, R's p.adjust, and a table of true and false effects."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from calledshot.stats import benjamini_hochberg, benjamini_yekutieli, bonferroni, holm

# Fifteen outcomes of a trial on myocardial infarction, as tested in Benjamini and Hochberg (1995), section 3.2.
INFARCTION = [
    *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590),
    1.0,
]
p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=30)
adjustments = st.sampled_from([benjamini_hochberg, benjamini_yekutieli, bonferroni, holm])


def test_benjamini_and_hochberg_report_four_where_bonferroni_reports_three() -> None:
    assert int(np.sum(benjamini_hochberg(INFARCTION) <= 0.05)) == 4
    assert int(np.sum(bonferroni(INFARCTION) <= 0.05)) == 3


@pytest.mark.parametrize(
    ("adjust", "expected"),
    [
        (benjamini_hochberg, [0.05, 0.05, 0.05, 0.05, 0.05]),
        (benjamini_yekutieli, [0.1141667, 0.1141667, 0.1141667, 0.1141667, 0.1141667]),
        (holm, [0.05, 0.09, 0.08, 0.09, 0.09]),
        (bonferroni, [0.05, 0.20, 0.10, 0.25, 0.15]),
    ],
)
def test_adjusted_values_are_those_of_r(adjust: Callable, expected: list[float]) -> None:
    """`p.adjust(c(.01, .04, .02, .05, .03), method)`; 0.1141667 is 0.05 (1 + 1/2 + 1/3 + 1/4 + 1/5)."""
    assert adjust([0.01, 0.04, 0.02, 0.05, 0.03]) == pytest.approx(expected, abs=1e-7)


def test_a_tenth_of_the_discoveries_is_false_when_a_tenth_is_allowed() -> None:
    """1,000 tests, 200 of them with an effect, 50 times over: of those reported, q 800/1000 are false."""
    rng = np.random.default_rng(12)
    shares = []
    for _ in range(50):
        z = rng.normal(np.where(np.arange(1000) < 200, 3.0, 0.0))
        reported = benjamini_hochberg(2 * ndtr(-np.abs(z))) <= 0.1
        shares.append(reported[200:].sum() / reported.sum())
    assert np.mean(shares) == pytest.approx(0.08, abs=0.01)


@given(p_lists, adjustments)
def test_adjusting_keeps_the_order_and_never_flatters(p_values: list[float], adjust: Callable) -> None:
    adjusted, given_values = adjust(p_values), np.array(p_values)
    assert (adjusted >= given_values * (1 - 1e-12)).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(given_values)]) >= 0).all()
    backwards = adjust(p_values[::-1])[::-1]
    assert (adjusted == backwards).all()


@given(p_lists)
def test_from_hochberg_to_bonferroni_each_promises_more(p_values: list[float]) -> None:
    slack = 1 + 1e-9
    assert (benjamini_hochberg(p_values) <= holm(p_values) * slack).all()
    assert (holm(p_values) <= bonferroni(p_values) * slack).all()
    assert (benjamini_hochberg(p_values) <= benjamini_yekutieli(p_values) * slack).all()


@given(p_lists, st.data())
def test_a_smaller_p_value_makes_no_other_test_worse(p_values: list[float], data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(p_values) - 1))
    smaller = [p * 0.5 if index == which else p for index, p in enumerate(p_values)]
    assert (benjamini_hochberg(smaller) <= benjamini_hochberg(p_values) * (1 + 1e-12)).all()


def test_an_empty_table_has_nothing_to_adjust_and_nan_is_refused() -> None:
    assert benjamini_hochberg([]).shape == (0,)
    with pytest.raises(ValueError, match="without a test"):
        holm([0.2, float("nan")])
