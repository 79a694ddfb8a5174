"""Paired tests and the exact binomial against Fisher, R, and graded solutions of real models."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from calledshot.stats import binomial_test, mcnemar, paired_comparison, paired_permutation

# Darwin's maize, crossed less self-fertilised, in eighths of an inch (Fisher 1935, The Design of Experiments, §17).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_every_swap_of_darwins_maize() -> None:
    """Fisher counts 863 of 32,768 arrangements as large as the one seen, on either side: 5.267 %."""
    assert paired_permutation(MAIZE, [0] * 15, resamples=2**15) == 2 * 863 / 2**15


def test_drawn_swaps_come_near_the_exact_answer() -> None:
    drawn = paired_permutation(MAIZE, [0] * 15, resamples=2**15 - 1)
    assert drawn == pytest.approx(2 * 863 / 2**15, abs=0.004)
    assert drawn != 2 * 863 / 2**15


def test_swaps_of_students_sleep_data() -> None:
    """Nine patients gained and one did not change: only the arrangement seen and its mirror are as extreme."""
    assert paired_permutation([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4], [0.0] * 10) == 2 / 2**9


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 50))
def test_on_right_and_wrong_the_permutation_test_is_mcnemars(only_a: int, only_b: int, both: int) -> None:
    a = [1] * only_a + [0] * only_b + [1] * both + [0]
    b = [0] * only_a + [1] * only_b + [1] * both + [0]
    assert paired_permutation(a, b, resamples=2**16) == pytest.approx(mcnemar(only_a, only_b))


def test_swapping_whole_clusters_needs_clusters_not_items() -> None:
    """A hundred items better in each of three documents: swaps of three documents can never show more than 2/8."""
    a, b = np.ones(300), np.zeros(300)
    assert paired_permutation(a, b, clusters=np.repeat([1, 2, 3], 100)) == 2 / 8
    assert paired_permutation(a, b) == 1 / 10_001


def test_mcnemar_of_airway_hyperresponsiveness() -> None:
    """Bentur et al. as quoted by Fagerland et al. (2013): 1 against 7 gives 0.070 exact and 0.039 mid-p."""
    assert mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(7, 1, mid_p=True) == pytest.approx(10 / 256)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1


def test_a_6b_verifier_beats_a_175b_model_on_gsm8k(shared: Callable[[str], Path]) -> None:
    """Cobbe et al. (2021)'s graded example solutions: 209 items only the one solves, 152 only the other, p = 0.0032."""
    with gzip.open(shared("evals/gsm8k/example_model_solutions.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    verifier = np.array([row["6b_verification"]["is_correct"] for row in rows], dtype=float)
    larger = np.array([row["175b_finetuning"]["is_correct"] for row in rows], dtype=float)
    only_verifier, only_larger = int(np.sum(verifier > larger)), int(np.sum(verifier < larger))
    assert (only_verifier, only_larger) == (209, 152)
    assert round(mcnemar(only_verifier, only_larger), 4) == 0.0032
    comparison = paired_comparison(verifier, larger)
    assert comparison.difference.value == pytest.approx((209 - 152) / 1319)
    assert comparison.p_value == pytest.approx(0.0032, abs=0.0015)
    assert 0 < comparison.difference.low < 0.02


def test_paired_tests_hold_their_level_where_nothing_differs() -> None:
    """Of 400 comparisons of a model with itself at another temperature, about one in twenty may look real."""
    rng = np.random.default_rng(9)
    difficulty = rng.random(120)
    alarms = outside = 0
    for repetition in range(400):
        a, b = rng.random(120) < difficulty, rng.random(120) < difficulty
        comparison = paired_comparison(a, b, resamples=999, seed=repetition)
        alarms += comparison.p_value <= 0.05
        outside += 0 not in comparison.difference
    assert 6 <= alarms <= 30
    assert 8 <= outside <= 34


def test_scores_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        paired_comparison([1, 0, 1], [1, 0])


def test_mendels_peas() -> None:
    """Conover (1971), as in R's help: 682 of 925 plants where 3/4 were expected; `binom.test` prints 0.3825."""
    assert round(binomial_test(682, 925, 0.75), 4) == 0.3825


def test_an_untrained_model_that_always_picks_one_side_is_significant_against_one_half() -> None:
    """WSC has 104 items of which 66 lie on one side: a coin would rarely do that, a constant answer always does."""
    assert binomial_test(66, 104, 0.5) == binomial_test(38, 104, 0.5) < 0.01
    assert binomial_test(66, 104, 0.5, alternative="greater") == pytest.approx(binomial_test(66, 104, 0.5) / 2)


@given(
    st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.0, 0.02, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
    st.sampled_from(["two-sided", "greater", "less"]),
)
def test_the_binomial_test_is_scipys(counts: tuple[int, int], chance: float, alternative: str) -> None:
    theirs = scipy.stats.binomtest(*counts, chance, alternative=alternative).pvalue
    assert binomial_test(*counts, chance, alternative=alternative) == pytest.approx(theirs, rel=1e-6, abs=1e-12)
    assert binomial_test(*counts, chance, alternative=alternative, mid_p=True) <= theirs + 1e-12


def test_a_chance_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="probability"):
        binomial_test(3, 4, math.pi)
