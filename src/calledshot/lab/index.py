"""The runs of a lab as a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calledshot.rundir import RunDirectory, find_lab, runs

from . import figures
from .figures import MISSING, finite, moment
from .history import Row, incarnation, number
from .view import open_view


@dataclass(frozen=True)
class Entry:
    """One run in the table; None for what its directory does not say."""

    name: str
    path: str
    state: str
    """What is true now; `unknown` where status.json cannot be read."""
    step: int | None
    total_steps: int | None
    tokens: int | None
    loss: float | None
    """Last training loss in nats per token."""
    held_out: dict[str, float]
    """Last bits per byte by held-out source."""
    predicted: dict[str, str]
    """What these are of, by source: `whole` documents or `suffixes`, which do not compare."""
    measured_bytes: dict[str, float | None]
    """How much text these are over, by source: numbers over other amounts do not compare."""
    tokens_per_second: float | None
    """The summary's, else the last step's."""
    heartbeat: str | None
    """Last sign of life, UTC."""
    tags: list[str]
    archived: bool
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def entry(run: RunDirectory) -> Entry:
    """One run's line in the table."""
    view = open_view(run, curves=False)
    latest: dict[str, Any] = {}
    for row in view.attempt("metrics.jsonl", lambda: run.tail("metrics"), []):
        latest |= {key: value for key, value in row.items() if value is not None}
    measured = [
        row for row in view.attempt("validation.jsonl", lambda: run.tail("validation"), []) if lasts(row, latest)
    ]
    last = {str(row.get("source")): row for row in measured}
    last |= {source: view.final(source)[0] for source in view.sources}
    bits = {source: known for source, row in last.items() if (known := finite(row.get("bits_per_byte"))) is not None}

    def whole(*values: object) -> int | None:
        return max((int(known) for value in values if (known := finite(value)) is not None), default=None)

    heartbeat = view.status.get("heartbeat") or latest.get("time")
    return Entry(
        name=view.name,
        path=str(run.path),
        state=view.state,
        step=whole(view.status.get("step"), latest.get("step")),
        total_steps=whole(view.status.get("total_steps")),
        tokens=whole(view.status.get("tokens"), latest.get("tokens")),
        loss=finite(latest.get("loss")),
        held_out=bits,
        predicted={source: view.predicted(last[source]) for source in bits},
        measured_bytes={source: view.amount(last[source]) for source in bits},
        tokens_per_second=finite(view.summary.get("tokens_per_second")) or finite(latest.get("tokens_per_second")),
        heartbeat=str(heartbeat) if moment(heartbeat) is not None else None,
        tags=view.tags,
        archived=view.labels.get("archived") is True,
        warnings=view.warnings,
    )


def lasts(row: Row, latest: Row) -> bool:
    """Whether a measurement, of the step that it names, still stands when `latest` is the newest row of metrics.

    One of an earlier incarnation does up to where the newest one is: had that gone back behind it, it would have
    measured the step again, and the later row counts.
    """
    step, reached = number(row, "step"), number(latest, "step")
    return None in (step, reached) or incarnation(row) >= incarnation(latest) or step <= reached


def entries(lab: Path | None = None, *, archived: bool = False) -> list[Entry]:
    """The runs of a lab (of the one around the current folder unless given), those that lived last first; the archived
    ones only with `archived`."""
    found = [entry(run) for run in runs(find_lab() if lab is None else lab)]
    kept = [one for one in found if archived or not one.archived]
    return sorted(kept, key=lambda one: (-(moment(one.heartbeat) or 0.0), one.name))


HEADER = ("name", "state", "step", "tokens", "loss", "held-out bits/byte", "tok/s", "age", "tags")


def cells(found: Sequence[Entry], now: float | None = None) -> list[tuple[str, ...]]:
    """The table as text, `HEADER` first. Age is the time from the last sign of life to `now`, in epoch seconds."""
    at = time.time() if now is None else now
    rows: list[tuple[str, ...]] = [HEADER]
    amounts: dict[str, set[float | None]] = {}
    for one in found:
        for source, size in one.measured_bytes.items():
            amounts.setdefault(source, set()).add(size)
    for one in found:
        alive = moment(one.heartbeat)
        age = figures.duration(max(0.0, at - alive)).split()[:2] if alive is not None else [MISSING]
        bits = []
        for source, value in one.held_out.items():
            text = figures.nats(value) if len(one.held_out) == 1 else f"{source} {figures.nats(value)}"
            marks = ["suffixes"] if one.predicted[source] == "suffixes" else []
            if (size := one.measured_bytes[source]) and len(amounts[source]) > 1:
                marks.append(figures.size(size))
            bits.append(text + (f" ({', '.join(marks)})" if marks else ""))
        rows.append(
            (
                one.name,
                one.state,
                figures.whole(one.step) + (f"/{one.total_steps:,}" if one.total_steps else ""),
                figures.count(one.tokens),
                figures.nats(one.loss),
                ", ".join(bits) or MISSING,
                figures.significant(one.tokens_per_second),
                " ".join(age),
                ", ".join([*one.tags, *(["(archived)"] if one.archived else [])]),
            )
        )
    return rows
