"""One run as its directory tells it, whatever state the directory is in: what cannot be read becomes a warning."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calledshot.recipe import Recipe, ShotError, from_dict
from calledshot.rundir import RunDirectory, read_json

from .curves import Curves
from .figures import finite
from .history import History, number

ROUTINE = ("checkpoint", "evaluation", "probe", "upload")
"""Kinds of events that happen in every healthy run."""


@dataclass(frozen=True)
class Reference:
    """What another compressor makes of a held-out source, in bits per byte."""

    source: str
    name: str
    bits_per_byte: float
    origin: str


@dataclass
class View:
    """All that reports and tables say about one run."""

    name: str
    directory: RunDirectory
    warnings: list[str] = field(default_factory=list)
    """What was missing, torn or not understood, one sentence each."""
    state: str = "unknown"
    """What is true now, as `RunDirectory.state` says; `unknown` where status.json cannot be read."""
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    recipe_table: dict[str, Any] = field(default_factory=dict)
    """recipe.toml as parsed."""
    recipe: Recipe | None = None
    """None where this version does not understand recipe.toml."""
    environments: list[dict[str, Any]] = field(default_factory=list)
    """environment.json of each incarnation, with its number as `incarnation` and its command line as `command`."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: History = field(default_factory=History)
    curves: Curves = field(default_factory=Curves.empty)
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Rows that stand, in order."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Rows that stand, in order."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """All rows, superseded ones too: what happened did happen."""
    supervisor: list[dict[str, Any]] = field(default_factory=list)
    skips: list[dict[str, Any]] = field(default_factory=list)

    def attempt(self, file: str, read: Callable[[], Any], default: Any) -> Any:
        """What `read` gives, which must be of the type of `default`; else `default`, and a warning about `file`."""
        try:
            value = read()
        except (ShotError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = text.removeprefix(f"{self.directory.path}/{file}: ").replace(f"{self.directory.path}/", "")
            self.warnings.append(f"{file} cannot be read: {reason}.")
            return default
        if not isinstance(value, type(default)):
            self.warnings.append(f"{file} is not what this version of calledshot expects there, and is left out.")
            return default
        return value

    @property
    def tags(self) -> list[str]:
        """The user's tags."""
        tags = self.labels.get("tags")
        return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The user's notes: `time`, `text`."""
        notes = self.labels.get("notes")
        return (
            [note for note in notes if isinstance(note, dict) and note.get("text")] if isinstance(notes, list) else []
        )

    @property
    def environment(self) -> dict[str, Any]:
        """That of the last incarnation."""
        return self.environments[-1] if self.environments else {}

    @property
    def reached(self) -> dict[str, float | None]:
        """Furthest `step`, `tokens` and `flops` that any file speaks of."""
        sources = (self.curves.last, self.status, self.summary)
        return {
            key: max((value for source in sources if (value := finite(source.get(key))) is not None), default=None)
            for key in ("step", "tokens", "flops")
        }

    @property
    def sources(self) -> list[str]:
        """Names of the held-out sources, in the order in which the run speaks of them."""
        names = [str(row["source"]) for row in self.validation if "source" in row]
        return list(dict.fromkeys([*names, *_table(self.summary.get("final"))]))

    def final(self, source: str) -> tuple[dict[str, Any], str]:
        """Last held-out measurement of a source and the file and place it comes from; ({}, "") where there is none.

        An evaluation of the last step counts for more than what the run itself measured on fewer bytes.
        """
        measured = _table(_table(self.summary.get("final")).get(source))
        origin, most = f"summary.json: final.{source}", finite(measured.get("bytes_evaluated"))
        for name, summary in self.evaluations.items():
            one = _table(_table(summary.get("sources")).get(source))
            size = finite(one.get("bytes")) or 0.0
            whole = summary.get("kind") == "held-out" and finite(summary.get("step")) == self.reached["step"]
            if whole and size > (most if most is not None else math.inf if measured else 0.0):
                measured, origin, most = one, f"evals/{name}.json", size
        if measured:
            return measured, origin
        rows = [row for row in self.validation if row.get("source") == source]
        if not rows:
            return {}, ""
        return rows[-1], f"validation.jsonl: step {number(rows[-1], 'step') or 0:.0f}"

    def predicted(self, measured: Mapping[str, Any]) -> str:
        """What a held-out measurement of this run is of: `whole` documents or the `suffixes` of their pieces, which is
        all that an encoder-decoder can be asked for."""
        encodes = self.recipe is not None and self.recipe.model.topology == "encoder-decoder"
        return str(measured.get("predicted") or ("suffixes" if encodes else "whole"))

    def amount(self, measured: Mapping[str, Any]) -> float | None:
        """Bytes of text that a held-out measurement is over, in the log of a run or in an evaluation."""
        return finite(measured.get("bytes_evaluated")) or finite(measured.get("bytes"))

    @property
    def references(self) -> list[Reference]:
        """Other compressors on the held-out files: the `references` in the summaries of the run and of its evaluations,
        a table of bits per byte by source and name."""
        found: dict[tuple[str, str], Reference] = {}
        files = {"summary.json": self.summary, **{f"evals/{name}.json": one for name, one in self.evaluations.items()}}
        for file, summary in files.items():
            for source, table in _table(summary.get("references")).items():
                for name, value in _table(table).items():
                    if (bits := finite(value)) is not None and bits > 0:
                        found[source, name] = Reference(str(source), str(name), bits, f"{file}: references")
        return list(found.values())


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def open_view(run: RunDirectory | Path | str, *, curves: bool = True) -> View:
    """Reads a run directory, with `curves=False` all but the logs, for tables of runs. UsageError when it is none."""
    directory = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    view = View(name=directory.name, directory=directory)

    view.status = view.attempt("status.json", directory.status, {})
    view.state = view.attempt("status.json", directory.state, "unknown") if view.status else "unknown"
    view.labels = view.attempt("labels.json", directory.labels, {})
    view.summary = view.attempt("summary.json", lambda: directory.load("summary"), {})
    view.recipe_text = view.attempt("recipe.toml", directory.recipe_toml, "")
    view.evaluations = view.attempt("evals/", lambda: _evaluations(directory, view.warnings), {})
    _read_recipe(view)
    if not curves:
        return view
    from .metrics import Metrics, downsample  # numpy, which tables of runs do without

    view.lineage = view.attempt("lineage.json", lambda: directory.load("lineage"), {})
    view.probes = view.attempt("probes.json", lambda: directory.load("probes"), {})
    view.data = view.attempt("data.json", lambda: directory.load("data"), {})
    view.environments = view.attempt("incarnations/", lambda: _environments(directory), [])
    view.events = view.attempt("events.jsonl", lambda: directory.rows("events"), [])
    view.supervisor = view.attempt("supervisor.jsonl", lambda: directory.rows("supervisor"), [])
    view.skips = view.attempt("skips.jsonl", lambda: directory.rows("skips"), [])
    validation = view.attempt("validation.jsonl", lambda: directory.rows("validation"), [])
    samples = view.attempt("samples.jsonl", lambda: directory.rows("samples"), [])

    metrics = view.attempt("metrics.jsonl", lambda: Metrics(directory.stream("metrics")), Metrics())
    metrics.tell(view.history)
    for row in (*view.events, *validation, *samples):
        view.history.see(row)
    view.curves = downsample(metrics, view.history)
    view.validation = [row for row in validation if view.history.stands(row)]
    view.samples = [row for row in samples if view.history.stands(row)]
    _judge(view)
    return view


def _evaluations(directory: RunDirectory, warnings: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, summary in directory.evals().items():
        if isinstance(summary, dict):
            found[name] = summary
        else:
            warnings.append(f"evals/{name}.json is not what this version of calledshot expects there, and is left out.")
    return found


def _environments(directory: RunDirectory) -> list[dict[str, Any]]:
    found = []
    for which in range(1, directory.incarnation + 1):
        folder = directory.incarnation_path(which)
        with suppress(ShotError, OSError):
            environment = _table(read_json(folder / "environment.json"))
            command = folder / "command"
            text = command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
            found.append({"command": text, **environment, "incarnation": which})
    return found


def _read_recipe(view: View) -> None:
    if not view.recipe_text:
        view.warnings.append("There is no recipe in recipe.toml: the run is damaged, or another trainer's.")
        return
    try:
        view.recipe_table = tomllib.loads(view.recipe_text)
        view.recipe = from_dict(view.recipe_table, "recipe.toml")
    except tomllib.TOMLDecodeError as error:
        view.warnings.append(f"recipe.toml is not valid TOML ({error}).")
    except ShotError as error:
        view.warnings.append(f"This version of calledshot does not understand all of the recipe ({error}).")


def _judge(view: View) -> None:
    """Adds a warning for everything that a reader of the numbers should know."""
    step, total = view.reached["step"], finite(view.status.get("total_steps"))
    place = f"at step {step:,.0f}" if step is not None else "before its first step"
    if total and step is not None:
        place += f" of {total:,.0f}"
    if view.state == "running":
        view.warnings.append(f"The run is still going on; this is how it stood {place}.")
    elif view.state in ("interrupted", "failed"):
        message = str(view.status.get("message") or "").strip().rstrip(".")
        view.warnings.append(f"The run is {view.state}, {place}{f': {message}' if message else ''}.")
    elif view.state == "unknown":
        view.warnings.append("status.json is missing or cannot be read, so whether the run is over is not known.")
    if not view.curves.rows:
        view.warnings.append("There are no metrics yet: metrics.jsonl is missing or empty.")
    if view.curves.refused:
        view.warnings.append(
            f"{view.curves.refused:,} rows claim an MFU above 100 % of the highest peak probed, and are left out of it."
        )
    if view.state == "done" and not view.summary:
        view.warnings.append("summary.json is missing, so the final numbers are the last ones of the logs.")
