"""How many sequences each batch of a run has: as many in all of them, or fewer at its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .derived import shape
from .schema import Recipe


@dataclass(frozen=True)
class Stage:
    """Batches of one size, one after another."""

    first: int
    """Number of the first of them, from 0."""
    before: int
    """Sequences in all batches before it."""
    rows: int
    """Sequences in each."""


@dataclass(frozen=True)
class Batching:
    """The sizes of a run's batches, a pure function of its recipe."""

    positions: int
    """Of a sequence; an encoder's and a decoder's together."""
    stages: tuple[Stage, ...]

    def rows(self, number: int) -> int:
        """Sequences in the batch of that number, from 0."""
        return next(stage.rows for stage in reversed(self.stages) if number >= stage.first)

    def before(self, number: int) -> int:
        """Sequences in all batches before it."""
        stage = next(stage for stage in reversed(self.stages) if number >= stage.first)
        return stage.before + (number - stage.first) * stage.rows

    def tokens(self, batches: int) -> int:
        """Tokens in so many batches from the first on."""
        return self.before(batches) * self.positions

    def filled(self, rows: int) -> int:
        """Whole batches that so many sequences are."""
        stage = next(stage for stage in reversed(self.stages) if rows >= stage.before)
        return stage.first + (rows - stage.before) // stage.rows

    def needed(self, tokens: int) -> int:
        """Batches, from the first on, that have so many tokens or just more."""
        rows = -(-tokens // self.positions)
        number = self.filled(rows)
        return number + (self.before(number) < rows)

    def reached(self, share: float, batches: int) -> int:
        """Whole batches in that share of the sequences of so many."""
        return int(share * batches) if len(self.stages) == 1 else self.filled(int(share * self.before(batches)))


def batching(recipe: Recipe) -> Batching:
    """The sizes of a checked recipe's batches. Each stage of `batch.ramp` has as many batches as come nearest to its
    share of `duration.tokens`, at least one."""
    positions = shape(recipe.model).row_positions

    def stages() -> Iterator[Stage]:
        first = before = 0
        for step in recipe.batch.ramp:
            rows = step.tokens // positions
            yield Stage(first, before, rows)
            batches = max(1, round((step.until * recipe.duration.tokens / positions - before) / rows))
            first, before = first + batches, before + batches * rows
        yield Stage(first, before, recipe.batch.tokens // positions)

    return Batching(positions, tuple(stages()))
