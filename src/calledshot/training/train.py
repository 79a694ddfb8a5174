"""Start, continue and fork runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calledshot import machine
from calledshot.data import Prepared, prepare
from calledshot.data.prepare import Progress
from calledshot.recipe import Recipe, RunError, UsageError, check, difference, identity, to_toml
from calledshot.rundir import RunDirectory, is_run, resolve_checkpoint
from calledshot.training.console import Console
from calledshot.training.load import run_recipe, sized
from calledshot.training.optimizer import KNOWN
from calledshot.training.sinks import Sink
from calledshot.training.stop import Stop
from calledshot.training.trainer import Trainer


def train(
    recipe: Recipe,
    lab: Path,
    *,
    name: str = "",
    origin: str = "",
    fresh_optimizer: bool = False,
    sinks: Sequence[str] = (),
    progress: Progress | None = None,
) -> int:
    """Train a recipe in `lab/runs/NAME`, or go on with that run when it is of the same recipe; the exit code.

    `origin` is `RUN@STEP`: the new run begins with that checkpoint's weights, optimizer (unless `fresh_optimizer`, or
    another one) and counters; its duration and schedule count from the beginning of the run it comes from. UsageError
    when the name is taken by a run of another recipe.
    """
    check(recipe)
    name = name or recipe.name
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"name = {name!r}: say what the run is to be called with --name NAME")
    path = lab / "runs" / name
    parent: tuple[RunDirectory, int] | None = None
    if origin:
        directory, step = resolve_checkpoint(origin, lab)
        found = directory.latest() if step is None else step
        if found is None:
            raise UsageError(f"--from {origin}: {directory.path} has no checkpoint yet")
        parent = (directory, found)
        if recipe.data.tokenizer == "bpe":
            # Another tokenizer would give every row of the embedding another meaning.
            tokenizer = directory.path.resolve() / "tokenizer.json"
            recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(tokenizer)))
    if is_run(path):
        existing = RunDirectory.open(path)
        refuse_difference(existing, recipe)
        return go_on(existing, recipe, lab, sinks=sinks, progress=progress)
    if path.exists() and any(path.iterdir()):
        raise UsageError(f"{path}: exists and is not a run: move it away, or choose another --name")
    with Stop() as stop:
        prepared = prepare(recipe, lab, progress)
        if stop.requested:
            return stop.exit_code
        run = RunDirectory.create(path, recipe_toml=to_toml(recipe), identity=identity(recipe))
        if recipe.optimizer.name not in KNOWN:
            shutil.copy2(recipe.optimizer.name.partition(":")[0], path)
        if parent:
            run.save("lineage", {"parent": parent[0].name, "step": parent[1], "fresh_optimizer": fresh_optimizer})
        return _incarnate(run, recipe, prepared, stop, parent=parent, fresh_optimizer=fresh_optimizer, sinks=sinks)


def go_on(
    run: RunDirectory, recipe: Recipe, lab: Path, *, sinks: Sequence[str] = (), progress: Progress | None = None
) -> int:
    """The next incarnation of a run; what may change on the way is taken from `recipe`."""
    if run.state() == "done":
        print(f"shot: {run.path} is done; `shot report {run.name}` shows it", file=sys.stderr)
        return 0
    with Stop() as stop:
        prepared = prepare(recipe, lab, progress)
        if stop.requested:
            return stop.exit_code
        lineage = run.load("lineage")
        parent = None
        if lineage and run.latest() is None:
            directory, step = resolve_checkpoint(f"{lineage['parent']}@{lineage['step']}", lab)
            parent = (directory, int(lineage["step"] if step is None else step))
        fresh = bool(lineage.get("fresh_optimizer"))
        return _incarnate(run, recipe, prepared, stop, parent=parent, fresh_optimizer=fresh, sinks=sinks)


def resume(run: RunDirectory, *, sinks: Sequence[str] = (), progress: Progress | None = None) -> int:
    """Go on with a run exactly as its recipe says."""
    return go_on(run, run_recipe(run), run.path.absolute().parent.parent, sinks=sinks, progress=progress)


def refuse_difference(run: RunDirectory, recipe: Recipe) -> None:
    """UsageError, with what differs, when a run is of another recipe."""
    if run.identity == identity(recipe):
        return
    known = run_recipe(run)
    differences = [f"{key} {theirs!r} -> {ours!r}" for key, theirs, ours in difference(known, recipe) if key != "name"]
    raise UsageError(
        f"{run.path}: is a run of another recipe ({'; '.join(differences) or 'written by another version'}); "
        f"choose another --name, or `shot train ... --from {run.name}@STEP --name NEW` to fork it"
    )


def _incarnate(
    run: RunDirectory,
    recipe: Recipe,
    prepared: Prepared,
    stop: Stop,
    *,
    parent: tuple[RunDirectory, int] | None,
    fresh_optimizer: bool,
    sinks: Sequence[str],
) -> int:
    with run.lock():
        tokenizer = run.path / "tokenizer.json"
        if not tokenizer.exists():
            shutil.copy2(prepared.path / "tokenizer.json", tokenizer)
        elif tokenizer.read_bytes() != (prepared.path / "tokenizer.json").read_bytes():
            raise RunError(
                f"{tokenizer}: is not the tokenizer that the data are prepared with now ({prepared.path}); "
                "the sources have changed, so fork the run instead (`shot train ... --from`)"
            )
        run.save("data", prepared.record())
        recipe = sized(recipe, prepared.tokenizer)
        dashboards = [Sink(kind, recipe, run.name, run.path) for kind in sinks]
        run.begin_incarnation(machine.describe(), [Path(sys.argv[0]).name, *sys.argv[1:]], code_diff())
        console = Console(run.incarnation_path() / "logs" / "rank0.log")
        events = run.writer("events")
        events.append({"kind": "start"})
        try:
            trainer = Trainer(recipe, run, prepared, console, stop, dashboards)
            if not trainer.restore(run) and parent:
                trainer.restore(*parent, with_optimizer=not fresh_optimizer)
            console.say(trainer.banner())
            outcome = trainer.train()
            events.append({"kind": "stop", "state": outcome, "step": trainer.counters.step})
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            events.append({"kind": "stop", "state": state, "message": str(error)})
            run.set_status(state=state, message=str(error))
            raise
        finally:
            for dashboard in dashboards:
                dashboard.close()
            console.close()
            run.close()
    return stop.exit_code if outcome == "interrupted" else 0


def code_diff() -> str:
    """Uncommitted changes of the code that runs, as `git diff`; empty outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "diff", "HEAD", "--", str(folder.parent)],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
