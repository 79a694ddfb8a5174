import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.data import packing
from calledshot.data.packing import best_fit, pack


def reference_best_fit(sizes, capacity):
    """The textbook, quadratic: each piece, largest first, into the fullest row that takes it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in range(len(rows)) if free[row] >= size]
        if fitting:
            row = min(fitting, key=lambda row: free[row])
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(size)
        free[row] -= size
    return sorted(sorted(row) for row in rows)


@given(st.lists(st.integers(1, 20), max_size=80))
def test_best_fit_decreasing_is_the_textbooks(sizes):
    rows = best_fit(np.array(sizes, np.int64), 20)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= 20 for row in rows)
    # Ties between equally full rows may fall either way, and change contents but not how full rows are.
    expected = reference_best_fit(sizes, 20)
    assert sorted(sum(sizes[i] for i in row) for row in rows) == sorted(map(sum, expected))


@given(st.lists(st.lists(st.integers(3, 100), max_size=40), max_size=5), st.integers(1, 40))
@settings(max_examples=80)
def test_every_pair_of_every_document_lies_in_exactly_one_row(parts, context):
    lengths = [np.array(part, np.int64) for part in parts]
    covered = [np.zeros(n - 1, int) for part in parts for n in part]
    for pieces, counts in pack(lengths, context):
        ends = np.cumsum(counts)
        assert ends[-1] == len(pieces)
        for start, end in zip(ends - counts, ends, strict=True):
            row = pieces[start:end]
            assert 0 < row["pairs"].sum() <= context
            for document, begin, pairs in row[["document", "start", "pairs"]].tolist():
                assert begin % context == 0
                covered[document][begin : begin + pairs] += 1
    assert all((document == 1).all() for document in covered)


def test_windows_bound_what_is_packed_together(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 100)
    lengths = np.random.default_rng(0).integers(3, 30, 1050)
    windows = list(pack([lengths], 64))
    assert [len(pieces) for pieces, _ in windows] == [100] * 10 + [50]
    for number, (pieces, _) in enumerate(windows):
        assert set(pieces["document"]) == set(range(number * 100, min(number * 100 + 100, 1050)))


@pytest.mark.parametrize("context", [256, 2048])
def test_little_is_lost_on_documents_of_all_lengths(context):
    lengths = np.random.default_rng(1).lognormal(5.5, 1.5, 20_000).astype(np.int64) + 3
    rows = pairs = 0
    for pieces, counts in pack([lengths], context):
        rows += len(counts)
        pairs += int(pieces["pairs"].sum())
    assert pairs == lengths.sum() - len(lengths)
    assert 1 - pairs / (rows * context) < 0.002
