"""Training a plan's runs, in any number of attempts, and asking each what it decodes and how it evaluates.

A lab keeps beside its runs, in `ablations/SUITE/`: the recipes that were trained, what the processes said (`logs/`),
`attempts.jsonl` (how each process ended) and `measurements.jsonl` (decode speeds and evaluations of finished runs).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from calledshot import machine
from calledshot.recipe import to_toml
from calledshot.rundir import JsonLines, RunDirectory, atomic_write, is_run, read_jsonl

from .matching import Cell
from .plan import Plan, Run, chosen, make_plan, room, state
from .pool import Job, Pool
from .suite import Eval, Suite

SHOT = (sys.executable, "-m", "calledshot")
DECODED_TOKENS = 192
"""Most tokens of the completion whose speed is a run's decode speed."""
FEWEST_DECODED = 32
"""A completion that ends sooner says little about speed."""
DECODE_ATTEMPTS = 3
"""Completions, each by a process and a seed of its own; the quickest counts, as neighbours only take time away."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Ran:
    """What came of running a suite."""

    plan: Plan
    exit_code: int
    """0 when every chosen run is done and answered, 1 when one failed, 130 or 143 after an interruption."""


def records(suite: Suite, lab: Path) -> Path:
    """The suite's folder in the lab."""
    return lab / "ablations" / suite.name


def run_suite(
    suite: Suite,
    lab: Path,
    *,
    arms: Sequence[str] = (),
    sizes: Sequence[str] = (),
    parallel: int = 0,
    retry: bool = False,
    speed: bool = True,
    tell: Tell = lambda text: None,
    command: Sequence[str] = SHOT,
) -> Ran:
    """Trains what is not done yet: what is missing is started, what was interrupted goes on, what failed is left as it
    is unless `retry`. Then every finished run is measured once, and with `speed` how quickly every cell that has one
    trains with nothing beside it. `parallel` 0 takes what fits.

    `lab` is that of the current folder, where the processes run. `command` is what `train RECIPE --name RUN`, `eval`
    and `generate` are handed to: another trainer that writes run directories may stand there. Raises: UsageError,
    before anything is started, where a run of that name is of another recipe.
    """
    plan = make_plan(suite, lab)
    todo = chosen([*plan.calibrations, *plan.runs], arms, sizes)
    states = {run.name: state(run, lab) for run in todo}
    slots = parallel or room(todo)
    gpus = [str(gpu.index) for gpu in machine.gpus()]
    with Pool(slots, gpus) as pool:
        bench = Bench(suite, lab, pool, tell, tuple(command))
        if calibrations := [run for run in plan.calibrations if run.name in states and states[run.name] != "done"]:
            bench.train_alone(calibrations)
            plan = make_plan(suite, lab)
        runs = chosen(plan.runs, arms, sizes)
        states = {run.name: state(run, lab) for run in runs}
        done = sum(one == "done" for one in states.values())
        others = sum(run.name in plan.twins.values() for run in runs)
        shared = f", {others} of these by other suites" if others else ""
        tell(f"{suite.name}: {len(runs)} runs, {done} of them done{shared}; {slots} at a time")
        bench.train([run for run in runs if states[run.name] != "done"], retry)
        finished = [run for run in runs if state(run, lab) == "done"]
        bench.measure(finished)
        if speed and pool.signal is None:
            bench.measure_speed(plan, finished)
        failed = bench.failed or any(state(run, lab) != "done" for run in runs)
        return Ran(make_plan(suite, lab), pool.exit_code or int(failed))


