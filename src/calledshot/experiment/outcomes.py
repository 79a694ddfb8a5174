"""What came of each run of a suite, from its directory alone: loss, cost, curve, and whether it was stable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calledshot.rundir import RunDirectory, is_run

from .plan import SPEED_ROUNDS, Plan, Run, state
from .running import measurements, messages

WINDOW = 32
"""Steps whose training losses a step is held against."""
SPIKE = 6.0
"""Robust standard deviations (1.4826 times the median absolute deviation) above their median that make a spike."""
SMALLEST_SPIKE = 0.03
"""Share of that median that a spike exceeds it by at least: batches differ."""
NEARBY = 2
"""Steps within which two runs' spikes are one and the same: that of the data."""
DIVERGED = 0.05
"""Share by which the final held-out loss of a diverged run is above its lowest."""
STEADY = 0.98
"""Share of the peak learning rate above which it is called constant."""


@dataclass(frozen=True)
class Point:
    """A measurement of held-out loss during a run."""

    step: int
    tokens: float
    flops: float
    seconds: float | None
    """At the speed that the run's own `seconds` are of: without start-up, evaluations and checkpoints."""
    loss: float
    """Bits per byte."""
    steady: bool
    """Before the learning rate falls."""


@dataclass(frozen=True)
class Outcome:
    """One run, finished or not. What is not known is None."""

    run: str
    arm: str
    size: str
    seed: int
    state: str
    """`not started`, `running`, `done`, `failed` or `interrupted`."""
    message: str = ""
    """Why it failed."""
    loss: float | None = None
    """What the verdicts are about, lower being better: the final held-out bits per byte, over all sources by their
    bytes, or the suite's `judge`; known once it is done."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """The suite's other `evals`, by name."""
    bytes_evaluated: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    """Training at its `speed`. Tokens, FLOPs and seconds hold those of the run that it began with too."""
    rate: float | None = None
    """Median training speed of its own, tokens a second, beside whatever the machine did then."""
    alone: tuple[float, ...] = ()
    """Tokens a second of the short runs of its cell that had nothing beside them; empty unless every cell with a result
    at its size has all of them, so that the speeds of a size are of one kind."""
    clocks: tuple[float, ...] = ()
    """`seconds` by each of `alone`."""
    memory: float | None = None
    """Peak of the process (CPU) or the device (GPU), in bytes."""
    padding: float | None = None
    """Share of the training positions that held nothing."""
    decode: float | None = None
    """Tokens a second, one sequence."""
    curve: tuple[Point, ...] = ()
    spikes: tuple[int, ...] = ()
    """Steps at which the training loss jumped up."""
    skipped: int = 0
    """Updates left out because loss or gradient was not finite."""
    diverged: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)
    """How it computed: device, dtype, compile, threads."""

    @property
    def speed(self) -> float | None:
        """Training speed, tokens a second: measured alone where it was, else its own."""
        return statistics.geometric_mean(self.alone) if self.alone else self.rate

    @property
    def counts(self) -> bool:
        """Whether its loss is a result."""
        return self.state == "done" and self.loss is not None


def outcomes(plan: Plan, lab: Path) -> list[Outcome]:
    """Every run of the plan, in its order."""
    said, measured = messages(plan.suite, lab), measurements(plan.suite, lab)
    judge = plan.suite.judge
    own = [outcome(run, lab, said.get(run.name, ""), measured.get(run.name, {}), judge) for run in plan.runs]
    alone = {key: rates for key, rates in plan.speeds.items() if len(rates) >= SPEED_ROUNDS}
    partly = {one.size for one in own if one.counts and (one.arm, one.size) not in alone}
    found: dict[tuple[str, str, int], Outcome] = {}
    for run, one in zip(plan.runs, own, strict=True):
        if one.size not in partly and (rates := alone.get((one.arm, one.size))):
            one = timed(one, rates)
        before = found.get((run.cell.arm.start, one.size, one.seed))
        found[one.arm, one.size, one.seed] = after(before, one) if before else one
    return list(found.values())


def timed(one: Outcome, rates: tuple[float, ...]) -> Outcome:
    """A run with the seconds that it would have taken alone."""
    speed = statistics.geometric_mean(rates)
    return replace(
        one, alone=rates, seconds=one.tokens / speed if one.tokens else None,
        clocks=tuple(one.tokens / rate for rate in rates) if one.tokens else (),
        curve=tuple(replace(point, seconds=point.tokens / speed) for point in one.curve),
    )  # fmt: skip


