"""What a finished run comes to, from its logs read row by row: a long run's do not fit into memory."""

from __future__ import annotations

import math
import statistics
from array import array
from contextlib import suppress
from typing import Any

from calledshot.recipe import Cost, Recipe, batching
from calledshot.rundir import RunDirectory, parse_time
from calledshot.training.state import Counters


def summary(
    run: RunDirectory, recipe: Recipe, cost: Cost, counters: Counters, peak_bytes: int, packing_loss: float,
    final: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What goes into summary.json. `peak_bytes` is the most that this process has held, `final` the rows of held-out
    loss at the end.
    """
    figures = {key: array("d") for key in ("tokens_per_second", "mfu_low", "mfu_high")}
    steps: set[int] = set()
    for row in run.stream("metrics"):
        with suppress(KeyError, TypeError, ValueError):
            steps.add(int(row["step"]))
            # The rows are of every incarnation, and the kernel's own maximum may lag behind what it said before.
            peak_bytes = max(peak_bytes, int(row["memory_bytes"]))
            for key, values in figures.items():
                if row.get(key) is not None:
                    values.append(row[key])
    median = {key: statistics.median(values) if values else None for key, values in figures.items()}
    wall, speed = wall_seconds(run), median["tokens_per_second"]
    sizes = batching(recipe)
    own_tokens = sum(sizes.rows(step - 1) for step in steps) * sizes.positions  # a fork's counters have its parent's
    mfu = {"low": median["mfu_low"], "high": median["mfu_high"]}
    parameters = cost.parameters
    return {
        "parameters": {
            "total": parameters.total, "non_embedding": parameters.non_embedding, "active": parameters.active,
        },
        "tokens": counters.tokens,
        "flops": counters.flops,
        "seconds": wall,
        "step_seconds": counters.seconds,
        "tokens_per_second": speed,
        "goodput": own_tokens / wall / speed if speed and wall else None,
        "mfu": None if None in mfu.values() else mfu,
        "peak_memory_bytes": peak_bytes,
        "energy_joules": counters.energy_joules,
        "packing_loss": packing_loss,
        "final": {row["source"]: row for row in final},
    }  # fmt: skip


def wall_seconds(run: RunDirectory) -> float:
    """Seconds from start to last sign of life, summed over the incarnations; the time between them is not in it."""
    spans: dict[int, tuple[float, float]] = {}
    for log in ("events", "metrics"):
        for row in run.stream(log):
            with suppress(KeyError, TypeError, ValueError):
                moment, incarnation = parse_time(row["time"]), int(row["incarnation"])
                if math.isfinite(moment):
                    first, last = spans.get(incarnation, (moment, moment))
                    spans[incarnation] = min(first, moment), max(last, moment)
    return sum(last - first for first, last in spans.values())