class Bench:
    """Where a suite's commands are run and what they gave is written down."""

    def __init__(self, suite: Suite, lab: Path, pool: Pool, tell: Tell, command: tuple[str, ...]) -> None:
        self.suite, self.lab, self.pool, self.tell, self.command = suite, lab, pool, tell, command
        self.folder = records(suite, lab)
        self.failed = False
        """Whether something that was asked of a finished run went wrong."""

    def train(self, runs: Sequence[Run], retry: bool) -> None:
        """Trains runs; one that fails does not keep the others from theirs."""
        todo = []
        for run in runs:
            now = state(run, self.lab)
            if now == "failed" and not retry:
                self.tell(f"{run.name}: failed before and is left as it is; --retry tries it again")
            elif now == "running":
                self.tell(f"{run.name}: is being trained by another process")
            else:
                todo.append(run)
        self._train([run for run in todo if not run.start], len(todo))
        later = [run for run in todo if run.start]
        self.convert({run.start: (run.origin, run.cell.arm.convert) for run in later})
        self._train([run for run in later if is_run(self.lab / "runs" / run.start)], len(later))

    def train_alone(self, runs: Sequence[Run]) -> None:
        """Trains short runs one at a time, those that failed before too."""
        slots, self.pool.slots = self.pool.slots, 1
        self.train(runs, retry=True)
        self.pool.slots = slots

    def measure_speed(self, plan: Plan, finished: Sequence[Run]) -> None:
        """Trains the short runs of every cell that has a finished run, computing as that one did but with all cores;
        what is known is not measured again."""
        cells: dict[tuple[str, str], list[RunDirectory]] = {}
        for run in finished:
            directory = RunDirectory(self.lab / "runs" / run.name)
            cells.setdefault((run.cell.arm.name, run.cell.size.name), []).append(directory)
        todo = [
            replace(run, cell=computing_alike(run.cell, counted))
            for run in plan.speed_runs
            if (counted := cells.get((run.cell.arm.name, run.cell.size.name))) and state(run, self.lab) != "done"
        ]
        if todo:
            self.tell(f"{self.suite.name}: speeds are measured, one at a time; --no-speed leaves that out")
            self.train_alone(todo)

    def _train(self, todo: Sequence[Run], total: int) -> None:
        threads = max(1, machine.usable_cores() // self.pool.slots)
        short = {run.name for run in todo if run.steps}
        ended = [0]

        def job(run: Run) -> Job:
            recipe = run.recipe
            if not recipe.parallel.threads:
                recipe = replace(recipe, parallel=replace(recipe.parallel, threads=threads))
            file = self.folder / "recipes" / f"{run.name}.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, to_toml(recipe))
            self.tell(f"{run.name}: {'goes on' if is_run(self.lab / 'runs' / run.name) else 'starts'}")
            fork = ("--from", f"{run.start}@0") if run.start else ()
            return Job(run.name, (*self.command, "train", str(file), "--name", run.name, *fork), self.log(run.name))

        def over(job: Job, code: int, seconds: float) -> None:
            ended[0] += 1
            path = self.lab / "runs" / job.name
            now = RunDirectory(path).state() if is_run(path) else "not started"
            said = "" if now == "done" else last_words(job.log)
            with JsonLines(self.folder / "attempts.jsonl") as attempts:
                attempts.append({"run": job.name, "code": code, "seconds": seconds, "state": now, "message": said})
            if job.name in short and now == "done":  # put away, without checkpoints that nobody goes on from
                RunDirectory(path).archive()
                rmtree(RunDirectory(path).folder, ignore_errors=True)
            if now == "not started" and self.pool.signal is None:
                now = "failed"
            more = f": {said}" if said and self.pool.signal is None else ""
            self.tell(f"{job.name}: {now} after {seconds:,.0f} s ({ended[0]} of {total}){more}")

        self.pool.work((job(run) for run in todo), over)

    def convert(self, wanted: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        """Makes runs of others' checkpoints: name → (origin, arguments of `shot convert`). Those that are there stay;
        those whose origin is not done are not made."""
        todo = {
            name: (arguments[0], origin, *arguments[1:], "--name", name)
            for name, (origin, arguments) in wanted.items()
            if not is_run(self.lab / "runs" / name) and self._done(origin)
        }

        def made(job: Job, code: int, seconds: float) -> None:
            if code == 0 and is_run(self.lab / "runs" / job.name):
                RunDirectory(self.lab / "runs" / job.name).archive()
            elif self.pool.signal is None:
                self.failed = True
                self.tell(f"{job.name}: ended with exit code {code}: {last_words(job.log)}")

        self.pool.work((self._job(name, ("convert", *line)) for name, line in todo.items()), made)

    def _done(self, name: str) -> bool:
        path = self.lab / "runs" / name
        return is_run(path) and RunDirectory(path).state() == "done"

    def log(self, name: str) -> Path:
        """The file for what a run's processes say."""
        return self.folder / "logs" / f"{name}.log"

    def measure(self, runs: Sequence[Run]) -> None:
        """Asks every run what the suite's `evals` ask, and the first one of each cell how quickly it decodes; what is
        known is not asked again."""
        known = measurements(self.suite, self.lab)
        asked: dict[str, tuple[Run, Eval]] = {}
        for run in runs:
            for one in self.suite.evals:
                mine = not one.arms or run.cell.arm.name in one.arms
                if mine and one.name not in known.get(run.name, {}):
                    asked[f"{run.name}-{one.name}"] = run, one
        converted = {name: (run.name, one.convert) for name, (run, one) in asked.items() if one.convert}
        self.convert(converted)

        def evaluated(job: Job, code: int, seconds: float) -> None:
            run, one = asked[job.name.removesuffix("-eval")]
            if (answer := self._answer(job, code)) is not None:
                self._keep(run, one.name, over_sources(answer, one.field))

        self.pool.work(
            (
                self._job(f"{name}-eval", ("eval", name if one.convert else run.name, *one.arguments, "--json"))
                for name, (run, one) in asked.items()
                if not one.convert or is_run(self.lab / "runs" / name)
            ),
            evaluated,
        )
        cells: dict[tuple[str, str], Run] = {}
        for run in runs:
            cells.setdefault((run.cell.arm.name, run.cell.size.name), run)
        fastest: dict[str, float | None] = {}

        def decoded(job: Job, code: int, seconds: float) -> None:
            if (answer := self._answer(job, code)) is None:
                return
            name = job.name.rpartition("-decode-")[0]
            before = fastest.setdefault(name, None)
            if sum(one["tokens"] for one in answer["completions"]) >= FEWEST_DECODED:
                fastest[name] = max(answer["tokens_per_second"], before or 0.0)

        self.pool.slots = 1  # neighbours would take time from what is measured
        todo = [run for run in cells.values() if "decode" not in known.get(run.name, {})]
        self.pool.work(
            (
                self._job(f"{run.name}-decode-{seed}", decode_command(run, seed))
                for run in todo
                for seed in range(DECODE_ATTEMPTS)
            ),
            decoded,
        )
        for run in todo:
            if run.name in fastest and self.pool.signal is None:
                self._keep(run, "decode", fastest[run.name])

    def _job(self, name: str, command: tuple[str, ...]) -> Job:
        return Job(name, (*self.command, *command), self.log(name), self.folder / "logs" / f"{name}.json")

    def _answer(self, job: Job, code: int) -> Any:
        """What a job printed, as JSON; None where it failed, which is told."""
        if code == 0 and job.output:
            with suppress(OSError, ValueError):
                return json.loads(job.output.read_bytes())
        if self.pool.signal is None:
            self.failed = True
            self.tell(f"{job.name}: ended with exit code {code}: {last_words(job.log)}")
        return None

    def _keep(self, run: Run, measure: str, value: float | None) -> None:
        with JsonLines(self.folder / "measurements.jsonl") as rows:
            rows.append({"run": run.name, "measure": measure, "value": value})


def computing_alike(cell: Cell, runs: Sequence[RunDirectory]) -> Cell:
    """The cell with what most of its runs found out about the machine, which a shorter one might not."""
    machines = [list((run.load("probes").get("machines") or {}).values())[-1:] for run in runs]
    settings = [
        tuple(one.get(key) for key in ("dtype", "compile", "micro_tokens")) for (one,) in filter(None, machines)
    ]
    if not settings:
        return cell
    (dtype, compiled, micro_tokens), asked = Counter(settings).most_common(1)[0][0], cell.recipe.parallel
    parallel = replace(
        asked,
        dtype=dtype or asked.dtype,
        compile={True: "on", False: "off"}.get(compiled, asked.compile),
        micro_tokens=micro_tokens or asked.micro_tokens,
    )
    return replace(cell, recipe=replace(cell.recipe, parallel=parallel))


def decode_command(run: Run, seed: int) -> tuple[str, ...]:
    """One sequence alone; every token is drawn, since the likeliest ones of a small model soon go round in a circle."""
    tokens = min(DECODED_TOKENS, 3 * run.recipe.model.context // 4)
    drawn = ("--temperature", "1", "--top-p", "1", "--seed", str(seed))
    return ("generate", run.name, "The", "--tokens", str(tokens), *drawn, "--json")


def over_sources(answer: Any, field: str) -> float | None:
    """A number of each source of an evaluation, as one, weighted by their bytes; None where a source lacks it."""
    sources = list((answer[0] if isinstance(answer, list) else answer).get("sources", {}).values())
    values = [(one.get(field), one.get("bytes") or 0) for one in sources]
    if not values or any(not isinstance(value, int | float) for value, _ in values):
        return None
    weight = sum(size for _, size in values)
    return sum(value * size for value, size in values) / weight if weight else None


def measurements(suite: Suite, lab: Path) -> dict[str, dict[str, float | None]]:
    """What was measured of each run: `decode` in tokens a second, and the suite's evals."""
    found: dict[str, dict[str, float | None]] = {}
    for row in read_jsonl(records(suite, lab) / "measurements.jsonl"):
        found.setdefault(str(row.get("run")), {})[str(row.get("measure"))] = row.get("value")
    return found


def messages(suite: Suite, lab: Path) -> dict[str, str]:
    """Why the last attempt at each run did not end well, where it said so."""
    rows = read_jsonl(records(suite, lab) / "attempts.jsonl")
    return {str(row.get("run")): str(row.get("message", "")) for row in rows}


def last_words(log: Path, most: int = 4096) -> str:
    """The last line that a process said."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - most))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "").removeprefix("shot: ")
