"""Numbers with no more digits than their interval supports."""

import math

from calledshot.stats.intervals import Interval

# What an interval of no width prints: it comes from items that all gave the same number.
_MOST_DECIMALS = 6


def _decimals(interval: Interval) -> int:
    """Decimals that may be printed: to the first significant digit of the half-width; negative for tens and hundreds.

    A half-width of 0.015 supports two decimals, one of 1.5 none, one of 15 rounds to tens.
    """
    if interval.half_width == 0:
        return _MOST_DECIMALS
    first_digit = int(f"{interval.half_width:.0e}".partition("e")[2])
    return min(-first_digit, _MOST_DECIMALS)


def format_value(interval: Interval, *, scale: float = 1.0) -> str:
    """The estimate alone: "91" for an accuracy of 0.912 on 1,319 items at `scale=100`; "?" where nothing is known."""
    interval = _scaled(interval, scale)
    return _rounded(interval.value, _decimals(interval)) if math.isfinite(interval.half_width) else "?"


def format_interval(interval: Interval, *, scale: float = 1.0) -> str:
    """The estimate and the ends of its interval, to the same digit: "91 [89, 93]"."""
    interval = _scaled(interval, scale)
    if not math.isfinite(interval.half_width):
        return "?"
    places = _decimals(interval)
    value, low, high = (_rounded(number, places) for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _scaled(interval: Interval, scale: float) -> Interval:
    return Interval(interval.value * scale, interval.low * scale, interval.high * scale, interval.level)


def _rounded(number: float, places: int) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(number, places) + 0.0:.{max(places, 0)}f}"
