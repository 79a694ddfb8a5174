"""Examples, each with inputs that are given and targets that are predicted, become the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calledshot.objective.batch import PADDING, Batch, Encoded
from calledshot.objective.spans import ranges


@dataclass(frozen=True)
class Specials:
    """Ids of the tokens that objectives put in."""

    begin: int
    end: int
    pad: int
    sentinels: tuple[int, ...]
    modes: Mapping[str, int]
    """By `R`, `S` and `X`."""


@dataclass(frozen=True)
class Examples:
    """P examples, their ids one after another."""

    inputs: np.ndarray
    """int32 ids of all inputs."""
    input_lengths: np.ndarray
    """(P,) int64, at least 1 each."""
    targets: np.ndarray
    """int32 ids of all targets."""
    target_lengths: np.ndarray
    """(P,) int64, at least 1 each."""
    weights: np.ndarray
    """float32 weight of each target's loss."""
    two_way: np.ndarray
    """(P,) bool: the inputs see each other both ways, in the prefix topology."""


@dataclass(frozen=True)
class Frame:
    """The positions of a row, and what a topology puts in them.

    - `decoder`, `prefix`: an example of n inputs and m targets is one sequence, which takes n + m - 1 positions: each
      id is predicted from the one before it, and the loss is on the targets alone. In `prefix` the inputs are region 1,
      so that they see each other both ways (seqio's PrefixLMFeatureConverter, for which the first id is a 0).
    - `encoder-decoder`: the encoder reads the inputs, n of its S positions; the decoder has m of its T positions, and
      reads the begin token and the targets but the last.
    """

    topology: str
    context: int
    """Positions of the decoder, T."""
    encoder_context: int
    """Positions of the encoder, S; 0 where there is none."""
    specials: Specials
    pooling: int = 1
    """Inputs begin at multiples of this, so that an encoder which pools never mixes two documents."""

    @property
    def aside(self) -> int:
        """Positions of the encoder that an example may leave empty before the next."""
        return self.pooling - 1

    @property
    def positions(self) -> int:
        """Of a row, padding included."""
        return self.context + self.encoder_context

    @property
    def capacity(self) -> int:
        """What `places` of a row's examples add up to at most."""
        return max(self.context, self.encoder_context)

    def places(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64: the share of a row that examples of so many inputs and targets take, in units of 1 / `capacity`.

        Examples whose places add up to no more than `capacity` fit in a row. Of encoder and decoder the one that is
        filled more counts.
        """
        if not self.encoder_context:
            return inputs + targets - 1
        most = self.capacity
        return np.maximum(-(-(inputs + self.aside) * most // self.encoder_context), -(-targets * most // self.context))

    def filled(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64: positions that such examples take."""
        return inputs + targets - (0 if self.encoder_context else 1)

    def fits(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """bool: whether an example has a row that holds it."""
        if not self.encoder_context:
            return inputs + targets - 1 <= self.context
        return (inputs + self.aside <= self.encoder_context) & (targets <= self.context)


def lay_out(examples: Examples, counts: Sequence[int], sources: Sequence[int], frame: Frame) -> Batch:
    """The batch of B rows of which row b holds the next `counts[b]` examples. Raises ValueError where one overflows."""
    rows = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - np.asarray(counts, np.int64)
    index = np.arange(len(rows)) - first[rows]
    given, predicted = examples.input_lengths, examples.target_lengths
    if frame.encoder_context:
        place = _Places(rows, index, predicted, len(counts), frame.context)
        shifted = np.roll(examples.targets, 1)
        shifted[np.cumsum(predicted) - predicted] = frame.specials.begin
        inputs, targets, weights = shifted, examples.targets, examples.weights
        regions = np.zeros(len(targets), np.int8)
        read = _Places(rows, index, given, len(counts), frame.encoder_context, frame.pooling)
        encoded = Encoded(read.fill(examples.inputs, frame.specials.pad), read.documents, read.positions)
    else:
        lengths = given + predicted
        starts = np.cumsum(lengths) - lengths
        sequence = np.empty(int(lengths.sum()), np.int32)
        weighted = np.zeros(len(sequence), np.float32)
        sequence[ranges(starts, given)] = examples.inputs
        of_targets = ranges(starts + given, predicted)
        sequence[of_targets] = examples.targets
        weighted[of_targets] = examples.weights
        read = ranges(starts, lengths - 1)
        inputs, targets, weights = sequence[read], sequence[read + 1], weighted[read + 1]
        prefixes = examples.two_way if frame.topology == "prefix" else np.zeros(len(given), bool)
        both = np.stack([given, predicted - 1], axis=1).ravel()
        regions = np.repeat(np.stack([prefixes, np.zeros_like(prefixes)], axis=1).ravel(), both)
        place = _Places(rows, index, lengths - 1, len(counts), frame.context)
        encoded = None
    return Batch(
        place.fill(inputs, frame.specials.pad),
        place.fill(targets, frame.specials.pad),
        place.fill(weights.astype(np.float32), 0),
        place.documents,
        place.positions,
        place.fill(regions.astype(np.int8), 0),
        np.asarray(sources, np.int32),
        encoded,
    )


class _Places:
    """Where the tokens of examples go in an array of rows by width."""

    def __init__(
        self, rows: np.ndarray, index: np.ndarray, lengths: np.ndarray, height: int, width: int, multiple: int = 1
    ) -> None:
        """Examples begin at multiples of `multiple`."""
        room = -(-lengths // multiple) * multiple
        before = np.cumsum(room) - room
        begins = np.flatnonzero(index == 0)
        at = before - np.repeat(before[begins], np.diff(begins, append=len(rows)))
        if np.any(at + lengths > width):
            raise ValueError(f"examples overflow a row of {width} positions")
        self.shape = height, width
        self.flat = ranges(rows * width + at, lengths)
        self.documents = self.fill(np.repeat(index, lengths).astype(np.int32), PADDING)
        self.positions = self.fill(ranges(np.zeros_like(lengths), lengths).astype(np.int32), 0)

    def fill(self, values: np.ndarray, nothing: int) -> np.ndarray:
        array = np.full(self.shape, nothing, values.dtype)
        array.reshape(-1)[self.flat] = values
        return array