def after(before: Outcome, one: Outcome) -> Outcome:
    """A run with what was spent on the one that it began with."""

    def both(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + b

    tokens, flops = before.tokens or 0.0, before.flops or 0.0
    points = [
        replace(
            point, tokens=point.tokens + tokens, flops=point.flops + flops, seconds=both(point.seconds, before.seconds)
        )
        for point in one.curve
    ]
    return replace(
        one, tokens=both(one.tokens, before.tokens), flops=both(one.flops, before.flops),
        seconds=both(one.seconds, before.seconds), curve=tuple(points),
        clocks=tuple(a + b for a, b in zip(one.clocks, before.clocks, strict=False)),
    )  # fmt: skip


def outcome(run: Run, lab: Path, said: str, measured: Mapping[str, float | None], judge: str = "") -> Outcome:
    """One run as its directory tells it."""
    now = state(run, lab)
    path = lab / "runs" / run.name
    place = {"run": run.name, "arm": run.cell.arm.name, "size": run.cell.size.name, "seed": run.seed}
    if not is_run(path):
        # An attempt that left no run said why.
        return Outcome(**place, state="failed" if said else now, message=said)
    directory = RunDirectory(path)
    status, summary, rows = directory.status(), directory.load("summary"), directory.metrics()
    final, size = over_bytes(list((summary.get("final") or {}).values()))
    rates = [row["tokens_per_second"] for row in rows if number(row.get("tokens_per_second"))]
    rate = number(summary.get("tokens_per_second")) or (statistics.median(rates) if rates else None)
    points = curve(rows, directory.standing_rows("validation"), rate)
    if final is None and now == "done" and points:
        final = points[-1].loss
    loss, size = (measured.get(judge), None) if judge else (final, size)
    last = rows[-1] if rows else {}
    message = str(status.get("message") or said) if now == "failed" else ""
    lowest = min((point.loss for point in points), default=math.inf)
    machines = list((directory.load("probes").get("machines") or {}).values())
    return Outcome(
        **place,
        state=now,
        message=message,
        loss=loss,
        measures={
            name: value for name, value in measured.items() if name not in ("decode", judge) and value is not None
        },
        bytes_evaluated=size,
        tokens=(tokens := number(last.get("tokens"))),
        flops=number(last.get("flops")),
        seconds=tokens / rate if tokens and rate else None,
        rate=rate,
        memory=number(summary.get("peak_memory_bytes"))
        or max((value for row in rows if (value := number(row.get("memory_bytes")))), default=None),
        padding=number(summary.get("packing_loss")),
        decode=measured.get("decode"),
        curve=points,
        spikes=spikes(rows),
        skipped=sum(row.get("kind") == "skipped_step" for row in directory.rows("events")),
        diverged="finite" in message
        or (final is not None and bool(points) and points[-1].loss > lowest * (1 + DIVERGED)),
        machine=machines[-1] if machines else {},
    )


def number(value: Any) -> float | None:
    """A finite number, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def over_bytes(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Bits per byte of several sources as one, weighted by their bytes, and these; None where one lacks them."""
    values = [(number(row.get("bits_per_byte")), number(row.get("bytes_evaluated"))) for row in rows]
    if len(values) == 1:
        return values[0]
    if not values or any(bits is None or not size for bits, size in values):
        return None, None
    total = sum(size for _, size in values if size)
    return sum(bits * size for bits, size in values if bits and size) / total, total


def curve(
    metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], rate: float | None
) -> tuple[Point, ...]:
    """Held-out loss over a run. FLOPs and learning rates are those of the same steps in the metrics."""
    by_step = {row["step"]: row for row in metrics}
    peak = max((value for row in metrics if (value := number(row.get("lr")))), default=0.0)
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row in validation:
        grouped.setdefault(row["step"], []).append(row)
    points = []
    for step, rows in sorted(grouped.items()):
        loss, _ = over_bytes(list({str(row.get("source")): row for row in rows}.values()))
        beside = by_step.get(step, {})
        tokens = number(rows[-1].get("tokens")) or number(beside.get("tokens"))
        if loss is None or not tokens:
            continue
        flops, lr = number(beside.get("flops")), number(beside.get("lr"))
        steady = lr is None or lr >= STEADY * peak
        points.append(Point(step, tokens, flops or 0.0, tokens / rate if rate else None, loss, steady))
    return tuple(points)


def spikes(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Steps whose training loss stands out above those before it; steps in a row count once."""
    found: list[int] = []
    seen: list[float] = []
    above = False
    for row in metrics:
        loss = number(row.get("loss"))
        if loss is None:
            continue
        recent = seen[-WINDOW:]
        if len(recent) >= WINDOW // 2:
            middle = statistics.median(recent)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in recent)
            jumped = loss > middle + max(SPIKE * spread, SMALLEST_SPIKE * middle)
            if jumped and not above:
                found.append(row["step"])
            above = jumped
        seen.append(loss)
    return tuple(found)
