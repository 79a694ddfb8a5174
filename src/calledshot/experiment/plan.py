"""The runs of a suite: their names, what state they are in, how long they will take, how many fit side by side."""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from calledshot import machine
from calledshot.recipe import Recipe, ShotError, UsageError, difference, from_dict, identity
from calledshot.recipe.cost import activation_bytes
from calledshot.rundir import RunDirectory, is_run, runs

from .matching import PASS, Cell, Rates, resolve
from .suite import Suite

CALIBRATION = "calibration"
"""Ends the name of the short run that comes before those of a cell that is matched by seconds."""
CALIBRATION_STEPS = 24
"""Updates of the short run that measures an arm's speed where arms are matched by seconds."""
SPEED_STEPS = 12
"""Updates of each short run that measures a cell's speed once its runs are done."""
SPEED_ROUNDS = 2
"""Such runs of each cell: between two of one cell stand those of the size's others, so that what the machine does
slowly falls on all of them, and what it does at once shows as noise."""
PROCESS_BYTES = 700 << 20
"""What a training process holds besides model, optimizer and activations: mostly the libraries."""


@dataclass(frozen=True)
class Run:
    """One planned run."""

    name: str
    """Its own, or that of another suite's finished run of the same recipe and seed."""
    cell: Cell
    seed: int
    steps: int = 0
    """Updates of a short run, which only measures its speed; 0 for one that counts."""
    origin: str = ""
    """Run that it begins with, empty for none."""

    @property
    def start(self) -> str:
        """Name of the run whose checkpoint it begins with, empty for none; `shot convert` makes it of `origin`."""
        return f"{self.name}-start" if self.origin else ""

    @property
    def recipe(self) -> Recipe:
        """What it trains."""
        recipe = replace(self.cell.recipe, name=self.name, seed=self.seed)
        if not self.steps:
            return recipe
        batch = recipe.batch.tokens
        short = replace(recipe.evals, every_steps=10 * self.steps, tokens=batch, final_tokens=batch, prompts=())
        return replace(recipe, duration=replace(recipe.duration, tokens=self.steps * batch), evals=short)


@dataclass(frozen=True)
class Plan:
    """A suite, matched, and its runs in the order in which they are trained: by size, then seed."""

    suite: Suite
    cells: dict[tuple[str, str], Cell]
    """By (arm, size)."""
    rates: Rates
    """Tokens a second by (arm, size), of calibrations and of finished runs."""
    speeds: Mapping[tuple[str, str], tuple[float, ...]]
    """Tokens a second by (arm, size), of each short run that had nothing beside it; cells without any are left out."""
    twins: Mapping[str, str] = field(default_factory=dict)
    """Names of runs of this suite that need not be made → finished runs of the same recipe and seed in their place."""

    @property
    def runs(self) -> list[Run]:
        """Every run that counts; those of cells whose tokens wait for a calibration are not known yet."""
        suite = self.suite
        return [
            self.run(self.cells[arm.name, size.name], seed)
            for size in suite.sizes
            for seed in dict.fromkeys((*suite.seeds, *size.seeds))
            for arm in suite.arms_at(size)
            if seed in suite.seeds_of(arm, size) and not self.cells[arm.name, size.name].pending
        ]

    def run(self, cell: Cell, seed: int) -> Run:
        """The run of a cell with a seed."""
        name = self.suite.run_name(cell.arm.name, cell.size.name, f"s{seed}")
        origin = self.run(cell.start, seed).name if cell.start else ""
        return Run(self.twins.get(name, name), cell, seed, origin=origin)

    @property
    def caution(self) -> str:
        """What to know of tokens and memory where arms' rows are not alike; empty where they are."""
        topologies = {cell.recipe.model.topology for cell in self.cells.values()}
        if len(topologies) < 2 or "encoder-decoder" not in topologies:
            return ""
        return (
            "Tokens are positions, padding among them, and an encoder-decoder's are those of both its stacks, each of "
            "which crosses one of them: equal tokens are about equal text where equally much is padding. Memory that "
            f"is not matched is by arithmetic, with the activations of {PASS:,} positions for every arm; what a run "
            "took in the end is measured."
        )

    @property
    def calibrations(self) -> list[Run]:
        """Short runs that measure the speeds of arms matched by seconds, and of the baseline beside them."""
        found = []
        for size in self.suite.sizes:
            cells = [self.cells[arm.name, size.name] for arm in self.suite.arms_at(size)]
            timed = [cell for cell in cells if cell.match == "seconds" and cell.arm is not self.suite.reference]
            for cell in [self.baseline(size.name), *timed] if timed else ():
                name = self.suite.run_name(cell.arm.name, size.name, CALIBRATION)
                found.append(Run(name, cell, self.suite.seeds[0], CALIBRATION_STEPS))
        return found

    @property
    def speed_runs(self) -> list[Run]:
        """Short runs that measure the speed of every cell, by size and round; a calibration is its cell's first."""
        suite = self.suite
        calibrated = {(run.cell.arm.name, run.cell.size.name): run for run in self.calibrations}
        found = []
        for size in suite.sizes:
            for place in range(SPEED_ROUNDS):
                for arm in suite.arms_at(size):
                    key = (arm.name, size.name)
                    name = suite.run_name(*key, speed_name(place))
                    first = calibrated.get(key) if place == 0 else None
                    found.append(first or Run(name, self.cells[key], suite.seeds[0], SPEED_STEPS))
        return found

    def baseline(self, size: str) -> Cell:
        """The baseline's cell at a size."""
        return self.cells[self.suite.baseline, size]

    def seconds(self, run: Run, stated: float = 0.0) -> float | None:
        """Seconds that a run's training takes: at the speed measured for its cell, else at the FLOP/s measured at its
        size, else anywhere, else at those that `stated` tokens a second of the baseline at the first size are."""
        cell = run.cell
        rate = self.rates.get((cell.arm.name, cell.size.name))
        tokens = run.recipe.duration.tokens
        if rate:
            return tokens / rate
        speeds = [
            (key[1] == cell.size.name, known * self.cells[key].cost.flops_per_token.total)
            for key, known in self.rates.items()
        ]
        here = [speed for same, speed in speeds if same] or [speed for _, speed in speeds]
        if stated and not here:
            here = [stated * self.baseline(self.suite.sizes[0].name).cost.flops_per_token.total]
        return tokens * cell.cost.flops_per_token.total / statistics.median(here) if here else None


