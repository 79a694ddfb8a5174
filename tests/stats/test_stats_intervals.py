"""Intervals against published tables, other implementations, and the coverage that they promise."""

import csv
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from calledshot.stats import FEW, Interval, bootstrap_interval, mean_interval, wilson

outcomes = st.lists(st.integers(0, 5), min_size=2, max_size=40)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombes_table(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe (1998), Statistics in Medicine 17:857, table I, method 3."""
    interval = wilson(successes, trials)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_wilson_covers_the_truth_about_as_often_as_it_says(share: float) -> None:
    """Exact coverage at n = 100, by summing the binomial: Brown, Cai and DasGupta (2001) find it near 95 %."""
    covered = [share in wilson(successes, 100) for successes in range(101)]
    coverage = scipy.stats.binom.pmf(np.arange(101), 100, share)[covered].sum()
    assert 0.92 < coverage < 0.98


@given(st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.9999))
def test_wilson_stays_within_0_and_1_and_holds_the_share(counts: tuple[int, int], level: float) -> None:
    interval = wilson(*counts, level=level)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert wilson(*counts, level=0.9999).half_width >= interval.half_width


def test_t_interval_of_students_sleep_data() -> None:
    """Student (1908); R prints 0.7001142 and 2.4598858 for `t.test(extra ~ group, paired = TRUE)`."""
    interval = mean_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (interval.low, interval.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)


def test_t_interval_has_the_standard_errors_of_lm_evaluation_harness(shared: Callable[[str], Path]) -> None:
    """All PIQA cells of Pythia: 1,838 items, and the harness's own `acc_stderr`."""
    with lzma.open(shared("evals/pythia_evals/pythia_v1_evals.csv.xz"), "rt") as file:
        cells = [row for row in csv.DictReader(file) if row["task"] == "piqa"]
    assert len(cells) > 400
    for cell in cells:
        right = round(float(cell["acc"]) * 1838)
        interval = mean_interval(np.arange(1838) < right)
        assert interval.half_width / stdtrit(1837, 0.975) == pytest.approx(float(cell["acc_stderr"]), rel=1e-9)


def test_asking_each_question_five_times_over_narrows_nothing_when_clustered() -> None:
    answers = np.array([1, 0, 0, 1, 1, 0, 1, 1])
    once = mean_interval(answers)
    asked = np.repeat(np.arange(8), 5)
    again = mean_interval(np.repeat(answers, 5), clusters=asked)
    assert (again.low, again.high) == pytest.approx((once.low, once.high))
    assert mean_interval(np.repeat(answers, 5)).half_width < once.half_width / 2


def test_cluster_robust_error_worked_by_hand() -> None:
    """Mean 2/5; residuals sum to 6/5, -4/5 and -2/5; their squares to 2.24, times 3/2; the root of that over 5."""
    interval = mean_interval([1, 1, 0, 0, 0], clusters=["a", "a", "b", "b", "c"])
    assert interval.half_width == pytest.approx(stdtrit(2, 0.975) * math.sqrt(1.5 * 2.24) / 5)


def test_weights_count_bytes_rather_than_documents() -> None:
    """Bits per byte of two documents, of 100 and 300 bytes: all bits over all bytes."""
    assert mean_interval([2.0, 1.0], weights=[100, 300]).value == (200 + 300) / 400
    assert bootstrap_interval([2.0, 1.0], weights=[100, 300]).value == (200 + 300) / 400


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_bootstrap_agrees_with_scipys(method: str) -> None:
    values = np.random.default_rng(4).exponential(size=40)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=40_000, method=method, rng=1).confidence_interval
    ours = bootstrap_interval(values, method="bca" if method == "BCa" else "percentile", resamples=40_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_drawing_equal_items_together_changes_nothing_but_the_time() -> None:
    """400 outcomes of 0 and 1 are drawn by kind, and with a trace of noise, one by one."""
    values = np.random.default_rng(5).random(400) < 0.2
    together = bootstrap_interval(values, resamples=40_000)
    one_by_one = bootstrap_interval(values + np.random.default_rng(6).normal(0, 1e-9, 400), resamples=40_000)
    assert (together.low, together.high) == pytest.approx((one_by_one.low, one_by_one.high), abs=0.003)


def test_only_intervals_by_cluster_cover_the_truth_when_items_depend() -> None:
    """40 passages of 10 questions, each passage easy or hard: how many of 300 intervals hold the truth?"""
    rng = np.random.default_rng(7)
    passage = np.repeat(np.arange(40), 10)
    covered = {"t by item": 0, "t": 0, "bca": 0, "percentile": 0}
    for repetition in range(300):
        answers = rng.random(400) < rng.beta(1, 1, size=40)[passage]
        covered["t by item"] += 0.5 in mean_interval(answers)
        covered["t"] += 0.5 in mean_interval(answers, clusters=passage)
        for method in ("bca", "percentile"):
            interval = bootstrap_interval(answers, clusters=passage, method=method, resamples=1000, seed=repetition)
            covered[method] += 0.5 in interval
    assert covered["t by item"] < 225
    assert all(273 <= covered[method] <= 297 for method in ("t", "bca", "percentile"))


@given(st.lists(st.integers(0, 5), min_size=FEW, max_size=40), st.integers(0, 2**32))
def test_bootstrap_stays_within_the_sample_and_repeats_itself(values: list[int], seed: int) -> None:
    interval = bootstrap_interval(values, resamples=200, seed=seed)
    assert min(values) <= interval.low <= interval.value <= interval.high <= max(values)
    assert interval == bootstrap_interval(values, resamples=200, seed=seed)


def test_few_documents_of_very_different_sizes_are_not_made_to_look_solid() -> None:
    """Bits per byte around 1, sizes log-normal: how many of 500 intervals hold the truth?"""
    rng = np.random.default_rng(9)
    for documents in (2, 3, 5, FEW - 1):
        covered = by_count = 0
        for _ in range(500):
            sizes, bits = np.exp(rng.normal(8, 1.2, documents)), rng.normal(1, 0.3, documents)
            covered += 1 in bootstrap_interval(bits, weights=sizes)
            by_count += 1 in mean_interval(bits, weights=sizes)
        assert covered >= 460 > by_count, documents


def test_a_sample_without_spread_has_an_interval_without_width() -> None:
    interval = bootstrap_interval([0.1] * 7)
    assert interval.value == pytest.approx(0.1)
    assert interval.half_width < 1e-15


def test_one_cluster_alone_says_nothing() -> None:
    for interval in (mean_interval([1, 0, 1], clusters=[8, 8, 8]), bootstrap_interval([1, 0, 1], clusters=[8, 8, 8])):
        assert interval == Interval(2 / 3, -math.inf, math.inf)


def test_a_million_outcomes_take_less_than_a_second() -> None:
    answers = np.random.default_rng(8).random(1_000_000) < 0.3
    start = time.process_time()
    interval = bootstrap_interval(answers)
    assert time.process_time() - start < 1
    assert interval.half_width == pytest.approx(1.96 * math.sqrt(0.3 * 0.7 / 1e6), rel=0.03)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0]]])
def test_what_is_no_sample_is_refused(values: list) -> None:
    with pytest.raises(ValueError):
        mean_interval(values)


def test_weights_of_nothing_and_labels_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        mean_interval([1, 2], weights=[1, 0])
    with pytest.raises(ValueError, match="labels"):
        mean_interval([1, 2], clusters=[1, 2, 3])
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)
    for interval in (mean_interval, bootstrap_interval):
        with pytest.raises(ValueError, match="level"):
            interval([0, 1], level=95)
