"""The page of an ablation: one file that needs nothing else to be read, drawn from `experiment`'s report."""

from __future__ import annotations

from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from calledshot import __version__
from calledshot.experiment import Effect, Report, Row
from calledshot.recipe import UsageError
from calledshot.rundir import atomic_write

from . import figures
from .drawing import Chart, Line

COLORS = {"better": "var(--good)", "worse": "var(--warn)", "inside the noise": "var(--quiet)"}
BASELINE = "var(--ink)"
UNJUDGED = "var(--accent)"


def write_ablation(report: Report, output: Path | str) -> None:
    """Writes the page. UsageError when `output` is a folder, RunError when it cannot be written."""
    output = Path(output)
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name a file, such as {output / 'ablation.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, render(report).encode("utf-8", "replace"))


def render(report: Report) -> str:
    """The page's text. The same report gives the same bytes."""
    suite = report.suite
    return _template().render(
        report=report,
        suite=suite,
        version=__version__,
        sizes=[_size(report, size.name) for size in suite.sizes],
        columns=[size.name for size in suite.sizes],
        transfer=[
            (arm.name, arm.note, [report.analysis.effect(arm.name, size.name) for size in suite.sizes])
            for arm in suite.arms
            if arm.name != suite.baseline
        ],
        order=report.analysis.order,
        counts=report.analysis.verdicts,
        style=Markup(page_file("report.css")),
        more_style=Markup(page_file("ablation.css")),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = (figures.count, figures.power, figures.size, figures.significant, figures.whole, figures.duration)
    environment.filters.update({write.__name__: write for write in filters})
    environment.filters.update(bits=bits, gap=gap)
    return environment.from_string(page_file("ablation.html"))


def page_file(name: str) -> str:
    """A file of the page."""
    return (files("calledshot.lab") / "page" / name).read_text(encoding="utf-8")


def _size(report: Report, size: str) -> dict[str, Any]:
    rows = [row for row in report.rows if row.size == size]
    return {
        "name": size,
        "rows": rows,
        "measures": list(dict.fromkeys(name for row in rows for name in row.measures)),
        "noise": report.analysis.noise[size],
        "floor": report.analysis.floor.get(size),
        "clock": report.clocks.get(size, ""),
        "pairs": [one for one in report.analysis.effects if one.size == size and one.against != report.suite.baseline],
        "figures": [
            (title, Markup(picture))
            for title, axis, unit in (
                ("Against FLOPs", "flops", "training FLOPs"),
                ("Against the clock", "seconds", "training seconds"),
            )
            if (picture := _chart(report, rows, size, axis, unit))
        ],
    }


def _chart(report: Report, rows: list[Row], size: str, axis: str, unit: str) -> str:
    """The later part of every arm's held-out curve, over a sample and of its first finished run, and apart from it the
    mean final loss over all of the text."""
    lines = []
    for row in rows:
        run = next((one for one in report.runs if (one.arm, one.size) == (row.arm, size) and one.counts), None)
        end = getattr(row, axis)
        if run is None or not end or row.loss is None:
            continue
        curve = () if report.suite.judge else run.curve  # what runs measure on the way is another number
        points = [(value, point.loss) for point in curve if (value := getattr(point, axis))]
        color = BASELINE if row.effect is None else COLORS.get(row.effect.verdict, UNJUDGED)
        noise = report.analysis.noise[size]
        reach = noise.sd / row.seeds**0.5 if noise else 0.0
        hint = f"{row.arm}: {bits(row.loss)} bits per byte"
        lines.append(Line(row.arm, points, (end, row.loss), color, reach, row.effect is None, hint))
    write = figures.duration if axis == "seconds" else partial(figures.power, digits=2)
    return Chart(lines, unit, "held-out bits per byte", write).svg()


def bits(value: float | None) -> str:
    """Bits per byte, four decimals: the noise of small runs is in the third."""
    return figures.MISSING if value is None else f"{value:.4f}"


def gap(effect: Effect | None) -> str:
    """A difference with its interval."""
    if effect is None or effect.difference is None:
        return figures.MISSING
    text = f"{effect.difference:+.4f}"
    return text if effect.low is None else f"{text} [{effect.low:+.4f}, {effect.high:+.4f}]"
