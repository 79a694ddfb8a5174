"""A suite's report as data: what every arm cost, what came of it, and what must be said about its wins."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .accounts import Account, account, changed_lines
from .analysis import BETTER, NOISE, WORSE, Analysis, Budget, Effect, Key, Stability, analyse
from .matching import TOLERANCE, Cell, unmatched
from .outcomes import Outcome, outcomes
from .plan import Plan, Run
from .suite import Suite

SPEED_TOLERANCE = 0.02
"""Share by which FLOPs a token, or the seconds of a run, differ at least where a remark is made of it."""
MISSED = 0.05
"""Share by which the seconds of an arm that is matched by them may be off before that is said."""
PADDED = 0.05
"""Share of all positions by which padding may be more than the baseline's before that is said."""
MOVED = 0.02
"""Share of all parameters that has to move from the feed-forward to the embedding, or back, to be named."""


@dataclass(frozen=True)
class Row:
    """One arm at one size: what it costs by arithmetic, what was measured, what came of it."""

    arm: str
    size: str
    match: str
    adjusted: str
    """The key that was moved so that it matches; empty for none."""
    unmatched: dict[str, float] | None
    """What it differs in from the baseline, as shares of the baseline's; None before its speed is measured."""
    changed_lines: int
    """Recipe keys that it changes against the baseline, and lines of the user's own files; the moved key left out."""
    account: Account
    states: dict[str, int]
    """Runs by state."""
    seeds: int
    """Runs whose loss counts."""
    loss: float | None
    """Mean final held-out bits per byte."""
    measures: dict[str, float]
    """Means of the suite's evals."""
    tokens: float | None
    flops: float | None
    seconds: float | None
    tokens_per_second: float | None
    memory: float | None
    padding: float | None
    """Share of the training positions that held nothing."""
    more_padding: float | None
    """That less the baseline's."""
    decode: float | None
    stability: Stability
    effect: Effect | None
    """Against the baseline; None for the baseline itself."""
    by_flops: Budget | None
    by_seconds: Budget | None

    @property
    def differs(self) -> str:
        """What is not matched, and padding where there is much more of it."""
        if self.more_padding is None or self.more_padding <= PADDED:
            return differences(self.unmatched)
        padding = f"padding {100 * self.more_padding:+.0f} points"
        return ", ".join([*([differences(self.unmatched)] if self.unmatched else []), padding])


@dataclass(frozen=True)
class Remark:
    """Something about an arm at a size that the bare table hides."""

    arm: str
    size: str
    kind: str
    """As `remarks` lists them."""
    text: str


@dataclass(frozen=True)
class Report:
    """Everything that is shown, as text or as a page."""

    suite: Suite
    rows: list[Row]
    """Sizes in the suite's order, the arms of each in the suite's."""
    analysis: Analysis
    remarks: list[Remark]
    notes: list[str]
    """What to know before reading the numbers."""
    clocks: dict[str, str]
    """Where speeds and seconds come from, a sentence by size; sizes without a result are left out."""
    runs: list[Outcome]

    def row(self, arm: str, size: str) -> Row:
        """That of an arm at a size."""
        return next(row for row in self.rows if (row.arm, row.size) == (arm, size))

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        suite, analysis = self.suite, self.analysis
        return {
            "suite": suite.name,
            "about": suite.about,
            "baseline": suite.baseline,
            "match": suite.match,
            "sizes": [size.name for size in suite.sizes],
            "rows": [asdict(row) for row in self.rows],
            "noise": {size: known and asdict(known) for size, known in analysis.noise.items()},
            "smallest_difference": analysis.floor,
            "effects": [asdict(one) for one in analysis.effects],
            "measures": {name: [asdict(one) for one in found] for name, found in analysis.measures.items()},
            "verdicts": analysis.verdicts,
            "order": asdict(analysis.order),
            "gain_per_e_fold_of_tokens": analysis.gain,
            "remarks": [asdict(one) for one in self.remarks],
            "notes": self.notes,
            "clocks": self.clocks,
            "runs": [asdict(one) for one in self.runs],
        }


def make_report(plan: Plan, lab: Path) -> Report:
    """The report of a suite as far as it has been run in `lab`."""
    runs = outcomes(plan, lab)
    analysis = analyse(plan.suite, runs)
    rows = [row(plan, cell, runs, analysis, lab) for cell in plan.cells.values()]
    clocks = {size.name: text for size in plan.suite.sizes if (text := clock(runs, size.name))}
    return Report(plan.suite, rows, analysis, remarks(plan, rows), notes(plan, runs, analysis), clocks, runs)


