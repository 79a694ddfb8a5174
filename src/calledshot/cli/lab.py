"""`shot runs`, `shot diff`, `shot note`, `shot report`: what is known of the runs of this lab."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from calledshot.recipe.errors import UsageError

from .arguments import Json, print_json, table

RunName = Annotated[str, Parameter(help="A run's name in this lab, or the path of a run directory.")]
Tags = Annotated[tuple[str, ...], Parameter(negative=())]


def runs(*, all: bool = False, json: Json = False) -> None:
    """The runs of this lab, the latest first: state, progress, loss, held-out bits per byte, speed, age, tags.

    Age is the time since a run's last sign of life.

    Parameters
    ----------
    all:
        Archived runs too.
    """
    from calledshot.lab import cells, entries
    from calledshot.rundir import find_lab

    found = entries(archived=all)
    if json:
        print_json([one.to_json() for one in found])
    elif found:
        print(table(cells(found), right=(2, 3, 4, 6)))
        for one in found:
            if one.state == "unknown":
                print(f"{one.name}: {' '.join(one.warnings) or 'there is no status.json'}", file=sys.stderr)
    else:
        print(f"no runs in {find_lab() / 'runs'}; `shot train RECIPE` makes one", file=sys.stderr)


def diff(a: RunName, b: RunName, /, *, json: Json = False) -> None:
    """Two runs side by side: what differs in recipe and environment, and what came of it."""
    from calledshot.lab import compare
    from calledshot.rundir import resolve_run

    found = compare(resolve_run(a), resolve_run(b))
    if json:
        print_json(asdict(found))
        return
    parts = (("recipe", found.recipe), ("environment", found.environment), ("result", found.results))
    for title, rows in parts:
        if title != "result" and not rows:
            print(f"{title}: the same\n")
            continue
        lines = [(title, *found.names), *((row.key, *(_shown(value) for value in row.values)) for row in rows)]
        print(table(lines), end="\n\n" if title != "result" else "\n")
    for warning in [*found.warnings, *found.notes]:
        print(warning, file=sys.stderr)


def _shown(value: Any) -> str:
    from calledshot.lab.figures import written

    text = written(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def note(
    run: RunName,
    text: str = "",
    /,
    *,
    tag: Tags = (),
    untag: Tags = (),
    archive: bool | None = None,
) -> None:
    """Write a note on a run, tag it, or put it away: into its labels.json, which nothing but you ever writes.

    Parameters
    ----------
    text:
        The note.
    tag:
        A tag to add; may be given several times.
    untag:
        A tag to remove; may be given several times.
    archive:
        Leave the run out of `shot runs`; `--no-archive` brings it back.
    """
    from calledshot.rundir import resolve_run

    found = resolve_run(run)
    if not (text.strip() or tag or untag or archive is not None):
        raise UsageError("note: nothing to write; give a text, --tag, --untag or --archive")
    if any(not one.strip() for one in (*tag, *untag)):
        raise UsageError("note: a tag cannot be empty")
    if text.strip():
        found.note(text.strip())
    if tag or untag:
        found.tag(*tag, remove=untag)
    if archive is not None:
        found.archive(archive)


def report(
    *runs: RunName,
    output: Annotated[Path, Parameter(name=("--output", "-o"))] = Path("report.html"),
    price: float | None = None,
) -> None:
    """One self-contained HTML file about one or more runs, made from their directories alone.

    Parameters
    ----------
    output:
        The file to write.
    price:
        Price of one GPU for one hour, in any currency; adds the money to the table.
    """
    from calledshot.lab import write_report
    from calledshot.rundir import resolve_run

    if not runs:
        raise UsageError("report: name one or more runs; `shot runs` lists them")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UsageError(f"report: --price {price}: expected an amount, such as 2.50")
    for warning in write_report([resolve_run(name) for name in runs], output, price=price):
        print(warning, file=sys.stderr)
    print(output)
