"""`shot checkpoint`: what a run has saved, whether it is whole, what goes, and one model made of several."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from calledshot.recipe.errors import UsageError

from .arguments import Json, Override, print_json, table

if TYPE_CHECKING:
    from calledshot.rundir import Keep, RunDirectory

app = App(name="checkpoint", help="List, verify, delete and merge a run's checkpoints.")

RunName = Annotated[str, Parameter(help="A run's name in this lab, or the path of a run directory.")]
Checkpoint = Annotated[str, Parameter(help="Name or folder of the run, or RUN@STEP.")]


@app.command(name="list")
def list_(run: RunName, /, *, json: Json = False) -> None:
    """The checkpoints of a run: step, size, when they were written and verified, held-out loss, and why they stay."""
    from calledshot.recipe.units import show_bytes
    from calledshot.rundir import resolve_run

    directory = resolve_run(run)
    rows = directory.checkpoints(rule(directory))
    if json:
        print_json(rows)
        return
    if not rows:
        print(f"{directory.path}: has no checkpoints", file=sys.stderr)
        return
    lines = [("step", "size", "files", "written", "bits per byte", "verified", "kept")]
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        size = "" if row["bytes"] is None else show_bytes(row["bytes"])
        verified = "damaged" if row["fault"] else moment(row["verified"]) or "no"
        kept = row["kept"] or ("" if row["fault"] else "goes with the next save")
        step = f"{row['step']:,}{' (latest)' if row['latest'] else ''}"
        lines.append((step, size, str(row["files"] or ""), moment(row["time"]), bits, verified, kept))
    print(table(lines, right=(1, 2, 4)))
    for row in rows:
        if row["fault"]:
            print(row["fault"], file=sys.stderr)


@app.command
def verify(run: Checkpoint, /, *, json: Json = False) -> int:
    """Compare every file of a run's checkpoints, or of one, with its hash. Exit code 1 when one is damaged."""
    directory, steps = chosen(run)
    if not steps:
        print(f"{directory.path}: has no checkpoints", file=sys.stderr)
    faults = {step: directory.check(step) for step in steps}
    if json:
        print_json([{"step": step, "fault": fault} for step, fault in faults.items()])
    else:
        for step, fault in faults.items():
            print(f"step {step:,}  {fault or 'whole'}")
    return 1 if any(faults.values()) else 0


@app.command
def prune(
    run: RunName,
    /,
    *overrides: Override,
    dry_run: Annotated[bool, Parameter(help="Say what would go, and delete nothing.", negative=())] = False,
    json: Json = False,
) -> None:
    """Delete the checkpoints that the recipe's rule does not keep; `checkpoint.keep=1` and the like give another rule.

    Whatever the rule, the newest whole checkpoint stays, and those that an export or another run came from.
    """
    from calledshot.recipe.units import show_bytes
    from calledshot.rundir import held_out_by_step, resolve_run, uses

    directory = resolve_run(run)
    by = rule(directory, overrides)
    with directory.lock():
        rows = {row["step"]: row for row in directory.checkpoints(by)}
        doomed = [step for step, row in rows.items() if not row["kept"] and not row["fault"]]
        if not any(row["kept"] for row in rows.values()):  # not one is whole
            doomed = []
        if not dry_run:
            held_out = held_out_by_step(directory.rows("validation"))
            doomed = directory.prune(by, held_out, uses(directory.path))
    size = sum(rows[step]["bytes"] for step in doomed)
    if json:
        print_json({"deleted": [] if dry_run else doomed, "would_delete": doomed if dry_run else [], "bytes": size})
        return
    what = "would be deleted" if dry_run else "deleted"
    print(f"{', '.join(f'{step:,}' for step in doomed) or 'nothing'} {what} ({show_bytes(size)})")


@app.command
def consolidate(run: Checkpoint, /) -> None:
    """Turn a checkpoint that several ranks wrote (the newest) into one of single files, in its place."""
    from calledshot.rundir import find_lab, resolve_checkpoint

    directory, step = resolve_checkpoint(run, find_lab())
    from calledshot.training import convert

    with directory.lock():
        step, files = convert.consolidate(directory, step)
    done = f"{files} files became one each" if files > 1 else "is of single files already"
    print(f"{directory.name}@{step}: {done}")


@app.command
def average(
    run: RunName,
    /,
    *,
    last: Annotated[int, Parameter(help="So many of the newest.")] = 0,
    steps: Annotated[str, Parameter(help="Or those of these steps: 1000,2000,3000.")] = "",
    name: Annotated[str, Parameter(help="What the new run is to be called.")],
) -> None:
    """Make a run whose weights are the mean of several checkpoints' (in float64). Its optimizer begins anew."""
    from calledshot.rundir import find_lab, resolve_run

    if bool(last) == bool(steps):
        raise UsageError("average: say which checkpoints, by --last N or by --steps A,B,C")
    lab = find_lab()
    directory = resolve_run(run, lab)
    known = directory.complete_checkpoints()
    if steps:
        parts = [part.strip() for part in steps.split(",")]
        if wrong := [part for part in parts if not part.isdecimal() or int(part) not in known]:
            listed = ", ".join(map(str, known)) or "none"
            raise UsageError(
                f"--steps {steps}: {directory.name} has no checkpoint of step {wrong[0]}; it has: {listed}"
            )
        taken = sorted({int(part) for part in parts})
    else:
        latest = directory.latest() or 0
        taken = [step for step in known if step <= latest][-max(last, 0) :]
        if len(taken) != last:
            raise UsageError(f"--last {last}: {directory.name} has {len(taken)} checkpoints")
    from calledshot.training import convert

    from .convert import tell

    tell(convert.average(directory, taken, lab, name))


def chosen(reference: str) -> tuple[RunDirectory, list[int]]:
    """A run and its checkpoints, whole or not; of `RUN@STEP` that one."""
    from calledshot.rundir import resolve_run

    name, _, step = reference.rpartition("@")
    if not name or not step.isdecimal():
        directory = resolve_run(reference)
        return directory, directory.checkpoint_steps()
    directory = resolve_run(name)
    if int(step) not in directory.checkpoint_steps():
        known = ", ".join(map(str, directory.checkpoint_steps())) or "none"
        raise UsageError(f"{reference}: has no checkpoint of step {step}; there are: {known}")
    return directory, [int(step)]


def rule(directory: RunDirectory, overrides: tuple[str, ...] = ()) -> Keep:
    """By which a run's checkpoints stay; what runs of other trainers have not said is the default."""
    from calledshot.recipe import Recipe, load_recipe
    from calledshot.rundir import Keep

    file = directory.path / "recipe.toml"
    recipe = load_recipe(str(file), overrides, checked=False) if file.is_file() else Recipe()
    return Keep.of(recipe.checkpoint)


def moment(time: str | None) -> str:
    """A time as tables show it: 2026-01-31 12:00."""
    return (time or "")[:16].replace("T", " ")
