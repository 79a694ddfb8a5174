"""A run's metrics as a few hundred points, however long the run was, with the extremes of every bucket kept."""

from __future__ import annotations

import math
import statistics
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .figures import finite, moment

SERIES = ("loss", "lr", "grad_norm", "update_norm", "tokens_per_second", "mfu_low", "mfu_high", "memory_bytes")
"""Fields of metrics.jsonl that are drawn."""

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
    lost: int = 0
    """Rows of metrics that a later incarnation repeated."""

    def see(self, row: Row, *, metric: bool = False) -> None:
        """Takes in one row of metrics (`metric`), or of any other file that carries `incarnation` and `time`."""
        which = incarnation(row)
        time = moment(row.get("time"))
        if time is not None:
            begun = time - (number(row, "step_seconds") or 0.0) if metric else time
            self.first_time[which] = min(begun, self.first_time.get(which, begun))
            self.last_time[which] = max(time, self.last_time.get(which, time))
        step = number(row, "step")
        if metric and step is not None:
            self.rows += 1
            self.first_step[which] = min(step, self.first_step.get(which, step))
            self.last_step[which] = max(step, self.last_step.get(which, step))

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


@dataclass(frozen=True)
class Curves:
    """Columns of equal length, one entry a bucket of steps; x values are those of the bucket's last row."""

    step: list[float]
    tokens: list[float | None]
    flops: list[float | None]
    hours: list[float | None]
    mean: dict[str, list[float | None]]
    low: dict[str, list[float | None]]
    high: dict[str, list[float | None]]
    last: dict[str, float]
    """Last finite value of each series, and of `step`, `tokens` and `flops`."""
    median: dict[str, float]
    """Median over all standing rows, of `tokens_per_second`, `mfu_low` and `mfu_high`."""
    peak: dict[str, float]
    """Largest value of each series."""
    rows: int
    """Rows that stand."""
    refused: int
    """Rows whose MFU was above 100 % of the highest peak and is left out."""

    @classmethod
    def empty(cls) -> Curves:
        """No rows at all."""
        nothing: dict[str, list[float | None]] = {name: [] for name in SERIES}
        return cls([], [], [], [], nothing, nothing, nothing, {}, {}, {}, 0, 0)

    def at(self, axis: str, step: float | None) -> float | None:
        """The value of `tokens`, `flops` or `hours` at a step, interpolated; None where it is not known."""
        if step is None or not self.step:
            return None
        values, place = getattr(self, axis), bisect_left(self.step, step)
        if place == len(self.step):
            return values[-1]
        right = values[place]
        if right is None or self.step[place] == step:
            return right
        if place == 0:
            return right * step / self.step[0] if self.step[0] > 0 else None
        left = values[place - 1]
        if left is None:
            return None
        return left + (right - left) * (step - self.step[place - 1]) / (self.step[place] - self.step[place - 1])


def edges(first: float, last: float, limit: int) -> list[float]:
    """Upper ends of at most `limit` buckets of steps, dense on a linear axis and on a logarithmic one."""
    if last - first < limit:
        return [first + k for k in range(int(last - first) + 1)]
    linear, logarithmic = limit * 2 // 3, limit // 3
    span = last - first + 1
    ends = {first + round(k * (last - first) / linear) for k in range(1, linear + 1)}
    ends |= {first - 1 + round(span ** (k / logarithmic)) for k in range(logarithmic)}
    return sorted(ends | {last})


class _Bucket:
    """Sums over the rows of one bucket."""

    __slots__ = ("count", "high", "low", "row", "total")

    def __init__(self) -> None:
        self.row: Row | None = None
        self.total = [0.0] * len(SERIES)
        self.count = [0] * len(SERIES)
        self.low: list[float | None] = [None] * len(SERIES)
        self.high: list[float | None] = [None] * len(SERIES)

    def add(self, index: int, value: float) -> None:
        self.total[index] += value
        self.count[index] += 1
        low, high = self.low[index], self.high[index]
        self.low[index] = value if low is None or value < low else low
        self.high[index] = value if high is None or value > high else high


def downsample(rows: Iterable[Row], history: History, limit: int = 600) -> Curves:
    """One point a bucket, from all rows of metrics.jsonl, which `history` has seen; one row is looked at at a time."""
    buckets: list[_Bucket] = []
    ends: list[float] = []
    if history.first_step:
        first = min(history.first_step.values())
        last = max(min(last, history.superseded_from(which) - 1) for which, last in history.last_step.items())
        ends = edges(first, max(first, last), limit)
        buckets = [_Bucket() for _ in ends]

    columns = {name: array("d") for name in ("tokens_per_second", "mfu_low", "mfu_high")}
    latest: dict[str, float] = {}
    standing = refused = lost = 0
    for row in rows if buckets else ():
        step = number(row, "step")
        if step is None:
            continue
        if not history.stands(row):
            lost += 1
            continue
        standing += 1
        bucket = buckets[min(bisect_left(ends, step), len(ends) - 1)]
        bucket.row = row
        for name in ("step", "tokens", "flops"):
            value = number(row, name)
            if value is not None:
                latest[name] = value
        impossible = (number(row, "mfu_low") or 0.0) > 1
        refused += impossible
        for index, name in enumerate(SERIES):
            value = number(row, name)
            if value is None or (impossible and name.startswith("mfu")):
                continue
            bucket.add(index, value)
            latest[name] = value
            if name in columns:
                columns[name].append(value)
    history.lost = lost

    filled = [bucket for bucket in buckets if bucket.row is not None]
    last_rows = [bucket.row for bucket in filled if bucket.row is not None]

    def column(pick: Callable[[_Bucket, int], float | None]) -> dict[str, list[float | None]]:
        return {name: [pick(bucket, index) for bucket in filled] for index, name in enumerate(SERIES)}

    high = column(lambda bucket, index: bucket.high[index])
    return Curves(
        step=[number(row, "step") or 0.0 for row in last_rows],
        tokens=[number(row, "tokens") for row in last_rows],
        flops=[number(row, "flops") for row in last_rows],
        hours=[history.hours(row) for row in last_rows],
        mean=column(lambda bucket, index: bucket.total[index] / bucket.count[index] if bucket.count[index] else None),
        low=column(lambda bucket, index: bucket.low[index]),
        high=high,
        last=latest,
        median={name: statistics.median(values) for name, values in columns.items() if values},
        peak={name: max(values) for name in SERIES if (values := [v for v in high[name] if v is not None])},
        rows=standing,
        refused=refused,
    )
