"""No more digits than the interval supports."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calledshot.stats import Interval, format_interval, format_value, wilson


def test_gsm8k_has_no_decimals() -> None:
    """91.2 % of 1,319 items is known to a point and a half: 91, and 92 is not told apart from it."""
    assert format_value(wilson(1203, 1319), scale=100) == "91"
    assert format_interval(wilson(1203, 1319), scale=100) == "91 [90, 93]"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.28374, 1.28274, 1.28474), "1.284"),
        (Interval(1.28374, 1.26, 1.31), "1.28"),
        (Interval(0.5, 0.1, 0.9), "0.5"),
        (Interval(61234.0, 60000.0, 62500.0), "61000"),
        (Interval(-0.001, -0.1, 0.1), "0.0"),
        (Interval(0.25, 0.25, 0.25), "0.250000"),
        (Interval(0.25, -math.inf, math.inf), "?"),
        # Half a width of 0.96 rounds to 1: the first decimal says nothing.
        (Interval(91.23, 90.27, 92.19), "91"),
    ],
)
def test_digits_end_where_the_half_width_begins(interval: Interval, text: str) -> None:
    assert format_value(interval) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e5), st.floats(1e-5, 1e5))
def test_rounding_costs_less_than_the_half_width(value: float, below: float, above: float) -> None:
    interval = Interval(value, value - below, value + above)
    assert abs(float(format_value(interval)) - value) <= interval.half_width
