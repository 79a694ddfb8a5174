"""Which checkpoints stay: the newest, every so many steps, the best, under a budget of bytes, and what others need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calledshot.recipe.errors import RunError
from calledshot.recipe.schema import Checkpoint
from calledshot.rundir.files import JsonLines, read_json, read_jsonl

EXPORTS = "exports.jsonl"


@dataclass(frozen=True)
class Keep:
    """The rule by which checkpoints stay, as the recipe's section `checkpoint` has it."""

    newest: int = 1
    every_steps: int = 0
    best: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, settings: Checkpoint) -> Keep:
        return cls(settings.keep, settings.keep_every_steps, settings.keep_best, settings.keep_bytes)

    def reasons(
        self,
        sizes: Mapping[int, int],
        current: Sequence[int],
        held_out: Mapping[int, float],
        needed: Mapping[int, str],
    ) -> dict[int, str]:
        """Why each checkpoint that stays does so, by step.

        `sizes` is in bytes, by step; `current` the steps to go on from, newest first; `held_out` what is known of
        their bits per byte; `needed` the steps that stay whatever the rule says, and why.
        """
        newest = list(current[: max(self.newest, 1)])
        measured = [step for step in current if math.isfinite(held_out.get(step, math.nan))]
        best = sorted(measured, key=lambda step: (held_out[step], -step))[: max(self.best, 0)]
        periodic = [step for step in current if self.every_steps and step % self.every_steps == 0]
        chosen = dict.fromkeys(periodic, f"every {self.every_steps} steps")
        chosen |= {step: f"best {place}" for place, step in enumerate(best, 1)}
        chosen |= {step: f"newest {place}" for place, step in enumerate(newest, 1)}
        chosen |= {step: reason for step, reason in needed.items() if step in sizes}
        # The least wanted first, and what has two reasons goes in its last turn.
        turns = [*sorted(periodic), *reversed(best), *reversed(newest[1:])]
        sacrifices = sorted(set(turns) - set(newest[:1]) - set(needed), key=lambda step: _last(turns, step))
        over = sum(sizes[step] for step in chosen) - self.bytes if self.bytes else 0
        for step in sacrifices:
            if over <= 0:
                break
            del chosen[step]
            over -= sizes[step]
        return dict(sorted(chosen.items()))


def _last(turns: Sequence[int], step: int) -> int:
    return len(turns) - 1 - turns[::-1].index(step)


def held_out_by_step(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Bits per byte of all sources together, weighted by their bytes, by step; `rows` are of validation.jsonl.

    A step at which a source has no figure has none. What was measured last at a step counts: what a rollback left
    behind has no checkpoint to go on from, and the standing rows would cost a pass over the metrics.
    """
    by_step: dict[int, dict[str, tuple[float, float]]] = {}
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):
            figure = float(row["bits_per_byte"] if row["bits_per_byte"] is not None else math.nan)
            weight = float(row.get("bytes_evaluated") or 1)
            by_step.setdefault(int(row["step"]), {})[str(row.get("source"))] = (figure, weight)
    means = {
        step: sum(figure * weight for figure, weight in sources.values()) / sum(w for _, w in sources.values())
        for step, sources in by_step.items()
    }
    return {step: mean for step, mean in means.items() if math.isfinite(mean)}


def uses(run: Path) -> dict[int, str]:
    """Steps of the run at `run` that an export came from, or a run beside it, and which."""
    found: dict[int, str] = {}
    for row in read_jsonl(run / EXPORTS):
        if isinstance(row.get("step"), int):
            found[row["step"]] = f"exported to {row.get('folder')}"
    here = run.resolve()
    for file in here.parent.glob("*/lineage.json"):
        lineage = None
        with suppress(OSError, RunError):
            lineage = read_json(file)
        if not isinstance(lineage, dict) or not isinstance(parent := lineage.get("parent"), str):
            continue
        if (here.parent / parent).resolve() != here:  # a parent elsewhere is written as a path, which stays one
            continue
        steps = lineage.get("steps")
        for step in (*(steps if isinstance(steps, list) else ()), lineage.get("step")):
            if isinstance(step, int):
                found[step] = f"{file.parent.name} was made of it"
    return found


def record_export(run: Path, step: int, folder: Path) -> None:
    """Notes in the run at `run` that the model in `folder` came from its checkpoint of that step, which then stays.
    RunError when the run cannot be written."""
    with JsonLines(run / EXPORTS) as exports:
        exports.append({"step": step, "folder": str(folder.absolute())})
