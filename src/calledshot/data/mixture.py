"""The mixture: which source each sequence of the run comes from, in closed form."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

SCALE = 1 << 32
"""Shares are rounded to this fraction, so that every machine splits alike."""


@dataclass(frozen=True)
class Split:
    """A binary tree over sources that deals slots out evenly: after n slots each node is within 1 of its share."""

    source: int = -1
    """The source, at a leaf."""
    share: int = 0
    """Share of the slots that go left, in units of 1 / SCALE."""
    left: Split | None = None
    right: Split | None = None

    def locate(self, slot: int) -> tuple[int, int]:
        """(source, how many earlier slots that source had) of a slot."""
        node = self
        while node.left is not None and node.right is not None:
            before = slot * node.share // SCALE
            if (slot + 1) * node.share // SCALE > before:
                node, slot = node.left, before
            else:
                node, slot = node.right, slot - before
        return node.source, slot

    def count(self, source: int, slots: int) -> int:
        """How many of the first `slots` slots go to `source`."""
        if self.left is None or self.right is None:
            return slots if self.source == source else 0
        left = slots * self.share // SCALE
        return self.left.count(source, left) + self.right.count(source, slots - left)


def split(weights: Sequence[float]) -> Split:
    """The tree for these weights; sources of weight 0 are not in it."""
    leaves = [(index, Fraction(weight)) for index, weight in enumerate(weights) if weight > 0]
    return _split(leaves)


def _split(leaves: list[tuple[int, Fraction]]) -> Split:
    if len(leaves) == 1:
        return Split(source=leaves[0][0])
    half = len(leaves) // 2
    left, right = leaves[:half], leaves[half:]
    share = sum(weight for _, weight in left) / sum(weight for _, weight in leaves)
    # A source with a weight is never rounded away.
    scaled = min(max(round(share * SCALE), 1), SCALE - 1)
    return Split(share=scaled, left=_split(left), right=_split(right))


@dataclass(frozen=True)
class Segment:
    """A stretch of the run over which one tree holds."""

    start: int
    """Its first slot."""
    tree: Split
    taken: tuple[int, ...]
    """Sequences that each source had given before it."""


@dataclass(frozen=True)
class Mixture:
    """Slots of the whole run, each one a sequence: `locate(slot)` names its source and its index within that source."""

    segments: tuple[Segment, ...]
    end: int | None
    """Slots after which every source is used up; None where one has no bound."""
    sources: int
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [segment.start for segment in self.segments])

    def locate(self, slot: int) -> tuple[int, int]:
        """(source, index within the source) of a slot."""
        segment = self.segments[bisect.bisect_right(self._starts, slot) - 1]
        source, index = segment.tree.locate(slot - segment.start)
        return source, segment.taken[source] + index

    def counts(self, slots: int) -> list[int]:
        """How many of the run's first `slots` sequences come from each source."""
        if not self.segments:
            return [0] * self.sources
        segment = self.segments[max(bisect.bisect_right(self._starts, slots) - 1, 0)]
        inside = slots - segment.start
        return [segment.taken[source] + segment.tree.count(source, inside) for source in range(self.sources)]


def mixture(phases: Sequence[tuple[int, Sequence[float]]], capacities: Sequence[int | None]) -> Mixture:
    """Lay a run out.

    `phases` are (first slot, weight of each source), the first at slot 0; `capacities` say how many sequences each
    source can give, None without bound. Where a source is used up its share goes to the others, in proportion to their
    weights.
    """
    segments: list[Segment] = []
    taken = [0] * len(capacities)
    start = 0
    for number, (_, weights) in enumerate(phases):
        stop = phases[number + 1][0] if number + 1 < len(phases) else None
        while stop is None or start < stop:
            open_weights = [
                weight if capacity is None or used < capacity else 0.0
                for weight, capacity, used in zip(weights, capacities, taken, strict=True)
            ]
            if not any(weight > 0 for weight in open_weights):
                return Mixture(tuple(segments), start, len(capacities))
            tree = split(open_weights)
            segments.append(Segment(start, tree, tuple(taken)))
            length = _length(tree, open_weights, capacities, taken)
            if length is None and stop is None:
                return Mixture(tuple(segments), None, len(capacities))
            if length is None or (stop is not None and start + length > stop):
                assert stop is not None
                length = stop - start
            taken = [used + tree.count(source, length) for source, used in enumerate(taken)]
            start += length
    raise AssertionError("the last phase has no end")


def _length(
    tree: Split, weights: Sequence[float], capacities: Sequence[int | None], taken: Sequence[int]
) -> int | None:
    """Slots until the first source of the tree is used up."""
    lengths = []
    for source, (weight, capacity) in enumerate(zip(weights, capacities, strict=True)):
        if weight <= 0 or capacity is None:
            continue
        room = capacity - taken[source]
        high = room
        while tree.count(source, high) < room:
            high *= 2
        low = high // 2
        while low < high:
            middle = (low + high) // 2
            if tree.count(source, middle) < room:
                low = middle + 1
            else:
                high = middle
        lengths.append(low)
    return min(lengths, default=None)
