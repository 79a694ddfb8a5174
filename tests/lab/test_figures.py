import math

import pytest

from calledshot.lab import figures


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.count, 999, "999"),
        (figures.count, 4_123_456, "4.12M"),
        (figures.count, 999_600, "1.00M"),
        (figures.count, 3e13, "30.0T"),
        (figures.size, 1.5e9, "1.40 GiB"),
        (figures.power, 3.2e15, "3.20 × 10¹⁵"),
        (figures.significant, 6301.2, "6,300"),
        (figures.significant, 0.0001234, "0.000123"),
        (figures.significant, 99.96, "100"),
        (figures.duration, 9.54, "9.5 s"),
        (figures.duration, 485, "8 min 5 s"),
        (figures.duration, 3600, "1 h"),
        (figures.duration, 12 * 86_400 + 4 * 3600, "12 d 4 h"),
        (figures.percent, 0.8712, "87 %"),
        (figures.nats, 2.71828, "2.718"),
        (figures.date, "2026-03-01T09:05:00Z", "2026-03-01 09:05 UTC"),
    ],
)
def test_numbers_are_written_with_sensible_digits(write, value, text):
    assert write(value) == text


WRITERS = ("count", "size", "power", "significant", "duration", "percent", "nats", "date", "whole", "money")


@pytest.mark.parametrize("write", [getattr(figures, name) for name in WRITERS], ids=WRITERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "12", True, [1], {}, 10**400])
def test_what_is_not_a_number_is_not_available(write, value):
    assert write(value) == "n/a"


def test_no_mfu_above_one_hundred_per_cent_is_printed():
    assert figures.utilization(0.41, 0.47) == "41–47 %"
    assert figures.utilization(0.41, 0.411) == "41 %"
    assert figures.utilization(1.01, 1.2).startswith("n/a (refused")
    assert figures.utilization(0.6, 1.1) == "at least 60 % (upper end refused: above 100 %)"
    assert figures.utilization(None, 0.4) == "n/a"


def test_values_take_one_line():
    assert figures.written(["a\nb", 0.1, True, None, ""]) == "a\\nb, 0.1, true, —, (empty)"
    assert figures.flatten({"a": {"b": 1}, "c": [{"d": 2}], "e": [3]}) == {"a.b": 1, "c.0.d": 2, "e": [3]}
