from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.objective.chance import key, uniform, words
from calledshot.objective.spans import roll, span_counts, span_mask


def masks(lengths, rate, mean, seed=0):
    lengths = np.array(lengths, np.int64)
    rates, means = np.full(len(lengths), rate), np.full(len(lengths), mean)
    taken, spans = span_counts(lengths, rates, means)
    total = int(lengths.sum())
    mask = span_mask(lengths, taken, spans, words(np.full(total, key("test", seed), np.uint64), np.arange(total)))
    return np.split(mask, np.cumsum(lengths)[:-1]), taken, spans


def runs(mask):
    return [(bool(value), len(list(group))) for value, group in groupby(mask.tolist())]


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.floats(1, 70),
    st.integers(0, 2**40),
)
@settings(max_examples=150)
def test_each_piece_loses_t5s_number_of_tokens_in_t5s_number_of_spans(lengths, rate, mean, seed):
    found, taken, spans = masks(lengths, rate, mean, seed)
    for mask, length, gone, count in zip(found, lengths, taken.tolist(), spans.tolist(), strict=True):
        assert gone == min(max(round(length * rate), 1), length - 1)
        assert count == min(max(round(gone / mean), 1), length - gone)
        parts = runs(mask)
        assert [value for value, _ in parts] == [False, True] * count
        assert sum(size for value, size in parts if value) == gone


def test_t5s_own_example_and_the_shortest_pieces():
    # random_spans_noise_mask of T5's tests: 32 tokens, rate .25, mean 2.
    (mask,), taken, spans = masks([32], 0.25, 2.0)
    assert (taken[0], spans[0], mask.sum(), runs(mask).count((True, 2)) <= 4) == (8, 4, 8, True)
    found, taken, spans = masks([0, 1, 2, 3], 0.15, 3.0)
    assert [mask.tolist() for mask in found][:3] == [[], [True], [False, True]]
    assert taken.tolist() == [0, 1, 1, 1] and spans.tolist() == [0, 1, 1, 1]
    assert [mask.tolist() for mask in masks([10], 0.9, 1.0)[0]] == [[False] + [True] * 9]


def test_compositions_are_equally_likely():
    # 4 of 8 tokens in 2 spans: 3 compositions of what stays times 3 of what goes.
    found, _, _ = masks([8] * 18_000, 0.5, 2.0)
    counts = Counter(tuple(mask.tolist()) for mask in found)
    assert len(counts) == 9
    # Expected 2,000 each, standard deviation 42.
    assert all(abs(count - 2000) < 5 * 42 for count in counts.values())


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.data())
def test_rolling_is_numpys(lengths, data):
    turns = [data.draw(st.integers(0, max(length - 1, 0))) for length in lengths]
    mask = np.random.default_rng(0).random(sum(lengths)) < 0.5
    expected = [np.roll(part, turn) for part, turn in zip(np.split(mask, np.cumsum(lengths)[:-1]), turns, strict=True)]
    assert np.array_equal(roll(mask, np.array(lengths), np.array(turns)), np.concatenate(expected))


def test_chance_is_splitmix64():
    # The reference generator's first numbers from seed 1234567 (Vigna, prng.di.unimi.it).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words(np.full(3, 1234567, np.uint64), np.arange(3)).tolist() == expected
    numbers = uniform(words(np.full(40_000, key("a", 1), np.uint64), np.arange(40_000)))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(np.full(10, 4000), abs=5 * 60)
