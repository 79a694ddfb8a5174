"""`shot profile`: where the time of a training step goes."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from calledshot.cli.train import Ranks

from .arguments import Json, Override, RecipeName, print_json, table

if TYPE_CHECKING:
    from calledshot.training.profile import Profile
    from calledshot.training.roofline import Row

WORDS = {"elementwise": "norms, rotation, activation", "head": "head's products", "host": "host (Python, calls)"}
"""Of parts that are not called in a table as they are elsewhere."""


def profile(
    recipe: RecipeName,
    /,
    *overrides: Override,
    steps: Annotated[int, Parameter(help="Updates to profile; as many are timed without the profiler.")] = 5,
    ranks: Ranks = 1,
    trace: Annotated[Path | None, Parameter(help="Keep the trace there, for perfetto.dev or chrome://tracing.")] = None,
    json: Json = False,
) -> int:
    """Where the time of a training step goes, beside what this hardware could do.

    Does some real updates of a recipe, on data prepared as for training, and keeps no run. Of several ranks it is the
    first that is shown.
    """
    from calledshot.cli.progress import bar
    from calledshot.recipe import layout, load_recipe
    from calledshot.rundir import find_lab

    resolved = load_recipe(recipe, overrides)
    if ranks != 1:
        from calledshot.cli.ranks import start

        layout(resolved, ranks)
        return start(ranks)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler's library says when it begins and ends
    from calledshot.training.profile import profile as run

    with bar() as progress:
        found = run(resolved, find_lab(), steps=steps, trace=trace, progress=progress)
    if found is None:
        return 0
    if json:
        print_json(as_json(found))
    else:
        print(show(found))
    return 0


def as_json(found: "Profile") -> dict[str, object]:
    """All that is known."""
    mfu = found.mfu
    rows = [{**asdict(one), "of_limit": one.of_limit} for one in found.rows]
    more = {"seconds": found.seconds, "plain_seconds": found.plain_seconds, "mfu_low": mfu.low, "mfu_high": mfu.high}
    return {**asdict(found), "rows": rows, **more}


def show(found: "Profile") -> str:
    """A few lines on what was measured, the table, and what to do."""
    from calledshot.recipe.units import show_count

    chosen, ranks = found.machine, 1
    for size in (found.layout[name] for name in ("replicate", "shard", "context", "tensor")):
        ranks *= size
    where = chosen["gpus"][0]["name"] if chosen["device"] == "cuda" else chosen["cpu"]["model"]
    compiled = "compiled" if chosen["compile"] else "not compiled"
    rank = f", rank 0 of {ranks}" if ranks > 1 else ""
    slower = found.seconds / found.plain_seconds - 1
    mfu = found.mfu
    used = "-".join(f"{end:.0%}" for end in (mfu.low, mfu.high) if end is not None) or f"n/a ({mfu.reason})"
    header = [
        f"{found.recipe or 'recipe'} on {where}, {chosen['threads']} threads{rank}: {chosen['dtype']}, {compiled}, "
        f"{found.tokens:,} tokens a step in passes of {chosen['micro_tokens']:,}",
        f"a step takes {found.plain_seconds * 1e3:,.1f} ms ({spread(found.plain_steps)}; "
        f"{found.tokens / found.plain_seconds:,.0f} tok/s, MFU {used}), and {found.seconds * 1e3:,.1f} ms "
        f"({spread(found.steps)}) with the profiler, {slower:+.1%}: the table is of these",
        f"probed: matmuls {rate(min(found.peaks), 'FLOP')} to {rate(max(found.peaks), 'FLOP')}, "
        f"memory {rate(found.bandwidth, 'B')}; {show_count(found.page_faults)} page faults a step",
        "",
    ]
    cells = [("", "", "ms", "share", "achieved", "could do", "of it", "gain ms")]
    cells += [cell(one) for one in found.rows]
    total = sum(one.seconds for one in found.rows)
    cells.append(("sum", "", f"{total * 1e3:,.2f}", "100.0%", "", "", "", ""))
    lines = [*header, table(cells, right=(2, 3, 4, 5, 6, 7))]
    if found.hidden_communication:
        lines.append(f"{found.hidden_communication * 1e3:,.2f} ms of communication lie behind other work")
    above = {one.unit for one in found.rows if (one.of_limit or 0) > 1}
    if "B" in above:
        lines.append("above 100% of the memory: what is read was still in caches")
    if "FLOP" in above:
        lines.append("above 100% of the matmuls: their probe was disturbed, or they are in float8")
    if found.unknown and max(found.unknown.values()) > 0.01 * found.seconds:
        named = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in list(found.unknown.items())[:3])
        lines.append(f"other: {named}")
    return "\n".join([*lines, *(["", *found.advice] if found.advice else [])])


def cell(one: "Row") -> tuple[str, ...]:
    """A row as it is printed."""
    name = WORDS.get(one.part, one.part)
    time = f"{one.seconds * 1e3:,.2f}", f"{one.share:.1%}"
    gain = "" if one.gain_seconds is None else f"{one.gain_seconds * 1e3:,.2f}"
    if one.achieved is None or one.limit is None or one.of_limit is None:
        return (name, one.direction, *time, "", "", "", gain)
    achieved, limit = rate(one.achieved, one.unit), rate(one.limit, one.unit)
    return (name, one.direction, *time, achieved, limit, f"{one.of_limit:.0%}", gain)


def rate(value: float, unit: str) -> str:
    """`0.23 TFLOP/s`, `12.1 GB/s`."""
    scale, letter = (1e12, "T") if value >= 1e11 and unit == "FLOP" else (1e9, "G")
    return f"{value / scale:.3g} {letter}{unit}/s"


def spread(steps: "tuple[float, ...]") -> str:
    """The quickest and the slowest."""
    return f"{min(steps) * 1e3:,.1f} to {max(steps) * 1e3:,.1f}"
