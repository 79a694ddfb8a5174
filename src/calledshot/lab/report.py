"""`report.html`: one file, made from run directories alone, that needs nothing else to be read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from calledshot import __version__
from calledshot.recipe import UsageError
from calledshot.rundir import RunDirectory, atomic_write

from . import evaluations, figures
from .comparison import recipe_differences
from .curves import SERIES
from .figures import finite, flatten
from .history import incarnation, number
from .tables import comparability, efficiency, headline, results
from .timeline import Timeline, timeline
from .view import View, open_view

CHARTS = (
    ("loss", "Loss", "nats per token"),
    ("bits_per_byte", "Held-out bits per byte", "lower is better"),
    ("lr", "Learning rate", "of the schedule"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("update_norm", "Update norm", "of one step"),
    ("tokens_per_second", "Tokens a second", "while training"),
    ("mfu", "MFU", "% of the highest to the lowest peak probed"),
)
"""Identifier, title and unit of each chart; one that no run has data for is left out."""
AXES = ("tokens", "flops", "hours", "step")
_SHOWN_SAMPLES = 6
_LONGEST_SAMPLE = 4000
_MOST_MEASUREMENTS = 400


def write_report(
    runs: Sequence[RunDirectory | Path | str], output: Path | str, *, price: float | None = None
) -> list[str]:
    """Writes the report of `runs` to `output` and returns the warnings it holds.

    `price` is that of a GPU hour. A run named twice is shown once. Raises: UsageError when one of `runs` is no run
    directory or `output` is a folder, RunError when `output` cannot be written.
    """
    if Path(output).is_dir():
        raise UsageError(f"{output}: is a folder; name a file, such as {Path(output) / 'report.html'}")
    directories = [run if isinstance(run, RunDirectory) else RunDirectory.open(run) for run in runs]
    views = [open_view(run) for run in {run.path.resolve(): run for run in directories}.values()]
    for place, view in enumerate(views):
        if view.name in (other.name for other in views[:place]):
            view.name = f"{view.name} ({place + 1})"
    # Samples may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    atomic_write(output, render(views, price=price).encode("utf-8", "replace"))
    return [f"{view.name}: {warning}" for view in views for warning in view.warnings]


def render(views: Sequence[View], *, price: float | None = None) -> str:
    """The page. The same run directories give the same bytes."""
    lines = [timeline(view) for view in views]
    chart_data = _chart_data(views, lines)
    script = _page_file("report.js")
    return _template().render(
        title=_title(views),
        version=__version__,
        views=views,
        headlines=[headline(view) for view in views],
        results=results(views),
        notes=[*comparability(views), *evaluations.differences(views)],
        charts=[chart for chart in CHARTS if _has_data(chart[0], chart_data["runs"])],
        chart_data=chart_data,
        efficiency=efficiency(views, price),
        samples=[_samples(view) for view in views],
        evaluations=[evaluations.tables(view) for view in views],
        evaluation_columns=evaluations.COLUMNS,
        timelines=lines,
        recipe_differences=recipe_differences(views) if len(views) > 1 else [],
        facts=[_facts(view) for view in views],
        style=Markup(_page_file("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _page_file(name: str) -> str:
    return (files("calledshot.lab") / "page" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = (figures.nats, figures.whole, figures.count, figures.date, figures.duration)
    environment.filters.update({write.__name__: write for write in filters}, value=figures.written)
    return environment.from_string(_page_file("report.html"))


def _title(views: Sequence[View]) -> str:
    names = [view.name for view in views]
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more runs"


def _compact(value: float | None) -> float | int | None:
    """A number for the page's data: six significant digits, integers without a point."""
    if value is None:
        return None
    short = finite(float(f"{value:.6g}"))
    if short is None:
        return None
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _chart_data(views: Sequence[View], timelines: Sequence[Timeline]) -> dict[str, Any]:
    """What the page's script draws; see report.js."""
    runs = []
    for view, line in zip(views, timelines, strict=True):
        curves = view.curves
        axes = {axis: [_compact(value) for value in getattr(curves, axis)] for axis in AXES}
        series = {}
        for name in SERIES:
            mean, low, high = curves.mean[name], curves.low[name], curves.high[name]
            if any(value is not None for value in mean):
                series[name] = {"mean": [_compact(value) for value in mean]}
                if low != high:
                    series[name] |= {"low": [_compact(v) for v in low], "high": [_compact(v) for v in high]}
        runs.append(
            {
                "name": view.name,
                "x": axes,
                "series": series,
                "held_out": [_held_out(view, source) for source in view.sources],
                "marks": [
                    {
                        "x": {
                            "tokens": _compact(incident.tokens), "flops": _compact(incident.flops),
                            "hours": _compact(incident.hours), "step": _compact(incident.step),
                        },
                        "text": f"{incident.kind}: {incident.text}" if incident.text else incident.kind,
                    }
                    for incident in line.incidents[:60]
                ],
            }
        )  # fmt: skip
    references = {(one.source, one.name): one for view in views for one in view.references}
    axes_known = [axis for axis in AXES if any(value is not None for run in runs for value in run["x"][axis])]
    return {
        "runs": runs,
        "references": [
            {"source": one.source, "name": one.name, "value": _compact(one.bits_per_byte)}
            for one in references.values()
        ],
        "axes": axes_known or ["step"],
    }


