"""Cutting parameters: whatever the cuts, the same elements come back."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.training.pieces import Piece, moves

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Piece]:
    """Pieces that are a whole together: equal parts along some axis, each cut into uneven rows."""
    choices = [(None, 1)]
    choices += [(axis, parts) for axis, n in enumerate(shape) for parts in range(2, 5) if n and n % parts == 0]
    axis, parts = draw(st.sampled_from(choices))
    found = []
    for part in range(parts):
        piece = Piece.cut(shape, axis, part, parts)
        borders = sorted(draw(st.lists(st.integers(0, piece.height), max_size=3)))
        found += [piece.rows(*pair) for pair in zip([0, *borders], [*borders, piece.height], strict=True)]
    return found


def taken(whole: np.ndarray, piece: Piece) -> np.ndarray:
    """The piece of a whole tensor, by plain indexing."""
    part = whole if piece.axis is None else np.split(whole, piece.parts, piece.axis)[piece.part]
    rows = part.reshape(piece.height, piece.width)[piece.start : piece.stop]
    return rows.reshape(piece.local_shape)


def carried(source: Piece, values: np.ndarray, target: Piece, into: np.ndarray) -> None:
    """Makes the moves, element by element."""
    for move in moves(source, target):
        for number in range(move.count):
            a, b = move.source + number * move.source_stride, move.target + number * move.target_stride
            into[b : b + move.length] = values[a : a + move.length]


@settings(max_examples=300, deadline=None)
@given(st.data(), shapes)
def test_any_layout_becomes_any_other(data: st.DataObject, shape: tuple[int, ...]) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    before, after = data.draw(cuts(shape)), data.draw(cuts(shape))
    assert sum(piece.numel for piece in before) == whole.size
    for target in after:
        assert target.fault() is None
        into = np.full(target.numel, -1)
        for source in before:
            carried(source, taken(whole, source).reshape(-1), target, into)
        assert np.array_equal(into.reshape(target.local_shape), taken(whole, target))


def test_the_moves_are_few() -> None:
    """A matrix cut along its last axis has a stretch in every row, and still is one strided copy."""
    whole = Piece.whole((64, 4096, 1024))
    columns = Piece.cut((64, 4096, 1024), 2, 1, 4)
    assert list(moves(whole, columns)) == [(256, 0, 256, 64 * 4096, 1024, 256)]
    assert list(moves(whole, whole)) == [(0, 0, 64 * 4096 * 1024, 1, 0, 0)]
    assert len(list(moves(Piece.cut((64, 4096, 1024), 1, 1, 4), columns))) <= 64


def test_what_cannot_be_a_piece_is_said() -> None:
    assert Piece((4, 6), None, 1, 2, 0, 4).fault() == "is a part of a tensor that is not cut"
    assert Piece((4, 6), 2, 0, 2, 0, 4).fault() == "is cut along axis 2 of 2"
    assert Piece((4, 6), 1, 2, 2, 0, 4).fault() == "is part 2 of 2"
    assert Piece((4, 6), 1, 0, 4, 0, 4).fault() == "is cut into 4 unequal parts"
    assert Piece((4, 6), 0, 0, 2, 0, 3).fault() == "has rows 0 to 3 of 2"
    assert Piece((4, 6), 0, 0, 2, 0, 2).fault() is None