def row(plan: Plan, cell: Cell, runs: Sequence[Outcome], analysis: Analysis, lab: Path) -> Row:
    """One line of the table."""
    key: Key = (cell.arm.name, cell.size.name)
    mine = [one for one in runs if (one.arm, one.size) == key]
    results = [one for one in mine if one.counts]
    baseline = plan.baseline(cell.size.name)

    def mean(read: Callable[[Outcome], float | None]) -> float | None:
        values = [value for one in results if (value := read(one)) is not None]
        return statistics.fmean(values) if values else None

    names = dict.fromkeys(name for one in results for name in one.measures)
    theirs = [
        one.padding
        for one in runs
        if (one.arm, one.size) == (plan.suite.baseline, key[1]) and one.counts and one.padding is not None
    ]
    padding = mean(lambda one: one.padding)
    return Row(
        arm=key[0],
        size=key[1],
        match=cell.match,
        adjusted=str(cell.adjusted or ""),
        unmatched=None if cell.pending else unmatched(cell, baseline),
        changed_lines=changed_lines(cell, baseline, lab),
        account=account(cell.cost),
        states={state: sum(one.state == state for one in mine) for state in dict.fromkeys(one.state for one in mine)},
        seeds=len(results),
        loss=mean(lambda one: one.loss),
        measures={
            name: value for name in names if (value := mean(lambda one, n=name: one.measures.get(n))) is not None
        },
        tokens=mean(lambda one: one.tokens),
        flops=mean(lambda one: one.flops),
        seconds=mean(lambda one: one.seconds),
        tokens_per_second=mean(lambda one: one.speed),
        memory=max((one.memory for one in results if one.memory), default=None),
        padding=padding,
        more_padding=padding - statistics.fmean(theirs) if padding is not None and theirs else None,
        decode=max((one.decode for one in results if one.decode), default=None),
        stability=analysis.stability.get(key, Stability(0, 0, 0, 0)),
        effect=analysis.effect(*key) if cell.arm is not plan.suite.reference else None,
        by_flops=analysis.by_flops.get(key),
        by_seconds=analysis.by_seconds.get(key),
    )


def remarks(plan: Plan, rows: Sequence[Row]) -> list[Remark]:
    """What is named by itself, so that nobody has to find it in the table.

    - `clock`: the verdict is "better", but the baseline with the same seconds would be better still, or as good within
      the noise; or the arm is not better as matched, and is by the clock.
    - `flops`: the same with FLOPs.
    - `bought`: it is "better", and has more parameters or FLOPs than the baseline.
    - `moved`: with the same total of parameters, at least `MOVED` of them went from the feed-forward to the embedding,
      where they cost next to no FLOPs, or the other way.
    - `missed`: it is matched by seconds, and took more or less than the baseline all the same.
    - `unstable`, `failed`: some of its runs were, or did.
    """
    found = []
    for one in rows:
        if one.arm == plan.suite.baseline:
            against = None
        else:
            against = next(row for row in rows if (row.arm, row.size) == (plan.suite.baseline, one.size))
        found += [Remark(one.arm, one.size, kind, text) for kind, text in remarks_on(one, against)]
    return found


def remarks_on(row: Row, baseline: Row | None) -> list[tuple[str, str]]:
    """Kinds and texts of the remarks on one row; `baseline` is None for the baseline's own."""
    found: list[tuple[str, str]] = []
    unstable = row.stability
    if unstable.unstable:
        parts = [
            f"{count} {what}{'s' if count > 1 and what != 'diverged' else ''}"
            for count, what in (
                (unstable.spikes, "loss spike"),
                (unstable.skipped, "skipped update"),
                (unstable.diverged, "diverged"),
            )
            if count
        ]
        found.append(("unstable", f"unstable: {', '.join(parts)}"))
    if failed := row.states.get("failed"):
        found.append(("failed", f"{failed} of its {sum(row.states.values())} runs failed"))
    if baseline is None or row.effect is None:
        return found
    if text := moved(row, baseline):
        found.append(("moved", text))
    if row.match == "seconds" and row.seconds and baseline.seconds:
        ratio = row.seconds / baseline.seconds
        if abs(ratio - 1) > MISSED:
            found.append(("missed", f"was matched by seconds, but took {ratio:.2f} times the baseline's"))
    better = row.effect.verdict == BETTER
    more = {name: share for name, share in (row.unmatched or {}).items() if share > 0 and name in BOUGHT}
    if better and more:
        found.append(("bought", f"its win comes with {differences(more)}"))
    for kind, budget, unit in (("flops", row.by_flops, "FLOPs"), ("clock", row.by_seconds, "seconds")):
        if text := budget_remark(row, budget, unit):
            found.append((kind, text))
    return found


def percent(share: float) -> str:
    """A difference as a share: `+23 %`, `+0.4 %`."""
    return f"{100 * share:+.0f} %" if abs(share) >= 0.0995 else f"{100 * share:+.1f} %"


def differences(shares: Mapping[str, float] | None) -> str:
    """What is not matched."""
    if shares is None:
        return "to be measured"
    return ", ".join(f"{name} {percent(share)}" for name, share in shares.items()) or "nothing"


BOUGHT = ("parameters", "active", "FLOPs a token", "FLOPs", "tokens")
"""What a win can be bought with."""


