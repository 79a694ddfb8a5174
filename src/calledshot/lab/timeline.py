"""What happened to a run besides training: restarts, skipped steps, interruptions, and what the routine cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import figures
from .history import incarnation, number
from .view import ROUTINE, View

_ENVELOPE = ("time", "step", "incarnation", "kind", "tokens", "event")
LONGEST = 200
"""Incidents of one run that are listed one by one."""


@dataclass(frozen=True)
class Incident:
    """Something that a healthy run does not have."""

    kind: str
    text: str
    time: str
    step: float | None
    tokens: float | None
    flops: float | None
    hours: float | None


@dataclass(frozen=True)
class Segment:
    """One incarnation as a piece of the run's time, shares of the whole in [0, 1]."""

    incarnation: int
    start: float
    length: float


@dataclass(frozen=True)
class Timeline:
    """A run's incidents, incarnations and routine."""

    incidents: list[Incident]
    hidden: int
    """Incidents beyond `LONGEST`, which are not listed."""
    segments: list[Segment]
    hours: float | None
    """Length of the whole timeline."""
    routine: list[str]
    """One sentence for each kind of routine event."""


def details(row: Mapping[str, Any], leave_out: Iterable[str] = _ENVELOPE) -> str:
    """The fields of a row beyond its envelope, as text."""
    parts = []
    for key, value in row.items():
        if key in leave_out or value is None or value == "":
            continue
        known = figures.finite(value)
        text = figures.significant(known) if known is not None else str(value)
        parts.append(f"{key.replace('_', ' ')} {text}")
    return ", ".join(parts)[:400]


def timeline(view: View) -> Timeline:
    """The timeline of a run, in order of time."""
    stopped = {incarnation(row): row for row in view.events if row.get("kind") == "stop"}
    started: set[int] = set()
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    routine: dict[str, list[Mapping[str, Any]]] = {}
    for row in view.events:
        kind = str(row.get("kind", "event"))
        if kind in ROUTINE:
            routine.setdefault(kind, []).append(row)
        elif kind == "start":
            started.add(incarnation(row))
        elif kind == "stop":
            state = str(row.get("state") or row.get("reason") or "")
            if state not in ("done", ""):
                found.append((state, details(row, (*_ENVELOPE, "state")), row))
        else:
            found.append((kind.replace("_", " "), details(row), row))
    history = view.history
    for before, which in pairwise(sorted(history.first_time)):
        silent = before in started and before not in stopped
        begun = {"incarnation": which, "time": history.first_time[which], "step": history.first_step.get(which)}
        found.append(("restart", _restart(view, before, which, silent), begun))
    last = max(history.last_time, default=0)
    if view.state == "interrupted" and last in started and last not in stopped:
        end = {"incarnation": last, "time": history.last_time[last], "step": history.last_step.get(last)}
        found.append(("interrupted", "ended without a word", end))
    for row in view.supervisor:
        found.append((str(row.get("kind") or row.get("event") or "supervisor").replace("_", " "), details(row), row))
    for row in view.skips:
        found.append(("batch left out", details(row), row))

    incidents = [_incident(view, kind, text, row) for kind, text, row in found]
    incidents.sort(key=lambda incident: incident.time)
    return Timeline(
        incidents=incidents[:LONGEST],
        hidden=max(0, len(incidents) - LONGEST),
        segments=_segments(view),
        hours=view.history.seconds / 3600 if view.history.seconds else None,
        routine=[_routine(kind, rows) for kind, rows in sorted(routine.items())],
    )


def _restart(view: View, before: int, which: int, silent: bool) -> str:
    history, text = view.history, f"incarnation {which}"
    gap = history.first_time[which] - history.last_time[before]
    if gap > 0:
        text += f", {figures.duration(gap)} after the one before{' ended without a word' if silent else ''}"
    first, last = history.first_step.get(which), history.last_step.get(before)
    if first is not None and last is not None:
        text += f"; went on with step {figures.whole(first)}"
        if last >= first:
            text += f", {figures.whole(last - first + 1)} steps done twice"
    return text


def _incident(view: View, kind: str, text: str, row: Mapping[str, Any]) -> Incident:
    step = number(row, "step")
    return Incident(
        kind=kind,
        text=text,
        time=figures.date(row.get("time")),
        step=step,
        tokens=number(row, "tokens") or view.curves.at("tokens", step),
        flops=view.curves.at("flops", step),
        hours=view.history.hours(row),
    )


def _segments(view: View) -> list[Segment]:
    history, total = view.history, view.history.seconds
    if not total:
        return []
    segments, start = [], 0.0
    for which in sorted(history.first_time):
        length = (history.last_time[which] - history.first_time[which]) / total
        segments.append(Segment(which, start, length))
        start += length
    return segments


def _routine(kind: str, rows: list[Mapping[str, Any]]) -> str:
    text = f"{len(rows):,} {kind}{'s' if len(rows) > 1 else ''}"
    seconds = [value for row in rows if (value := number(row, "seconds")) is not None]
    if seconds:
        text += f", {figures.duration(sum(seconds))} in all"
    blocked = [value for row in rows if (value := number(row, "blocked_seconds")) is not None]
    if blocked:
        text += f" ({figures.duration(sum(blocked))} of it waited for)"
    sizes = [value for row in rows if (value := number(row, "bytes")) is not None]
    if sizes:
        text += f", {figures.size(sizes[-1])} each"
    return text
