"""How many items a difference needs: published numbers, and simulations of the promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calledshot.stats import (
    items_needed,
    paired_items_needed,
    paired_power,
    paired_smallest_difference,
    power_of,
    smallest_difference,
)

rates = st.floats(0.01, 0.99)


def test_fifty_against_fifty_four_needs_2445_items() -> None:
    assert items_needed(0.50, 0.54) == items_needed(0.54, 0.50) == 2445
    assert power_of(0.50, 0.54, 2445) >= 0.8 > power_of(0.50, 0.54, 2444)


@pytest.mark.parametrize(("items", "points"), [(1000, 6.3), (164, 15.5)])
def test_smallest_difference_of_a_thousand_items_and_of_humaneval(items: int, points: float) -> None:
    assert round(100 * smallest_difference(items), 1) == points


@pytest.mark.parametrize(("item_variance", "items"), [(1 / 9, 969), (1 / 9 + 2 * 1 / 6, 3876)])
def test_millers_example_of_three_points(item_variance: float, items: int) -> None:
    """Miller (2024), section 5: ω² = 1/9, σ² = 1/6 for each of two models, δ = 0.03; all samples an item, and one."""
    assert paired_items_needed(0.03, item_variance + 0.03**2) == items


def test_the_promised_power_is_what_simulated_evaluations_find() -> None:
    """2,445 items each at true rates 0.50 and 0.54: a z-test sees the difference in 80 % of 4,000 repetitions."""
    rng = np.random.default_rng(10)
    a, b = rng.binomial(2445, 0.50, 4000) / 2445, rng.binomial(2445, 0.54, 4000) / 2445
    seen = np.abs(a - b) / np.sqrt((a * (1 - a) + b * (1 - b)) / 2445) > 1.959964
    assert seen.mean() == pytest.approx(0.8, abs=0.02)


def test_the_promised_power_holds_for_paired_items_too() -> None:
    """Models that disagree on 20 % of items and differ by 4 points: McNemar's z sees it in 80 % of repetitions."""
    items = paired_items_needed(0.04, 0.20)
    assert items < items_needed(0.50, 0.54) / 2
    only_a, only_b, _ = np.random.default_rng(11).multinomial(items, [0.12, 0.08, 0.80], size=4000).T
    difference, discordance = (only_a - only_b) / items, (only_a + only_b) / items
    seen = np.abs(difference) / np.sqrt((discordance - difference**2) / items) > 1.959964
    assert seen.mean() == pytest.approx(0.8, abs=0.02)


@given(st.integers(10, 10**6), st.floats(0.01, 1.0))
def test_the_smallest_paired_difference_has_the_power_asked_for(items: int, discordance: float) -> None:
    difference = paired_smallest_difference(items, discordance, power=0.9)
    if difference <= discordance:
        assert paired_power(difference, discordance, items) == pytest.approx(0.9, abs=1e-6)


@given(rates, rates, st.integers(1, 10**5))
def test_power_grows_with_items_and_never_falls_below_the_level(a: float, b: float, items: int) -> None:
    assert 0.05 - 1e-9 <= power_of(a, b, items) <= power_of(a, b, 2 * items) + 1e-12 <= 1 + 1e-9


def test_certain_answers_and_impossible_questions() -> None:
    assert power_of(0.0, 1.0, 1) == 1
    assert power_of(1.0, 1.0, 1000) == 0
    with pytest.raises(ValueError, match="difference of 0"):
        items_needed(0.5, 0.5)
    with pytest.raises(ValueError, match="discordant"):
        paired_items_needed(0.2, 0.1)
    with pytest.raises(ValueError, match="power"):
        smallest_difference(100, power=1.0)
    with pytest.raises(ValueError, match="level"):
        smallest_difference(100, level=95)
