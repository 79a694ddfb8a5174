"""The lab around the runs: where it is, which runs it has, which run a person means."""

from __future__ import annotations

import difflib
from pathlib import Path

from calledshot.recipe.errors import UsageError
from calledshot.rundir.run import RunDirectory, is_run


def find_lab(start: Path | str | None = None) -> Path:
    """The nearest folder, from `start` (the current folder) upwards, that holds `lab.toml`; else `start` itself."""
    start = Path(start) if start is not None else Path.cwd()
    start = start.absolute()
    return next((folder for folder in (start, *start.parents) if (folder / "lab.toml").is_file()), start)


def runs(lab: Path) -> list[RunDirectory]:
    """The runs under `lab/runs/`, by name."""
    folder = lab / "runs"
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if not path.name.startswith(".") and is_run(path))
    return [RunDirectory(path) for path in sorted(found)]


def resolve_run(reference: str, lab: Path | None = None) -> RunDirectory:
    """The run that a person names: by its name under `runs/`, or by a path. UsageError suggests the nearest name."""
    lab = find_lab() if lab is None else lab
    for path in (lab / "runs" / reference, Path(reference)):
        if reference and is_run(path):
            return RunDirectory(path)
    if reference and Path(reference).exists():
        return RunDirectory.open(reference)
    names = [run.name for run in runs(lab)]
    nearest = difflib.get_close_matches(reference, names, n=1, cutoff=0.5)
    if nearest:
        raise UsageError(f"there is no run {reference!r} in {lab / 'runs'}; did you mean {nearest[0]!r}?")
    raise UsageError(f"there is no run {reference!r} in {lab / 'runs'}; `shot runs` lists those that are")


def resolve_checkpoint(reference: str, lab: Path | None = None) -> tuple[RunDirectory, int | None]:
    """`RUN` or `RUN@STEP`: the run, and the step or None (its latest checkpoint). UsageError for neither."""
    name, _, step = reference.rpartition("@")
    if not step.isdecimal() or not name:
        return resolve_run(reference, lab), None
    run = resolve_run(name, lab)
    if int(step) not in run.complete_checkpoints():
        known = ", ".join(map(str, run.complete_checkpoints())) or "none"
        raise UsageError(f"{reference}: has no complete checkpoint of step {step}; there are: {known}")
    return run, int(step)
