"""Start, continue and fork runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from calledshot import machine
from calledshot.data import Prepared, prepare
from calledshot.data.prepare import Progress
from calledshot.recipe import Recipe, RunError, ShotError, UsageError, check, difference, identity, to_toml
from calledshot.rundir import RunDirectory, atomic_write, is_run, resolve_checkpoint
from calledshot.training.console import Console
from calledshot.training.load import run_recipe, sized
from calledshot.training.optimizer import KNOWN, user_class
from calledshot.training.probe import set_threads
from calledshot.training.sinks import Sink
from calledshot.training.stop import Stop, Stopped
from calledshot.training.trainer import Trainer

LONGEST_NAME = 128
"""Bytes of a run's name: half of what file systems take, so that files can be called after it."""
MEANING = ("feed_forward", "positions", "norm", "norm_placement", "router", "renormalize", "softcap", "top_k")
"""Keys of the model that leave the shapes of the weights and change what they compute."""
HOUSE = Path(__file__).resolve().parent.parent
"""The code that runs."""


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
    another one) and counters; its duration and schedule count from the beginning of the run it comes from, minutes
    from the fork. UsageError when the name is taken by a run of another recipe.
    """
    check(recipe)
    name = name or recipe.name
    if not name:
        raise UsageError("the recipe has no name: say what the run is to be called with --name NAME")
    check_name(name)
    path = lab / "runs" / name
    if is_run(path):
        existing = RunDirectory.open(path)
        recipe = same_recipe(existing, recipe, origin, fresh_optimizer)
        return go_on(existing, recipe, lab, anew=True, sinks=sinks, progress=progress)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path}: exists and is not a run: move it away, or choose another --name")
    own = recipe.optimizer.name not in KNOWN
    if own:
        user_class(recipe.optimizer.name, "optimizer.name")
    parent = None
    if origin:
        parent = _parent(origin, lab)
        theirs = run_recipe(parent[0]).model
        if changed := [key for key in MEANING if getattr(theirs, key) != getattr(recipe.model, key)]:
            print(
                f"shot: warning: {parent[0].name} was trained with another model.{', model.'.join(changed)}: its "
                "weights are taken all the same, and compute something else here",
                file=sys.stderr,
            )
        recipe = _with_tokenizer_of(parent[0], recipe, lab)
        fresh_optimizer = fresh_optimizer or run_recipe(parent[0]).optimizer.name != recipe.optimizer.name
    with Stop() as stop:
        prepared = _prepare(recipe, lab, stop, progress)
        if prepared is None:
            return stop.exit_code
        run = RunDirectory.create(
            path,
            recipe_toml=to_toml(recipe),
            identity=identity(recipe),
            lineage={"parent": reference(parent[0], lab), "step": parent[1], "fresh_optimizer": fresh_optimizer}
            if parent
            else None,
            files=[Path(recipe.optimizer.name.partition(":")[0])] if own else [],
        )
        try:
            return _incarnate(run, recipe, prepared, stop, parent=parent, fresh_optimizer=fresh_optimizer, sinks=sinks)
        except UsageError:
            if not run.tail("metrics"):  # nothing was trained: another attempt may have the name
                shutil.rmtree(path)
            raise


def check_name(name: str) -> None:
    """UsageError for what a run cannot be called."""
    if name.startswith(".") or set("/@") & set(name) or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise UsageError(
            f"name = {name[:80]!r}: a run is a folder, and RUN@STEP its checkpoint: choose a --name without / and @, "
            f"with no . in front, of at most {LONGEST_NAME} bytes"
        )


def go_on(
    run: RunDirectory,
    recipe: Recipe,
    lab: Path,
    *,
    anew: bool = False,
    sinks: Sequence[str] = (),
    progress: Progress | None = None,
) -> int:
    """The next incarnation of a run; what may change on the way is taken from `recipe`. Its data are prepared once more
    where they are gone if `anew`; else that is a UsageError."""
    if run.state() == "done":
        print(f"shot: {run.path} is done; `shot report {run.name}` shows it", file=sys.stderr)
        return 0
    with Stop() as stop:
        prepared = _data_of(run, recipe, lab, anew, stop, progress)
        if prepared is None:
            return stop.exit_code
        lineage = run.load("lineage")
        # A fork that was killed before its own first checkpoint begins with its parent's once more.
        parent = _parent(f"{lineage['parent']}@{lineage['step']}", lab) if lineage and run.latest() is None else None
        fresh = bool(lineage.get("fresh_optimizer"))
        return _incarnate(run, recipe, prepared, stop, parent=parent, fresh_optimizer=fresh, sinks=sinks)


def _data_of(
    run: RunDirectory, recipe: Recipe, lab: Path, anew: bool, stop: Stop, progress: Progress | None
) -> Prepared | None:
    """What the run began with, if it is still there: the sources may have changed since, or the network be gone."""
    if not run.load("data"):  # it was killed before it had begun
        return _prepare(recipe, lab, stop, progress)
    try:
        return Prepared.of_run(run)
    except UsageError:
        if not anew:
            raise
    return _prepare(recipe, lab, stop, progress)


def _prepare(recipe: Recipe, lab: Path, stop: Stop, progress: Progress | None) -> Prepared | None:
    """The prepared data; None when a stop was asked for meanwhile. What is prepared by then is kept."""

    def heeding(stage: str, done: int, total: int) -> None:
        stop.check()
        if progress:
            progress(stage, done, total)

    try:
        prepared = prepare(recipe, lab, heeding)
        stop.check()
    except Stopped:
        return None
    return prepared


def _parent(origin: str, lab: Path) -> tuple[RunDirectory, int]:
    """The checkpoint that `RUN@STEP`, or `RUN` for its latest, names."""
    directory, step = resolve_checkpoint(origin, lab)
    found = directory.latest() if step is None else step
    if found is None:
        raise UsageError(f"--from {origin}: {directory.path} has no checkpoint yet")
    return directory, found


def reference(run: RunDirectory, lab: Path) -> str:
    """How a run is called from within the lab, so that the lab can be moved."""
    path = run.path.resolve()
    return path.name if path.parent == (lab / "runs").resolve() else str(path)


def _with_tokenizer_of(parent: RunDirectory, recipe: Recipe, lab: Path) -> Recipe:
    """A fork trains no tokenizer: another one would give every row of the embedding another meaning."""
    if recipe.data.tokenizer != "bpe":
        return recipe
    folder = Path("runs", reference(parent, lab))  # a path that is absolute stays so
    return replace(recipe, data=replace(recipe.data, tokenizer=str(folder / "tokenizer.json")))


def resume(run: RunDirectory, *, sinks: Sequence[str] = (), progress: Progress | None = None) -> int:
    """Go on with a run exactly as its recipe says. UsageError when the data that it began with are not here."""
    return go_on(run, run_recipe(run), run.path.absolute().parent.parent, sinks=sinks, progress=progress)


def same_recipe(run: RunDirectory, recipe: Recipe, origin: str = "", fresh_optimizer: bool = False) -> Recipe:
    """The recipe to go on with; UsageError, with what differs, when the run is of another recipe or fork."""
    known, lineage = run_recipe(run), run.load("lineage")
    if lineage and recipe.data.tokenizer == "bpe":
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=known.data.tokenizer))
    differences = [
        f"{key} {theirs!r} -> {ours!r}" for key, theirs, ours in difference(known, recipe, identity_only=True)
    ]
    parent, _, step = origin.rpartition("@") if origin.rpartition("@")[2].isdecimal() else (origin, "", "")
    began = f"{lineage['parent']}@{lineage['step']}" if lineage else "nothing"
    if Path(parent).name != Path(lineage.get("parent", "")).name or step not in ("", str(lineage.get("step"))):
        differences.append(f"--from {began} -> {origin or 'nothing'}")
    elif fresh_optimizer and not lineage.get("fresh_optimizer"):
        differences.append("--fresh-optimizer was not given")
    if differences:
        raise UsageError(
            f"{run.path}: is a run of another recipe ({'; '.join(differences)}); "
            f"choose another --name, or `shot train ... --from {run.name}@STEP --name NEW` to fork it"
        )
    return recipe


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
        content = (prepared.path / "tokenizer.json").read_bytes()
        if not tokenizer.exists():
            atomic_write(tokenizer, content)
        elif tokenizer.read_bytes() != content:
            raise RunError(
                f"{tokenizer}: is not the tokenizer that the data are prepared with now ({prepared.path}); "
                "the sources have changed, so fork the run instead (`shot train ... --from`)"
            )
        asked, recipe = recipe, sized(recipe, prepared.tokenizer)
        set_threads(recipe)  # so that the environment written down is the one computed in
        dashboards = [Sink(kind, recipe, run.name, run.path) for kind in sinks]
        run.begin_incarnation(
            machine.describe() | {"world_size": 1} | commit(), [Path(sys.argv[0]).name, *sys.argv[1:]], code_diff()
        )
        console = Console(run.incarnation_path() / "logs" / "rank0.log")
        events = run.writer("events")
        events.append({"kind": "start"})
        try:
            run.save("data", prepared.record())
            if changed := difference(run_recipe(run), asked):
                atomic_write(run.path / "recipe.toml", to_toml(asked))
                what = "; ".join(f"{key} {before!r} -> {now!r}" for key, before, now in changed)
                events.append({"kind": "recipe_changed", "changed": what})
            trainer = Trainer(recipe, run, prepared, console, stop, dashboards)
            if not trainer.restore(run) and parent:
                trainer.restore(*parent, with_optimizer=not fresh_optimizer)
                trainer.save()  # from here on, the fork does not need its parent
            console.say(trainer.banner())
            outcome = trainer.train()
            events.append({"kind": "stop", "state": outcome, "step": trainer.counters.step})
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(ShotError):  # a full disk must not hide what happened
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
    return _git("diff", "HEAD", "--", str(HOUSE))


def commit() -> dict[str, str]:
    """The commit that the code is of; {} outside a repository."""
    found = _git("log", "-1", "--format=%H", "--", str(HOUSE)).strip()
    return {"commit": found} if found else {}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(HOUSE), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
