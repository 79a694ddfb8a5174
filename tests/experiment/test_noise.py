"""The tests between arms are those of the textbooks, and keep their promise when nothing is there to be found."""

import numpy as np
import pytest
from scipy import stats

from calledshot.experiment.noise import Noise, contrast, own, pooled, rank_correlation, smallest
from calledshot.stats import benjamini_hochberg

RNG = np.random.default_rng(20260131)


def test_pooled_spread_is_that_of_an_analysis_of_variance():
    groups = [RNG.normal(size=size) + place for place, size in enumerate((3, 3, 5, 1))]
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    noise = pooled(groups)
    assert noise.degrees == 8 and noise.arms == 3
    assert noise.sd == pytest.approx(np.sqrt(within / 8))
    assert pooled([[1.0], [2.0]]) is None


def test_two_arms_alone_give_students_t():
    a, b = RNG.normal(size=4), RNG.normal(size=4) + 0.5
    noise = pooled([a, b])
    expected = stats.ttest_ind(a, b)
    found = contrast(a, b, noise, noise)
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_arms_with_spreads_of_their_own_give_welchs_t():
    a, b = RNG.normal(size=3), 5 * RNG.normal(size=5)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert contrast(a, b, own(a), own(b)).p_value == pytest.approx(expected.pvalue)


def test_equal_numbers_are_no_difference_and_others_are_one():
    silent = Noise(0.0, 4, 2)
    assert contrast([1.0, 1.0], [1.0], silent, silent).p_value == 1.0
    assert contrast([1.0, 1.0], [2.0], silent, silent).p_value == 0.0


def test_a_single_seed_against_three_needs_this_much():
    noise = Noise(0.01, 4, 2)
    least = smallest(noise, 1, 3)
    assert contrast([least], [0.0] * 3, noise, noise).p_value == pytest.approx(0.05)
    assert least == pytest.approx(stats.t.ppf(0.975, 4) * 0.01 * np.sqrt(4 / 3))


def test_twenty_null_arms_give_a_false_verdict_in_one_suite_of_twenty_at_most():
    """Three seeds of the baseline and of three compared arms, one of seventeen others: 20 tests, a large suite."""
    suites, wrong = 1500, 0
    for _ in range(suites):
        base, compared, others = RNG.normal(size=3), RNG.normal(size=(3, 3)), RNG.normal(size=(17, 1))
        noise = pooled([base, *compared])
        p_values = [contrast(arm, base, noise, noise).p_value for arm in (*compared, *others)]
        wrong += bool((benjamini_hochberg(p_values) <= 0.05).any())
    assert wrong / suites < 0.05 + 3 * np.sqrt(0.05 * 0.95 / suites)


def test_seeds_that_share_their_data_make_the_tests_timid():
    """Runs of one seed see the same batches: what all arms gain or lose by these is no difference between them."""
    suites, wrong = 1000, 0
    for _ in range(suites):
        shared = RNG.normal(size=3)
        base, arm, other = (shared + 0.5 * RNG.normal(size=3) for _ in range(3))
        noise = pooled([base, arm, other])
        wrong += contrast(arm[:1], base, noise, noise).p_value <= 0.05
    assert wrong / suites < 0.05


def test_rank_correlation_is_spearmans():
    a, b = RNG.normal(size=12), RNG.normal(size=12)
    a[3] = a[5]
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None
