"""Start, continue and fork runs."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from calledshot import machine
from calledshot.data import Prepared, prepare
from calledshot.data.prepare import Progress
from calledshot.recipe import (
    Layout,
    Recipe,
    RunError,
    ShotError,
    UsageError,
    check,
    difference,
    from_dict,
    identity,
    layout,
    to_toml,
)
from calledshot.rundir import FollowedRun, RunDirectory, atomic_write, is_run, resolve_checkpoint
from calledshot.training import remote
from calledshot.training.console import Console
from calledshot.training.join import Order, begin, joined, leading, wait_for_order
from calledshot.training.load import run_recipe, sized
from calledshot.training.optimizer import KNOWN, user_class
from calledshot.training.probe import set_threads
from calledshot.training.sinks import Sink
from calledshot.training.stop import Stop, Stopped
from calledshot.training.trainer import Trainer
from calledshot.training.world import World

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
    with joined() as world:
        if not world.leads:
            return follow(world)
        with leading(world):
            return _train(recipe, lab, world, name, origin, fresh_optimizer, sinks, progress)


def _train(
    recipe: Recipe,
    lab: Path,
    world: World,
    name: str,
    origin: str,
    fresh_optimizer: bool,
    sinks: Sequence[str],
    progress: Progress | None,
) -> int:
    check(recipe)
    name = name or recipe.name
    if not name:
        raise UsageError("the recipe has no name: say what the run is to be called with --name NAME")
    check_name(name)
    path = lab / "runs" / name
    if is_run(path):
        existing = RunDirectory.open(path)
        recipe = same_recipe(existing, recipe, origin, fresh_optimizer)
        return _go_on(existing, recipe, lab, world, anew=True, sinks=sinks, progress=progress)
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
            return _incarnate(
                run, recipe, prepared, stop, world, parent=parent, fresh_optimizer=fresh_optimizer, sinks=sinks
            )
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


def _go_on(
    run: RunDirectory,
    recipe: Recipe,
    lab: Path,
    world: World,
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
        return _incarnate(run, recipe, prepared, stop, world, parent=parent, fresh_optimizer=fresh, sinks=sinks)


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
    with joined() as world:
        if not world.leads:
            return follow(world)
        with leading(world):
            lab = run.path.absolute().parent.parent
            return _go_on(run, run_recipe(run), lab, world, sinks=sinks, progress=progress)


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
    world: World,
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
        shared = layout(recipe, world.size, memory_of_rank(world))
        set_threads(recipe, world.place.local_size)  # so that the environment written down is the one computed in
        dashboards = [Sink(kind, recipe, run.name, run.path) for kind in sinks]
        ranks = {"world_size": world.size, "layout": asdict(shared)}
        ranks["freed_memory_kept"] = machine.keep_freed_memory()
        run.begin_incarnation(
            machine.describe() | ranks | commit(), [Path(sys.argv[0]).name, *sys.argv[1:]], code_diff()
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
            remote.fetch(run, recipe.checkpoint.remote, console.say)
            begin(
                world,
                Order(
                    str(run.path.absolute()), run.incarnation, to_toml(asked), asdict(shared),
                    None if parent is None else (str(parent[0].path.absolute()), parent[1]), fresh_optimizer,
                ),
            )  # fmt: skip
            outcome, step = _work(recipe, run, prepared, console, stop, dashboards, world, parent, fresh_optimizer)
            events.append({"kind": "stop", "state": outcome, "step": step})
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
    return _exit_code(stop, outcome)


def _work(
    recipe: Recipe,
    run: RunDirectory,
    prepared: Prepared,
    console: Console,
    stop: Stop,
    dashboards: Sequence[Sink],
    world: World,
    parent: tuple[RunDirectory, int] | None,
    fresh_optimizer: bool,
) -> tuple[str, int]:
    """What every rank does: how it ended, and at which step."""
    trainer = Trainer(recipe, run, prepared, console, stop, dashboards, world)
    if not trainer.restore(run) and parent:
        trainer.restore(*parent, with_optimizer=not fresh_optimizer)
        trainer.save(wait=True)  # from here on, the fork does not need its parent
    console.say(trainer.banner())
    try:
        return trainer.train(), trainer.counters.step
    except ShotError:
        with suppress(ShotError):  # what is being saved is whole all the same
            trainer.saver.wait()
        raise


def _exit_code(stop: Stop, outcome: str) -> int:
    """Of a run that ended as `outcome`; another rank may have been the one that was asked to stop."""
    return (stop.exit_code or 128 + signal.SIGTERM) if outcome == "interrupted" else 0


def memory_of_rank(world: World) -> int:
    """Bytes that one rank has."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    there = machine.describe()["memory"]
    has = [size for size in (there["total_bytes"], there["limit_bytes"]) if size]
    return min(has, default=sys.maxsize) // world.place.local_size


def follow(world: World) -> int:
    """What a rank does that does not lead: waits for what the leading one begins, and works on it; the exit code."""
    with Stop() as stop:
        order = wait_for_order(world)
        if isinstance(order, int):
            return order or stop.exit_code
        path = Path(order.run)
        if not is_run(path):
            raise UsageError(
                f"rank {world.rank} does not see {path}, which the first rank writes: keep the lab on a disk that all "
                "machines of the job share"
            )
        run = FollowedRun(path, order.incarnation)
        console = Console(run.incarnation_path() / "logs" / f"rank{world.rank}.log", quiet=True)
        try:
            prepared = Prepared.of_run(run)
            recipe = sized(from_dict(tomllib.loads(order.recipe), file=str(path / "recipe.toml")), prepared.tokenizer)
            world.arrange(Layout(**order.layout))
            parent = None if order.parent is None else (RunDirectory.open(order.parent[0]), order.parent[1])
            outcome, _ = _work(recipe, run, prepared, console, stop, (), world, parent, order.fresh_optimizer)
        except BaseException as error:
            console.say("".join(traceback.format_exception(error)).rstrip())
            raise
        finally:
            console.close()
    return _exit_code(stop, outcome)


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
