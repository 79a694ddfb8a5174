"""Which rows of a run still stand, and the run's own clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .figures import finite, moment

Row = Mapping[str, object]


def number(row: Row, key: str) -> float | None:
    """The finite number under `key`, else None."""
    return finite(row.get(key))


def incarnation(row: Row) -> int:
    """Which start of the run wrote this row; 0 where it does not say."""
    return int(number(row, "incarnation") or 0)


@dataclass
class History:
    """Which rows of a run still stand, and when they were written on the run's own clock.

    A restart goes on from a checkpoint and repeats the steps after it: rows at or after the first step of a later
    incarnation are superseded. The clock counts the hours the run was up: gaps between incarnations are left out, lost
    work is counted.
    """

    first_step: dict[int, float] = field(default_factory=dict)
    last_step: dict[int, float] = field(default_factory=dict)
    first_time: dict[int, float] = field(default_factory=dict)
    last_time: dict[int, float] = field(default_factory=dict)
    rows: int = 0
    """Rows of metrics that have a step."""
    lost: int = 0
    """Rows of metrics that a later incarnation repeated."""

    def see(self, row: Row) -> None:
        """Takes in a row of any file that carries `incarnation` and `time`."""
        time = moment(row.get("time"))
        if time is not None:
            self.see_times(incarnation(row), time, time)

    def see_times(self, which: int, first: float, last: float) -> None:
        """An incarnation lived from `first` to `last`, at least; epoch seconds."""
        self.first_time[which] = min(first, self.first_time.get(which, first))
        self.last_time[which] = max(last, self.last_time.get(which, last))

    def see_steps(self, which: int, rows: int, first: float, last: float) -> None:
        """An incarnation wrote `rows` rows of metrics, of steps from `first` to `last`."""
        self.rows += rows
        self.first_step[which] = min(first, self.first_step.get(which, first))
        self.last_step[which] = max(last, self.last_step.get(which, last))

    def superseded_from(self, which: int) -> float:
        """The first step of an incarnation's that a later one took again; infinite where none was."""
        return min((first for other, first in self.first_step.items() if other > which), default=math.inf)

    def stands(self, row: Row) -> bool:
        """False for a row whose step a later incarnation took again."""
        step = number(row, "step")
        return step is None or step < self.superseded_from(incarnation(row))

    def hours(self, row: Row) -> float | None:
        """Hours the run had been up when the row was written; None where the row has no time."""
        time, which = moment(row.get("time")), incarnation(row)
        if time is None or which not in self.first_time:
            return None
        before = sum(self.last_time[other] - begun for other, begun in self.first_time.items() if other < which)
        return (before + max(0.0, time - self.first_time[which])) / 3600

    @property
    def seconds(self) -> float | None:
        """Seconds the run was up, over all incarnations; None where no row has a time."""
        if not self.first_time:
            return None
        return sum(self.last_time[which] - begun for which, begun in self.first_time.items())
