"""A run's metrics as a few hundred points, however long the run was, with the extremes of every bucket kept."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

SERIES = ("loss", "lr", "grad_norm", "update_norm", "tokens_per_second", "mfu_low", "mfu_high", "memory_bytes")
"""Fields of metrics.jsonl that are drawn."""


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
