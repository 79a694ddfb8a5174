"""Two or more runs side by side: recipes, environments, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calledshot.recipe import to_dict

from . import figures
from .evaluations import differences as document_differences
from .figures import flatten
from .tables import comparability, efficiency, unlike
from .view import View, open_view

_ALWAYS_DIFFERENT = ("command", "incarnation", "pid", "time", "available_bytes")


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs; None where a run lacks it."""

    key: str
    values: list[Any]


def differences(tables: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Keys of flat tables that are not the same in all of them, in the order in which they first appear."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [Difference(key, [table.get(key) for table in tables]) for key in keys]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def recipe_differences(views: Sequence[View]) -> list[Difference]:
    """Keys of the recipes that differ, `name` left out. Where this version understands all of them, defaults that one
    does not spell out count as written."""
    recipes = [view.recipe for view in views if view.recipe is not None]
    tables = [to_dict(recipe) for recipe in recipes]
    if len(tables) < len(views):
        tables = [view.recipe_table for view in views]
    return [row for row in differences([flatten(table) for table in tables]) if row.key != "name"]


def environment_differences(views: Sequence[View]) -> list[Difference]:
    """What differs between the machines, the software and the commits that the runs last ran on."""
    rows = differences([flatten(view.environment) for view in views])
    return [row for row in rows if row.key.rsplit(".", 1)[-1] not in _ALWAYS_DIFFERENT]


@dataclass(frozen=True)
class Comparison:
    """What `shot diff` says."""

    names: list[str]
    recipe: list[Difference]
    environment: list[Difference]
    results: list[Difference]
    """Every measured number of either run, equal ones too, as it is printed."""
    notes: list[str]
    """What to know before comparing."""
    warnings: list[str]


def compare(a: Any, b: Any) -> Comparison:
    """Two runs (run directories or paths) side by side. UsageError where one is no run."""
    views = [open_view(a), open_view(b)]
    rows = [
        Difference(line.label, [cell.text for cell in line.cells])
        for line in efficiency(views)
        if any(cell.text != figures.MISSING for cell in line.cells)
    ]
    notes = []
    for source in dict.fromkeys(source for view in views for source in view.sources):
        measured = [view.final(source)[0] for view in views]
        marks = [
            " (suffixes)" if view.predicted(row) == "suffixes" else ""
            for view, row in zip(views, measured, strict=True)
        ]
        for key, label in (("bits_per_byte", "bits per byte"), ("loss", "loss")):
            texts = [figures.nats(row.get(key)) for row in measured]
            marked = [text if text == figures.MISSING else text + mark for text, mark in zip(texts, marks, strict=True)]
            rows.append(Difference(f"Held-out {label}, {source}", marked))
        if asked := unlike(views, source):
            notes.append(f"{source}: {asked}")
    return Comparison(
        names=[view.name for view in views],
        recipe=recipe_differences(views),
        environment=environment_differences(views),
        results=rows,
        notes=[*comparability(views), *notes, *document_differences(views)],
        warnings=[f"{view.name}: {warning}" for view in views for warning in view.warnings],
    )