def budget_remark(row: Row, budget: Budget | None, unit: str) -> str:
    """What equal FLOPs or seconds make of an arm's verdict; empty where they leave it as it is."""
    if budget is None or row.effect is None or abs(budget.ratio - 1) < SPEED_TOLERANCE:
        return ""
    before, after = row.effect.verdict, budget.effect.verdict
    spent = f"it takes {budget.ratio:.2f} times the baseline's {unit}"
    won = f"wins as matched by {row.match}" if row.match != "none" else "wins"
    if before == BETTER and after == WORSE:
        return f"{won} but loses by {unit}: {spent}, which would have taken the baseline further"
    if before == BETTER and after == NOISE:
        return f"{won}, and by {unit} is inside the noise: {spent}"
    if before != BETTER and after == BETTER:
        return f"{before} as matched, but better by {unit}: {spent}"
    return ""


def moved(row: Row, baseline: Row) -> str:
    """Where parameters went at an equal total; empty where they stayed."""
    ours, theirs = row.account, baseline.account
    if abs(ours.parameters / theirs.parameters - 1) > 2 * TOLERANCE:
        return ""
    embedding = ours.share("embedding") - theirs.share("embedding")
    inside = ours.share("feed_forward") - theirs.share("feed_forward")
    flops = ours.flops_per_token / theirs.flops_per_token - 1
    shares = f"embedding {100 * embedding:+.0f} points of all parameters, feed-forward {100 * inside:+.0f}"
    if embedding >= MOVED and inside <= -MOVED:
        return f"moves parameters to where they are cheap: {shares}, FLOPs a token {percent(flops)}"
    if embedding <= -MOVED and inside >= MOVED:
        return f"moves parameters to where they cost FLOPs: {shares}, FLOPs a token {percent(flops)}"
    return ""


def notes(plan: Plan, runs: Sequence[Outcome], analysis: Analysis) -> list[str]:
    """What to know before reading the numbers."""
    found = []
    done = sum(one.state == "done" for one in runs)
    if done < len(runs):
        found.append(f"{done} of {len(runs)} runs are done: what is missing is not in the verdicts.")
    if plan.caution:
        found.append(plan.caution)
    if plan.suite.overrides:
        found.append(f"Every run was given {' '.join(plan.suite.overrides)}.")
    if not any(analysis.noise.values()) and done:
        found.append(
            "No arm has several finished runs at a size, so the noise of seeds is not known: there are no verdicts."
        )
    for size in plan.suite.sizes:
        begun = any(one.counts and one.size == size.name for one in runs)
        if begun and analysis.noise[size.name] is None and any(analysis.noise.values()):
            found.append(f"{size.name}: no arm has several seeds there, so there are no verdicts at that size.")
    if any(one.state == "done" and one.loss is None for one in runs):
        found.append("Some finished runs have no held-out bits per byte and count for nothing.")
    for size in plan.suite.sizes:
        sizes = {one.bytes_evaluated for one in runs if one.size == size.name and one.counts}
        if len(sizes) > 1:
            found.append(
                f"{size.name}: arms that were measured on other held-out text than the baseline have no "
                "verdict; name an evaluation that asks all for the same as the suite's `judge`."
            )
        machines = {
            tuple(one.machine.get(key) for key in ("device", "dtype", "compile", "threads"))
            for one in runs
            if one.size == size.name and one.counts and one.machine
        }
        if len(machines) > 1:
            texts = sorted(
                f"{device} {dtype}{' compiled' if compiled else ''}, {threads} threads"
                for device, dtype, compiled, threads in machines
            )
            found.append(
                f"{size.name}: the runs did not compute alike ({'; '.join(texts)}): their speeds do not compare."
            )
    return found


def clock(runs: Sequence[Outcome], size: str) -> str:
    """Where the speeds and seconds of a size come from; empty without a result."""
    rounds = {len(one.alone) for one in runs if one.size == size and one.counts}
    if not rounds:
        return ""
    if 0 in rounds:
        return "Speeds and seconds are those of the runs themselves, beside whatever else the machine did then."
    return f"Speeds and seconds are those of {min(rounds)} short runs of each arm, with nothing beside them."


def plan_json(plan: Plan, runs: Sequence[Run], states: dict[str, str], parallel: int, stated: float) -> dict[str, Any]:
    """What would be run, as JSON holds it; `stated` is a speed as `Plan.seconds` takes it."""
    seconds = {run.name: plan.seconds(run, stated) for run in runs}
    left = [seconds[run.name] for run in runs if states[run.name] != "done"]
    return {
        "suite": plan.suite.name,
        "baseline": plan.suite.baseline,
        "parallel": parallel,
        "cells": [
            {
                "arm": cell.arm.name,
                "size": cell.size.name,
                "match": cell.match,
                "moved": asdict(cell.adjusted) if cell.adjusted else None,
                "tokens": None if cell.pending else cell.cost.tokens,
                "unmatched": {} if cell.pending else unmatched(cell, plan.baseline(cell.size.name)),
                "changed": list(cell.changed),
                **asdict(account(cell.cost)),
            }
            for cell in plan.cells.values()
        ],
        "runs": [
            {
                "name": run.name,
                "arm": run.cell.arm.name,
                "size": run.cell.size.name,
                "seed": run.seed,
                "state": states[run.name],
                "tokens": run.recipe.duration.tokens,
                "seconds": seconds[run.name],
            }
            for run in runs
        ],
        "seconds_left": None if any(one is None for one in left) else sum(one for one in left if one) / parallel,
    }
