"""Best-fit packing: documents become rows of T (input, target) pairs, and nothing is dropped.

A document of n ids gives n - 1 pairs. One longer than a row is cut into full rows and a remainder; remainders and
short documents are packed best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") within
windows, so that cost and memory stay bounded. What rows have left is padding, and its share is the packing loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

WINDOW = 65_536
"""Pieces packed together."""

PIECE = np.dtype([("document", "<i8"), ("start", "<i8"), ("pairs", "<i8")])
"""A run of `pairs` pairs of document number `document`, from its pair `start` on."""


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `sizes` (each 1..capacity), packed best-fit-decreasing; O(n (log n + capacity / 64))."""
    order = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    # Rows with `f` free places wait in by_free[f]; bit f of `levels` says that there are some.
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    levels = 0
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = levels >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = by_free[free].pop()
            if not by_free[free]:
                levels ^= 1 << free
            rows[row].append(index)
        else:
            free = capacity
            row = len(rows)
            rows.append([index])
        left = free - size
        if left:
            by_free[left].append(row)
            levels |= 1 << left
    return rows


def pack(lengths: Iterable[np.ndarray], context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of rows for documents whose lengths in ids come in arrays, in order.

    Yields (pieces, counts): `pieces` of dtype PIECE in row order, `counts` int64 with the number of pieces of each row.
    """
    waiting: list[np.ndarray] = []
    held = 0
    first = 0
    for part in lengths:
        pieces = _cut(np.asarray(part, np.int64) - 1, first, context)
        first += len(part)
        full = pieces[pieces["pairs"] == context]
        if len(full):
            yield full, np.ones(len(full), np.int64)
        short = pieces[pieces["pairs"] < context]
        waiting.append(short)
        held += len(short)
        if held >= WINDOW:
            joined = np.concatenate(waiting)
            whole = held - held % WINDOW
            for begin in range(0, whole, WINDOW):
                yield _window(joined[begin : begin + WINDOW], context)
            waiting = [joined[whole:]]
            held -= whole
    if held:
        yield _window(np.concatenate(waiting), context)


def _cut(pairs: np.ndarray, first: int, context: int) -> np.ndarray:
    """The pieces of documents `first`, `first + 1`, … that have so many pairs each."""
    counts = -(-pairs // context)
    pieces = np.empty(int(counts.sum()), PIECE)
    local = np.repeat(np.arange(len(pairs)), counts)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces["document"] = local + first
    pieces["start"] = within * context
    pieces["pairs"] = np.minimum(pairs[local] - within * context, context)
    return pieces


def _window(pieces: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    rows = best_fit(pieces["pairs"], context)
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return pieces[np.concatenate([np.asarray(row, np.int64) for row in rows])], counts
