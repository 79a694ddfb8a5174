"""metrics.jsonl in columns: a million rows are 110 MB so, and 3 GB as dictionaries."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from .curves import SERIES, Curves, edges
from .figures import finite, moment
from .history import History, Row

_KEYS = ("incarnation", "step", "tokens", "flops", "step_seconds", *SERIES)
_PART = 4096
_MEDIANS = ("tokens_per_second", "mfu_low", "mfu_high")


class Metrics:
    """Rows of metrics as columns of equal length, in the order in which they were written."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        """Takes in `rows`, one after another."""
        filled = {key: array("d") for key in (*_KEYS, "time")}
        for part in _parts(rows):
            for key in _KEYS:
                filled[key].frombytes(_numbers([row.get(key) for row in part]).tobytes())
            times = [moment(row.get("time")) for row in part]
            filled["time"].frombytes(np.array(times, np.float64).tobytes())
        self.columns = {key: np.array(filled.pop(key)) for key in tuple(filled)}
        """float64, NaN where a row has no finite number; incarnation is 0 there."""
        self.columns["incarnation"] = np.trunc(np.nan_to_num(self.columns["incarnation"]))

    @property
    def incarnations(self) -> list[int]:
        """Those that wrote a row, ascending."""
        return [int(which) for which in np.unique(self.columns["incarnation"])]

    def tell(self, history: History) -> None:
        """Gives a history the steps and times of each incarnation."""
        step, time = self.columns["step"], self.columns["time"]
        begun = time - np.nan_to_num(self.columns["step_seconds"])
        for which in self.incarnations:
            mine = self.columns["incarnation"] == which
            steps, known = step[mine & ~np.isnan(step)], mine & ~np.isnan(time)
            if steps.size:
                history.see_steps(which, steps.size, float(steps.min()), float(steps.max()))
            if known.any():
                history.see_times(which, float(begun[known].min()), float(time[known].max()))

    def standing(self, history: History) -> np.ndarray:
        """Which rows stand, bool; those without a step do not."""
        stands = ~np.isnan(self.columns["step"])
        for which in self.incarnations:
            theirs = self.columns["incarnation"] == which
            stands[theirs] &= self.columns["step"][theirs] < history.superseded_from(which)
        return stands


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while part := list(islice(left, _PART)):
        yield part


def _numbers(values: list[Any]) -> np.ndarray:
    """As `finite` has them, NaN for None."""
    column = None
    if {float, int, type(None)}.issuperset(map(type, values)):
        try:
            column = np.array(values, np.float64)
        except OverflowError:  # an integer beyond floats
            column = None
    if column is None:
        column = np.array([finite(value) for value in values], np.float64)
    column[np.isinf(column)] = np.nan
    return column


def downsample(metrics: Metrics, history: History, limit: int = 600) -> Curves:
    """One point a bucket, at most `limit`, from all rows that stand; `history` was told of them and learns what was
    lost."""
    if not history.first_step:
        return Curves.empty()
    columns, stands = metrics.columns, metrics.standing(history)
    history.lost = history.rows - int(stands.sum())
    first = min(history.first_step.values())
    last = max(min(last, history.superseded_from(which) - 1) for which, last in history.last_step.items())
    ends = np.array(edges(first, max(first, last), limit), np.float64)

    rows = np.flatnonzero(stands)
    bucket = np.minimum(np.searchsorted(ends, columns["step"][rows]), len(ends) - 1)
    order = np.argsort(bucket, kind="stable")
    by_bucket, bucket = rows[order], bucket[order]
    starts = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    last_rows = by_bucket[np.append(starts[1:], len(bucket)) - 1]

    latest, median, peak = {}, {}, {}
    mean, low, high = {}, {}, {}
    impossible = columns["mfu_low"] > 1
    for name in ("step", "tokens", "flops", *SERIES):
        column = columns[name]
        if name.startswith("mfu"):
            column = np.where(impossible, np.nan, column)
        values = column[rows]
        values = values[~np.isnan(values)]
        if values.size:
            latest[name] = float(values[-1])
            if name in _MEDIANS:
                median[name] = float(np.median(values))
            if name in SERIES:
                peak[name] = float(values.max())
        if name in SERIES:
            values = column[by_bucket]
            there = np.add.reduceat((~np.isnan(values)).astype(np.int64), starts)
            sums = np.add.reduceat(np.nan_to_num(values), starts)
            mean[name] = _listed(np.divide(sums, there, out=np.full(len(starts), np.nan), where=there > 0))
            low[name], high[name] = (_listed(pick.reduceat(values, starts)) for pick in (np.fmin, np.fmax))

    def hours(row: int) -> float | None:
        time = float(columns["time"][row])
        return history.hours({"incarnation": int(columns["incarnation"][row]), "time": time})

    return Curves(
        step=columns["step"][last_rows].tolist(),
        tokens=_listed(columns["tokens"][last_rows]),
        flops=_listed(columns["flops"][last_rows]),
        hours=[hours(row) for row in last_rows.tolist()],
        mean=mean,
        low=low,
        high=high,
        last=latest,
        median=median,
        peak=peak,
        rows=len(rows),
        refused=int(impossible[rows].sum()),
    )


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
