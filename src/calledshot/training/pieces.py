"""Which part of a parameter a rank holds, and where that part lies in the whole and in other ranks' parts.

A parameter is cut twice at most: along one axis into equal parts (tensor or expert parallel), then by rows (FSDP), rows
being all axes but the last taken together, or the elements of a vector. So a piece, laid out flat, is a run of equal
stretches of the flat whole, the first and the last perhaps shortened; every question about pieces is one about those
stretches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of part `part` of the `parts` equal ones that axis `axis` of a tensor is cut into."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    axis: int | None
    part: int
    parts: int
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Piece:
        """All of a tensor."""
        return cls.cut(shape)

    @classmethod
    def cut(cls, shape: tuple[int, ...], axis: int | None = None, part: int = 0, parts: int = 1) -> Piece:
        """All rows of a part. An `axis` cut into one part is not cut."""
        axis = None if parts == 1 else axis
        piece = cls(tuple(shape), axis, part, parts, 0, 0)
        return piece.rows(0, piece.height)

    def rows(self, start: int, stop: int) -> Piece:
        """Rows `start` to `stop` of the same part."""
        return Piece(self.shape, self.axis, self.part, self.parts, start, stop)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the part whose rows these are."""
        return tuple(n // self.parts if axis == self.axis else n for axis, n in enumerate(self.shape))

    @property
    def width(self) -> int:
        """Elements of a row: the length of the part's last axis, 1 for vectors and scalars."""
        return self.part_shape[-1] if len(self.shape) > 1 else 1

    @property
    def height(self) -> int:
        """Rows of the part."""
        shape = self.part_shape
        return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return (self.stop - self.start) * self.width

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the piece as a tensor: the part's where it has all its rows, else (rows, width), or (rows,)."""
        if (self.start, self.stop) == (0, self.height):
            return self.part_shape
        return (self.stop - self.start, self.width) if len(self.shape) > 1 else (self.stop - self.start,)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the tensor is missing."""
        return self.axis is None and (self.start, self.stop) == (0, self.height)

    def fault(self) -> str | None:
        """What is impossible about a piece that somebody else wrote down; None for nothing."""
        if self.axis is None and (self.part, self.parts) != (0, 1):
            return "is a part of a tensor that is not cut"
        if self.axis is not None and not 0 <= self.axis < len(self.shape):
            return f"is cut along axis {self.axis} of {len(self.shape)}"
        if self.parts < 1 or not 0 <= self.part < self.parts:
            return f"is part {self.part} of {self.parts}"
        if self.axis is not None and self.shape[self.axis] % self.parts:
            return f"is cut into {self.parts} unequal parts"
        if not 0 <= self.start <= self.stop <= self.height:
            return f"has rows {self.start} to {self.stop} of {self.height}"
        return None

    def _stretches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each stretch begins in the whole and in the piece, both flat, and its length; (stretches,) int64."""
        if not self.numel:
            none = np.zeros(0, np.int64)
            return none, none, none
        inner = math.prod(self.shape[self.axis :]) if self.axis is not None else math.prod(self.shape)
        stretch = inner // self.parts
        first, last = self.start * self.width, self.stop * self.width
        number = np.arange(first // stretch, -(-last // stretch), dtype=np.int64)
        begin, end = np.maximum(number * stretch, first), np.minimum((number + 1) * stretch, last)
        return number * (inner - stretch) + self.part * stretch + begin, begin - first, end - begin


class Move(NamedTuple):
    """`count` copies of `length` elements each, from one flat tensor to another, at equal distances."""

    source: int
    """First element taken."""
    target: int
    """Where it goes."""
    length: int
    count: int
    source_stride: int
    target_stride: int


def moves(source: Piece, target: Piece) -> Iterator[Move]:
    """What of `target` is in `source`, two pieces of one tensor; nothing where they have nothing in common."""
    if (source.axis, source.parts) == (target.axis, target.parts):  # by far the most frequent, and done a thousand fold
        start, stop = max(source.start, target.start), min(source.stop, target.stop)
        if source.part == target.part and start < stop and source.width:
            width = source.width
            length = (stop - start) * width
            yield Move((start - source.start) * width, (start - target.start) * width, length, 1, 0, 0)
        return
    source_whole, source_local, source_length = source._stretches()
    target_whole, target_local, target_length = target._stretches()
    # Each stretch of the one meets a range of stretches of the other, and the pairs come in the order of the whole.
    first = np.searchsorted(target_whole + target_length, source_whole, "right")
    last = np.searchsorted(target_whole, source_whole + source_length, "left")
    counts = np.maximum(last - first, 0)
    ours = np.repeat(np.arange(len(counts)), counts)
    theirs = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(first, counts)
    begin = np.maximum(source_whole[ours], target_whole[theirs])
    end = np.minimum((source_whole + source_length)[ours], (target_whole + target_length)[theirs])
    taken = source_local[ours] + begin - source_whole[ours]
    put = target_local[theirs] + begin - target_whole[theirs]
    length = end - begin
    # Neighbours on both sides are one copy, and copies at equal distances are one strided copy.
    joined = np.flatnonzero((taken[1:] != (taken + length)[:-1]) | (put[1:] != (put + length)[:-1])) + 1
    starts = np.concatenate(([0], joined)) if len(taken) else joined
    taken, put, length = taken[starts], put[starts], np.add.reduceat(length, starts) if len(starts) else length
    place = 0
    while place < len(taken):
        stop = place + 1
        if stop < len(taken):
            steps = taken[stop] - taken[place], put[stop] - put[place]
            alike = (
                (length[stop:] == length[place])
                & (np.diff(taken[place:]) == steps[0])
                & (np.diff(put[place:]) == steps[1])
            )
            different = np.flatnonzero(~alike)
            stop = len(taken) if not len(different) else stop + int(different[0])
        count = stop - place
        strides = (int(steps[0]), int(steps[1])) if count > 1 else (0, 0)
        yield Move(int(taken[place]), int(put[place]), int(length[place]), count, *strides)
        place = stop
