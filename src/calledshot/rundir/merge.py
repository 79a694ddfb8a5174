"""One history out of several incarnations: what a later incarnation did again replaces what an earlier one had done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]


def _place(row: Row) -> tuple[int, int] | None:
    """(incarnation, step) of a row, None for one without a step; other trainers need not number incarnations."""
    step, incarnation = row.get("step"), row.get("incarnation", 0)
    if type(step) is not int or type(incarnation) is not int:
        return None
    return incarnation, step


def starts(rows: Iterable[Row]) -> dict[int, int]:
    """First step of each incarnation."""
    first: dict[int, int] = {}
    for row in rows:
        if place := _place(row):
            incarnation, step = place
            first[incarnation] = min(step, first.get(incarnation, step))
    return first


def standing(rows: Iterable[Row], first: Mapping[int, int]) -> list[Row]:
    """Rows with a step that no higher incarnation has gone back behind, sorted by step; `first` is from `starts`."""
    limits: dict[int, float] = {}
    limit = float("inf")
    for incarnation in sorted(first, reverse=True):
        limits[incarnation] = limit
        limit = min(limit, first[incarnation])
    kept = [row for row in rows if (place := _place(row)) and place[1] < limits[place[0]]]
    return sorted(kept, key=lambda row: row["step"])


def merge(rows: list[Row]) -> list[Row]:
    """One row a step, sorted: the highest incarnation wins, rows it has gone back behind are dropped, and within an
    incarnation the row written last wins."""
    return list({row["step"]: row for row in standing(rows, starts(rows))}.values())
