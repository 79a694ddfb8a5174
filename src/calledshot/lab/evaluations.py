"""Evaluations of whole held-out documents, as evals/ keeps them: tables, intervals, differences with their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import figures
from .figures import finite, flatten
from .view import View

COLUMNS = ("documents", "tokens", "bytes a token", "loss", "perplexity", "bits per byte", "95 %")


@dataclass(frozen=True)
class Table:
    """One evaluation, as it is printed."""

    name: str
    fields: list[tuple[str, str]]
    """What its summary says besides measures by source."""
    rows: list[tuple[str, ...]]
    """Source or language, then `COLUMNS`."""


def tables(view: View) -> list[Table]:
    """The evaluations of a run, by name."""
    found = []
    for name, summary in view.evaluations.items():
        rest = {key: value for key, value in summary.items() if key not in ("sources", "references")}
        fields = []
        for key, value in list(flatten(rest).items())[:60]:
            known = finite(value)
            text = figures.written(value) if known is None or isinstance(value, int) else figures.significant(known, 4)
            fields.append((key, figures.date(value) if key == "time" else text[:500]))
        rows = []
        for source, measure in _tables(summary.get("sources")).items():
            rows.append((source, *_measure(measure)))
            rows += [(f"… {name}", *_measure(one)) for name, one in _tables(measure.get("languages")).items()]
        found.append(Table(name, fields, rows))
    return found


def _tables(value: object) -> dict[str, dict[str, Any]]:
    """The tables in a table; {} for anything else."""
    return {str(key): one for key, one in value.items() if isinstance(one, dict)} if isinstance(value, Mapping) else {}


def _measure(measure: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = (figures.nats(measure.get(f"bits_per_byte_{end}")) for end in ("low", "high"))
    interval = "" if figures.MISSING in (low, high) else f"{low} to {high}"
    return (
        figures.whole(measure.get("documents")),
        figures.count(measure.get("tokens")),
        figures.significant(measure.get("bytes_per_token")),
        figures.nats(measure.get("loss")),
        figures.significant(measure.get("perplexity")),
        figures.nats(measure.get("bits_per_byte")),
        ", ".join(filter(None, (interval, _few(measure)))) or figures.MISSING,
    )


def _few(measure: Mapping[str, Any]) -> str:
    """A warning about how few documents an interval is over; empty where there are enough, or it is not said."""
    from calledshot.stats import FEW

    documents = finite(measure.get("documents"))
    return "few documents" if documents is not None and documents < FEW else ""


def interval(view: View, source: str, bits_per_byte: float) -> str:
    """The interval over documents of a held-out result, from an evaluation that agrees with it; empty without one."""
    for summary in view.evaluations.values():
        measure = _tables(summary.get("sources")).get(source, {})
        value, low, high = (finite(measure.get(f"bits_per_byte{end}")) for end in ("", "_low", "_high"))
        if value is None or low is None or high is None or summary.get("kind") != "held-out":
            continue
        if finite(summary.get("step")) == view.reached["step"] and math.isclose(value, bits_per_byte, rel_tol=1e-3):
            over = f"few documents ({figures.whole(measure['documents'])})" if _few(measure) else "documents"
            return f"95 % {figures.nats(low)} to {figures.nats(high)} over {over}"
    return ""


def differences(views: Sequence[View]) -> list[str]:
    """Bits per byte of each later run less the first's, paired by document, where both evaluations are there."""
    if len(views) < 2:
        return []
    from calledshot.stats import format_interval, paired_comparison

    first, sentences = _documents(views[0]), []
    for view in views[1:]:
        for source, documents in _documents(view).items():
            other = first.get(source, {})
            # The same texts, whatever tokens they were cut into.
            if len(documents) < 2 or {name: size for name, (_, size) in documents.items()} != {
                name: size for name, (_, size) in other.items()
            }:
                continue
            sizes = [size for _, size in documents.values()]
            bits = [nats / math.log(2) / size for nats, size in documents.values()]
            others = [other[name][0] / math.log(2) / size for name, (_, size) in documents.items()]
            if bits == others:
                sentences.append(
                    f"{view.name} and {views[0].name} are the same on every held-out document of {source}."
                )
                continue
            found = paired_comparison(bits, others, weights=sizes)
            low, high = found.difference.low, found.difference.high
            noise = low <= 0 <= high or found.p_value > 0.05
            sentences.append(
                f"{view.name} less {views[0].name} on held-out {source}: "
                f"{format_interval(found.difference)} bits per byte over {len(sizes):,} documents, "
                f"p = {found.p_value:.1g}"
                f"{': the choice of documents alone could explain it' if noise else ''}."
            )
    return sentences


def _documents(view: View) -> dict[str, dict[str, tuple[float, float]]]:
    """Nats and bytes by source and document, from the held-out evaluation of the run's last step."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, summary in view.evaluations.items():
        if summary.get("kind") != "held-out" or finite(summary.get("step")) != view.reached["step"]:
            continue
        for row in view.attempt(f"evals/{name}.jsonl", lambda name=name: view.directory.eval_rows(name), []):
            nats, size = finite(row.get("nats")), finite(row.get("bytes"))
            if nats is not None and size:
                found.setdefault(str(row.get("source")), {})[str(row.get("document"))] = (nats, size)
    return found
