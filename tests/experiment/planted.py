"""Suites and run directories whose truth is known: what is found in them can be held against it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calledshot.experiment import Plan, Suite, make_plan
from calledshot.experiment.outcomes import Outcome, Point
from calledshot.experiment.suite import read_suite
from calledshot.recipe import cost, to_toml

SUITE = """
name = "planted"
about = "Arms whose truth is known."
seeds = [0, 1, 2]
set.model = { layers = 2, heads = 4, kv_heads = 2, vocabulary = 1024, context = 64 }
set.batch.tokens = 512
set.parallel.compile = "off"
"""
SIZE = """
[[sizes]]
name = "{name}"
tokens = "100k"
set.model.width = {width}
"""
GAIN = 0.2
"""Bits per byte that every planted curve gains for e times the tokens, before its learning rate falls."""
STEPS = 40


def suite(*arms: str, sizes: tuple[tuple[str, int], ...] = (("S", 64),), more: str = "", seeds: str = "") -> Suite:
    """A suite of small recipes; `arms` are TOML tables' contents."""
    text = SUITE + more + "".join(SIZE.format(name=name, width=width) for name, width in sizes)
    text += "".join(f"\n[[arms]]\n{arm}\n" for arm in arms)
    table = tomllib.loads(text)
    return read_suite(table | ({"seeds": json.loads(seeds)} if seeds else {}), "planted.toml", Path("planted.toml"))


@dataclass(frozen=True)
class Truth:
    """What a planted run is to show."""

    loss: float
    rate: float = 10_000.0
    """Tokens a second."""
    state: str = "done"
    skipped: int = 0
    spike: int = 0
    """Step at which the training loss jumps."""
    padding: float = 0.01
    """Share of the positions that hold nothing."""


def loss_at(share: float, truth: Truth) -> float:
    """Held-out loss after a share of the run: a straight line in log tokens, then a fall to the final loss."""
    steady = truth.loss + 0.1 - GAIN * math.log(share / 0.6)
    return steady if share <= 0.6 else truth.loss + 0.1 * (1 - share) / 0.4


def outcome(arm: str, size: str, seed: int, truth: Truth, tokens: float = 1e6, flops: float = 1e12) -> Outcome:
    """A finished run as `outcomes` would read it."""
    points = tuple(
        Point(
            step=round(share * STEPS),
            tokens=share * tokens,
            flops=share * flops,
            seconds=share * tokens / truth.rate,
            loss=loss_at(share, truth),
            steady=share <= 0.6,
        )
        for share in (tenth / 10 for tenth in range(1, 11))
    )
    return Outcome(
        run=f"planted-{arm}-{size}-s{seed}", arm=arm, size=size, seed=seed, state=truth.state,
        loss=truth.loss if truth.state == "done" else None, tokens=tokens, flops=flops, seconds=tokens / truth.rate,
        rate=truth.rate, curve=points,
        spikes=(truth.spike,) if truth.spike else (), skipped=truth.skipped,
    )  # fmt: skip


def plant(suite: Suite, lab: Path, truth: Callable[[str, str, int], Truth | None]) -> Plan:
    """Writes a run directory for every run of the suite that `truth` (arm, size, seed) says something of."""
    plan = make_plan(suite, lab)
    for run in plan.runs:
        known = truth(run.cell.arm.name, run.cell.size.name, run.seed)
        if known is None:
            continue
        path = lab / "runs" / run.name
        path.mkdir(parents=True)
        (path / "recipe.toml").write_text(to_toml(run.recipe))
        costs = cost(run.recipe)
        tokens, per_token = costs.tokens or 0, costs.flops_per_token.total
        metrics, validation, events = [], [], []
        for step in range(1, STEPS + 1):
            share = step / STEPS
            metrics.append(
                {
                    "step": step, "incarnation": 1, "tokens": share * tokens, "flops": share * tokens * per_token,
                    "loss": loss_at(share, known) + (2.0 if step == known.spike else 0.0) + 0.01 * (step % 3),
                    "lr": 0.02 if share <= 0.6 else 0.02 * (1 - share) / 0.4, "tokens_per_second": known.rate,
                    "memory_bytes": 400_000_000,
                }
            )  # fmt: skip
            if step % (STEPS // 10) == 0:
                row = {"step": step, "incarnation": 1, "tokens": share * tokens, "source": "text"}
                validation.append(row | {"bits_per_byte": loss_at(share, known), "bytes_evaluated": 1000})
        events += [{"incarnation": 1, "kind": "skipped_step", "step": 3}] * known.skipped
        for name, rows in (("metrics", metrics), ("validation", validation), ("events", events)):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = "loss or gradient was not finite" if known.state == "failed" else ""
        (path / "status.json").write_text(json.dumps({"state": known.state, "message": message}))
        if known.state == "done":
            final = {"text": {"bits_per_byte": known.loss, "bytes_evaluated": 1000}}
            summary = {"final": final, "tokens_per_second": known.rate, "peak_memory_bytes": 400_000_000}
            summary |= {"packing_loss": known.padding}
            (path / "summary.json").write_text(json.dumps(summary))
    return make_plan(suite, lab)