def make_plan(suite: Suite, lab: Path) -> Plan:
    """The plan, with what has been measured in `lab` so far."""
    calibrated: dict[tuple[str, str], float] = {}
    speeds: dict[tuple[str, str], tuple[float, ...]] = {}
    for size in suite.sizes:
        for arm in suite.arms_at(size):
            key = (arm.name, size.name)
            names = [suite.run_name(*key, last) for last in (CALIBRATION, *map(speed_name, range(SPEED_ROUNDS)))]
            alone = [speed(lab / "runs" / name) for name in names]
            if alone[0]:
                calibrated[key] = alone[0]
            if measured := tuple(rate for rate in alone if rate):
                speeds[key] = measured
    # From calibrations alone: a finished run may not change what the others of its cell are.
    plan = Plan(suite, resolve(suite, calibrated), calibrated, speeds)
    plan = replace(plan, twins=twins(plan.runs, lab))
    finished: dict[tuple[str, str], list[float]] = {}
    for run in plan.runs:
        if rate := speed(lab / "runs" / run.name):
            finished.setdefault((run.cell.arm.name, run.cell.size.name), []).append(rate)
    return replace(plan, rates={**calibrated, **{key: statistics.median(rates) for key, rates in finished.items()}})


def twins(planned: Sequence[Run], lab: Path) -> dict[str, str]:
    """Finished runs in `lab` that are what planned ones would become: of the same recipe and seed, asked to compute and
    evaluate alike, from the beginning and with every batch. A run that has begun under its own name keeps it."""
    wanted = [run for run in planned if not run.cell.start and not is_run(lab / "runs" / run.name)]
    found: dict[tuple[object, ...], str] = {}
    for run in runs(lab) if wanted else ():
        if run.state() == "done" and not run.load("lineage") and not run.rows("skips"):
            with suppress(ShotError, ValueError):
                if text := run.recipe_toml():
                    found.setdefault(asked(from_dict(tomllib.loads(text), run.name)), run.name)
    return {run.name: found[key] for run in wanted if (key := asked(run.recipe)) in found}


def asked(recipe: Recipe) -> tuple[object, ...]:
    """What two runs have to share so that one can stand for the other."""
    return identity(recipe), replace(recipe.parallel, threads=0), recipe.evals, recipe.data.skip


def speed_name(place: int) -> str:
    """Ends the name of the short run of a round, counted from 0."""
    return f"speed-{place + 1}"


def speed(run: Path) -> float | None:
    """Tokens a second of a finished run; None before."""
    if not is_run(run):
        return None
    rate = RunDirectory(run).load("summary").get("tokens_per_second")
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def state(run: Run, lab: Path) -> str:
    """`not started`, `running`, `done`, `failed` or `interrupted`. UsageError where the run of that name is of another
    recipe."""
    path = lab / "runs" / run.name
    if not is_run(path):
        return "not started"
    found = RunDirectory(path)
    if differs := differences(found, run.recipe):
        raise UsageError(
            f"{path}: is a run of another recipe ({'; '.join(differs[:4])}): give the suite another --name, or remove "
            "that run"
        )
    return found.state()


def differences(run: RunDirectory, recipe: Recipe) -> list[str]:
    """What decides a run and is not as `recipe` has it, as text; [] for the run of a trainer without recipes."""
    text = run.recipe_toml()
    if not text:
        return []
    try:
        theirs = from_dict(tomllib.loads(text), str(run.path / "recipe.toml"))
    except (ShotError, ValueError) as error:
        return [str(error)]
    forked = bool(run.load("lineage"))  # and has the tokenizer of the run that it began with
    return [
        f"{key} {before!r} -> {now!r}"
        for key, before, now in difference(theirs, recipe, identity_only=True)
        if not (forked and key == "data.tokenizer")
    ]


def chosen(runs: Iterable[Run], arms: Sequence[str], sizes: Sequence[str]) -> list[Run]:
    """The runs of some arms and sizes; of all where none is named."""
    return [
        run for run in runs if (not arms or run.cell.arm.name in arms) and (not sizes or run.cell.size.name in sizes)
    ]


def bytes_needed(run: Run) -> int:
    """Memory of one training process on a CPU, by arithmetic."""
    recipe, found = run.recipe, run.cell.cost
    row = found.shape.row_positions
    rows = max(1, min(PASS, recipe.batch.tokens) // row)
    mask = 5 * rows * row**2
    return PROCESS_BYTES + found.bytes.fixed + activation_bytes(found.shape, rows * row, 4) + mask


def room(runs: Sequence[Run]) -> int:
    """Runs that fit side by side on this machine: one a GPU; on a CPU one a core as far as memory goes; one at a time
    where arms are matched by seconds, since neighbours take time from each other."""
    if any(run.steps or run.cell.match == "seconds" for run in runs):
        return 1
    if gpus := machine.gpus():
        return len(gpus)
    available = machine.describe()["memory"]["available_bytes"]
    largest = max((bytes_needed(run) for run in runs), default=1)
    return max(1, min(machine.usable_cores(), int(0.9 * available) // largest))
