"""Best-fit packing: documents become rows of T (input, target) pairs, and nothing is dropped.

A document of n ids gives n - 1 pairs. One longer than a row is cut into full rows and a remainder; remainders and
short documents are packed best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") within
windows, so that cost and memory stay bounded. What rows have left is padding, and its share is the packing loss.

Where an objective puts tokens in, a piece takes more of a row than it has pairs: a `Fitting` says how much, and how
long pieces may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

WINDOW = 65_536
"""Pieces packed together."""

PIECE = np.dtype([("document", "<i8"), ("start", "<i8"), ("pairs", "<i8"), ("task", "<i8"), ("last", "?")])
"""A run of `pairs` pairs of document number `document`, from its pair `start` on: for which task of the objective, and
whether the document ends with it."""


@dataclass(frozen=True)
class Fitting:
    """How pieces are cut and what place they take; the default is a place a pair, and one task."""

    capacity: int
    """Places of a row."""
    cuts: np.ndarray
    """int64: pairs of the longest piece of each task."""
    places: Callable[[np.ndarray], np.ndarray] = lambda pieces: pieces["pairs"]
    """Places that each of some pieces takes, 1 to `capacity`."""
    tasks: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """The task of pieces, from the numbers of their documents and their own within them; None where there is one."""
    smallest: int = 1
    """Places of the smallest piece: a row with fewer left is full."""
    units: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    """(order, counts, places) of pieces that share a row whole: `order` has those of a unit together, `counts` says how
    many each unit has, `places` what it takes, 1 to `capacity`. None where each piece is one."""


def pairs_fitting(pairs: int) -> Fitting:
    """Rows of so many pairs."""
    return Fitting(pairs, np.array([pairs]))


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


def pack(lengths: Iterable[np.ndarray], fitting: Fitting | int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of rows for documents whose lengths in ids come in arrays, in order; `fitting` may be a row's pairs.

    Yields (pieces, counts): `pieces` of dtype PIECE in row order, `counts` int64 with the number of pieces of each row.
    Pieces that fill a row come first and alone, the others in the order of their documents.
    """
    if isinstance(fitting, int):
        fitting = pairs_fitting(fitting)
    waiting: list[np.ndarray] = []
    held = 0
    first = 0
    for part in lengths:
        pieces = cut(np.asarray(part, np.int64) - 1, first, fitting)
        first += len(part)
        full = fills_row(pieces, fitting)
        if full.any():
            yield pieces[full], np.ones(np.count_nonzero(full), np.int64)
        short = pieces[~full]
        waiting.append(short)
        held += len(short)
        if held >= WINDOW:
            joined = np.concatenate(waiting)
            whole = held - held % WINDOW
            for begin in range(0, whole, WINDOW):
                yield _window(joined[begin : begin + WINDOW], fitting)
            waiting = [joined[whole:]]
            held -= whole
    if held:
        yield _window(np.concatenate(waiting), fitting)


def pack_pieces(pieces: np.ndarray, fitting: Fitting) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of rows, as of `pack`, for pieces that are cut already and none of which takes more than a row."""
    for begin in range(0, len(pieces), WINDOW):
        yield _window(pieces[begin : begin + WINDOW], fitting)


def fills_row(pieces: np.ndarray, fitting: Fitting) -> np.ndarray:
    """bool: the pieces that leave no room for another."""
    return fitting.places(pieces) + fitting.smallest > fitting.capacity


def cut(pairs: np.ndarray, first: int, fitting: Fitting) -> np.ndarray:
    """The pieces of documents `first`, `first + 1`, … that have so many pairs each."""
    most = -(-pairs // fitting.cuts.min())
    local = np.repeat(np.arange(len(pairs)), most)
    before = np.cumsum(most) - most
    ordinal = np.arange(len(local)) - np.repeat(before, most)
    task = np.zeros(len(local), np.int64) if fitting.tasks is None else fitting.tasks(local + first, ordinal)
    sizes = fitting.cuts[task]
    starts = np.cumsum(sizes) - sizes
    starts -= np.repeat(starts[before], most)
    left = pairs[local] - starts
    pieces = np.empty(len(local), PIECE)
    pieces["document"] = local + first
    pieces["start"] = starts
    pieces["pairs"] = np.minimum(left, sizes)
    pieces["task"] = task
    pieces["last"] = left <= sizes
    return pieces[left > 0]


def _window(pieces: np.ndarray, fitting: Fitting) -> tuple[np.ndarray, np.ndarray]:
    if fitting.units is None:
        rows = best_fit(fitting.places(pieces), fitting.capacity)
    else:
        order, counts, places = fitting.units(pieces)
        units = np.split(order, np.cumsum(counts)[:-1])
        rows = [np.concatenate([units[unit] for unit in row]) for row in best_fit(places, fitting.capacity)]
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return pieces[np.concatenate([np.asarray(row, np.int64) for row in rows])], counts