def _held_out(view: View, source: str) -> dict[str, Any]:
    rows = [row for row in view.validation if row.get("source") == source]
    stride = -(-len(rows) // _MOST_MEASUREMENTS) or 1
    rows = rows[::-1][::stride][::-1]  # from the end, so that the last measurement stays
    steps = [number(row, "step") for row in rows]
    tokens = [number(row, "tokens") or view.curves.at("tokens", step) for row, step in zip(rows, steps, strict=True)]
    return {
        "source": source,
        "x": {
            "tokens": [_compact(value) for value in tokens],
            "flops": [_compact(view.curves.at("flops", step)) for step in steps],
            "hours": [_compact(view.history.hours(row)) for row in rows],
            "step": [_compact(step) for step in steps],
        },
        "loss": [_compact(number(row, "loss")) for row in rows],
        "bits_per_byte": [_compact(number(row, "bits_per_byte")) for row in rows],
    }


def _has_data(chart: str, runs: Sequence[Mapping[str, Any]]) -> bool:
    if chart == "mfu":
        return any("mfu_low" in run["series"] for run in runs)
    if chart in ("loss", "bits_per_byte"):
        measured = any(value is not None for run in runs for held_out in run["held_out"] for value in held_out[chart])
        return measured or (chart == "loss" and any("loss" in run["series"] for run in runs))
    return any(chart in run["series"] for run in runs)


def _samples(view: View) -> list[dict[str, Any]]:
    """By prompt: a handful of completions from the first to the last, early ones closer together."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in view.samples:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    found = []
    for prompt, rows in prompts.items():
        last = len(rows) - 1
        picks = {round((last + 1) ** (k / (_SHOWN_SAMPLES - 1))) - 1 for k in range(_SHOWN_SAMPLES)} | {last}
        shown = []
        for place in sorted(picks):
            row, text = rows[place], str(rows[place].get("text", ""))
            shown.append(
                {
                    "step": number(row, "step"),
                    "tokens": number(row, "tokens") or view.curves.at("tokens", number(row, "step")),
                    "text": text[:_LONGEST_SAMPLE],
                    "cut": len(text) > _LONGEST_SAMPLE,
                }
            )
        found.append({"prompt": prompt, "shown": shown, "count": len(rows)})
    return found


def _facts(view: View) -> dict[str, Any]:
    """Lineage, machines and probes of a run, flat."""
    return {
        "lineage": list(flatten(view.lineage).items()) if view.lineage else [],
        "probes": list(flatten(view.probes).items())[:80] if view.probes else [],
        "environments": [
            (incarnation(environment), environment.get("command", ""), _environment(environment))
            for environment in view.environments[-5:]
        ],
        "earlier": max(0, len(view.environments) - 5),
    }


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat = flatten({key: value for key, value in environment.items() if key not in ("command", "incarnation")})
    return list(flat.items())[:80]
