"""The tables of a report: results beside reference compressors, and what the runs cost, each number with its origin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calledshot.recipe import ShotError, cost

from . import figures
from .evaluations import interval
from .figures import MISSING, finite
from .view import View


@dataclass(frozen=True)
class Figure:
    """A number as it is printed, and where it comes from."""

    text: str = MISSING
    source: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table with a column a run."""

    label: str
    cells: list[Figure]
    hint: str = ""
    """What the label means, in a few words."""

    @property
    def origins(self) -> list[str]:
        """Where the cells come from, each place once."""
        return list(dict.fromkeys(cell.source for cell in self.cells if cell.source))


@dataclass(frozen=True)
class Bar:
    """One bar of the comparison by source: a run, or another compressor."""

    label: str
    bits_per_byte: float
    loss: float | None
    run: int | None
    """Place of the run in the report; None for another compressor."""
    detail: str
    share: float
    """Length, as a share of the longest bar."""


@dataclass(frozen=True)
class Result:
    """All that was measured on one held-out source, best first."""

    source: str
    bars: list[Bar]
    notes: list[str]


def results(views: Sequence[View]) -> list[Result]:
    """Held-out results by source, beside the reference compressors that the runs know of."""
    found = []
    for source in dict.fromkeys(source for view in views for source in view.sources):
        entries: list[tuple[str, float, float | None, int | None, str]] = []
        notes: list[str] = []
        per_token = set()
        for place, view in enumerate(views):
            row, origin = view.final(source)
            bits = finite(row.get("bits_per_byte"))
            if bits is None or bits <= 0:
                notes.append(f"{view.name}: {MISSING} bits per byte for this source.")
                continue
            detail = " · ".join(part for part in (interval(view, source, bits), origin) if part)
            entries.append((view.name, bits, finite(row.get("loss")), place, detail))
            if (density := finite(row.get("bytes_per_token"))) is not None:
                per_token.add(figures.significant(density))
            if (evaluated := finite(row.get("bytes_evaluated"))) is not None and origin.startswith("validation"):
                notes.append(f"{view.name}: from the first {figures.size(evaluated)} of the held-out text only.")
        if asked := unlike(views, source):
            notes.append(asked)
        elif len(per_token) == 1:
            notes.append(f"{per_token.pop()} bytes per token.")
        elif per_token:
            notes.append("The runs cut this text into tokens differently: compare bits per byte, not loss.")
        references = {one.name: one for view in views for one in view.references if one.source == source}
        entries += [(one.name, one.bits_per_byte, None, None, one.origin) for one in references.values()]
        if not entries:
            found.append(Result(source, [], notes))
            continue
        entries.sort(key=lambda entry: (entry[1], entry[3] is None))
        longest = max(bits for _, bits, *_ in entries)
        bars = [Bar(label, bits, loss, run, detail, bits / longest) for label, bits, loss, run, detail in entries]
        found.append(Result(source, bars, notes))
    return found


def unlike(views: Sequence[View], source: str) -> str:
    """What to know of the runs' numbers for a source where some are of suffixes, or of more text than others; empty
    where all are of the same whole documents."""
    kinds, contexts, amounts = set(), set(), set()
    for view in views:
        row, _ = view.final(source)
        if finite(row.get("bits_per_byte")) is None:
            continue
        kinds.add(view.predicted(row))
        amounts.add(view.amount(row))
        if view.recipe is not None:
            model = view.recipe.model
            contexts.add(min(model.context, model.encoder_context or model.context))
    if "suffixes" not in kinds:
        return other_text(amounts)
    if len(kinds) > 1:
        return (
            "Some runs predict whole documents and others, with an encoder, their suffixes: these numbers do not "
            "compare; `shot eval --predict suffixes` asks all for the same."
        )
    text = "Of each piece the part after a prefix: not comparable with whole documents."
    if len(contexts) > 1:
        text += (
            f" The runs' pieces are not equally long (contexts of {' and '.join(f'{n:,}' for n in sorted(contexts))}), "
            "so these suffixes are not the same text and do not compare with each other either."
        )
    return text


def other_text(amounts: set[float | None]) -> str:
    """What to know of numbers over these bytes of one source; empty where it may be the same text."""
    known = sorted(amounts - {None})  # ty: ignore
    if len(known) < 2:
        return ""
    return (
        f"The runs were not measured on the same text ({figures.size(known[0])} to {figures.size(known[-1])} of it): "
        "these numbers do not compare; `shot eval RUN RUN` measures all on all of it."
    )


def devices(view: View) -> tuple[int | None, str]:
    """GPUs that the last incarnation ran on, and what they are called; None where environment.json does not say."""
    environment = view.environment
    gpus = environment.get("gpus")
    if isinstance(gpus, list):
        names = [str(gpu.get("name", "GPU")) if isinstance(gpu, dict) else str(gpu) for gpu in gpus]
        ranks = int(finite(environment.get("world_size")) or 0)
        return (max(ranks, 1) if names else 0), names[0] if names else ""
    return None, ""


def headline(view: View) -> str:
    """One line: what was trained, on how much, for how long, and how well it did."""
    parts = []
    total = _parameters(view, "total").text
    if total != MISSING:
        parts.append(f"{total} parameters")
    tokens = view.reached["tokens"]
    if tokens:
        parts.append(f"{figures.count(tokens)} tokens")
    if view.history.seconds:
        number, name = devices(view)
        on = f" on {number} × {name}" if number else " on CPU" if number == 0 else ""
        parts.append(f"{figures.duration(view.history.seconds)}{on}")
    for source in view.sources[:1]:
        row, _ = view.final(source)
        if (bits := finite(row.get("bits_per_byte"))) is not None:
            of = "suffixes of " if view.predicted(row) == "suffixes" else ""
            parts.append(f"{figures.nats(bits)} bits per byte on {of}held-out {source}")
    return " · ".join(parts) or "nothing measured yet"


def _parameters(view: View, kind: str) -> Figure:
    measured = view.summary.get("parameters")
    if isinstance(measured, dict) and finite(measured.get(kind)) is not None:
        return Figure(figures.count(measured[kind]), f"summary.json: parameters.{kind}")
    if view.recipe is not None:
        try:
            counted = getattr(cost(view.recipe).parameters, kind)
        except (ShotError, ValueError, ArithmeticError):
            return Figure()
        return Figure(figures.count(counted), "recipe.toml, by arithmetic")
    return Figure()


def _flops(view: View) -> Figure:
    reached = view.reached["flops"]
    if not reached:
        return Figure()
    file = "metrics.jsonl" if "flops" in view.curves.last else "summary.json"
    return Figure(figures.power(reached), f"{file}: flops")


def _flops_per_token(view: View) -> Figure:
    flops, tokens = view.reached["flops"], view.reached["tokens"]
    if flops and tokens:
        return Figure(figures.power(flops / tokens), "flops / tokens")
    return Figure()


def _utilization(view: View) -> Figure:
    low, high = view.curves.median.get("mfu_low"), view.curves.median.get("mfu_high")
    if low is None and view.curves.refused:
        return Figure(figures.utilization(2, 2), "metrics.jsonl: mfu_low")
    return Figure(figures.utilization(low, high), "metrics.jsonl: medians of mfu_low, mfu_high") if low else Figure()


def _memory(view: View) -> Figure:
    peak, seen = finite(view.summary.get("peak_memory_bytes")), view.curves.peak.get("memory_bytes")
    if peak is not None and peak >= (seen or 0):
        return Figure(figures.size(peak), "summary.json: peak_memory_bytes")
    return Figure(figures.size(seen), "metrics.jsonl: largest memory_bytes") if seen else Figure()


def _packing(view: View) -> Figure:
    share = finite(view.summary.get("packing_loss"))
    if share is None:
        return Figure()
    return Figure(f"{100 * share:.1f} %", "summary.json: packing_loss")


def _goodput(view: View) -> Figure:
    share = finite(view.summary.get("goodput"))
    if share is None:
        return Figure()
    if not 0 <= share <= 1:
        return Figure(f"{MISSING} (refused: not between 0 and 100 %)", "summary.json: goodput")
    return Figure(figures.percent(share), "summary.json: goodput")


def _energy(view: View) -> Figure:
    joules = finite(view.summary.get("energy_joules"))
    if joules is None or joules <= 0:
        return Figure()
    return Figure(f"{figures.significant(joules / 3.6e6)} kWh", "summary.json: energy_joules (NVML)")


def _restarts(view: View) -> Figure:
    starts = max(len(view.history.first_time), len(view.environments))
    return Figure(figures.whole(starts - 1), "incarnations/, metrics.jsonl") if starts else Figure()


def _repeated(view: View) -> Figure:
    return Figure(figures.whole(view.history.lost), "metrics.jsonl: incarnation") if view.history.rows else Figure()


def _money(price: float) -> Callable[[View], Figure]:
    def figure(view: View) -> Figure:
        seconds, number = view.history.seconds, devices(view)[0]
        if seconds is None or not number:
            return Figure(MISSING, "no GPU in environment.json" if number == 0 else "")
        return Figure(
            figures.money(seconds / 3600 * number * price), f"{number} GPU × hours up × {figures.significant(price)}"
        )

    return figure


def efficiency(views: Sequence[View], price: float | None = None) -> list[Line]:
    """What the runs are and what they cost; `price` is that of one GPU for one hour, in any currency."""

    def line(label: str, figure: Callable[[View], Figure], hint: str = "") -> Line:
        return Line(label, [figure(view) for view in views], hint)

    def logged(key: str, write: Callable[[object], str], origin: str) -> Callable[[View], Figure]:
        return lambda view: Figure(write(view.reached[key]), origin) if view.reached[key] else Figure()

    def speed(view: View) -> Figure:
        median = view.curves.median.get("tokens_per_second")
        if median is None:
            return Figure()
        return Figure(figures.significant(median), "metrics.jsonl: median of tokens_per_second")

    def hours(view: View) -> Figure:
        seconds = view.history.seconds
        return Figure(figures.duration(seconds), "metrics.jsonl, events.jsonl: time") if seconds else Figure()

    lines = [
        line("Parameters", lambda view: _parameters(view, "total"), "all of them"),
        line("… non-embedding", lambda view: _parameters(view, "non_embedding"), "without embedding and head"),
        line("… active", lambda view: _parameters(view, "active"), "used for one token"),
        line("Training tokens", logged("tokens", figures.count, "metrics.jsonl: tokens")),
        line("Packing loss", _packing, "share of these that are padding"),
        line("FLOPs a token", _flops_per_token, "forward and backward"),
        line("FLOPs", _flops, "of the whole run, from the model's structure"),
        line("Time up", hours, "gaps between restarts left out, lost work counted"),
        line("Tokens a second", speed, "while training"),
        line("MFU", _utilization, "against the highest and the lowest matmul peak probed"),
        line("Goodput", _goodput, "share of the time that moved training forward"),
        line("Peak memory", _memory),
        line("Energy", _energy, "where NVML gives it"),
        line("Restarts", _restarts),
        line("Steps done twice", _repeated, "lost in restarts"),
    ]
    if price is not None:
        lines.append(line("Money", _money(price), f"at {figures.significant(price)} a GPU hour"))
    return lines


def comparability(views: Sequence[View]) -> list[str]:
    """What a reader must know before comparing the runs' results."""
    if len(views) < 2:
        return []
    notes = []
    for key, what in (("flops", "FLOPs"), ("tokens", "tokens")):
        spent = [value for view in views if (value := view.reached[key])]
        if len(spent) == len(views) and max(spent) > 1.02 * min(spent):
            write = figures.power if key == "flops" else figures.count
            notes.append(
                f"The runs did not spend the same {what} ({write(min(spent))} to {write(max(spent))}): "
                "their final losses answer different questions; compare the curves at equal budgets."
            )
            break
    if len({_held_out(view) for view in views} - {None}) > 1:
        notes.append("The runs were not trained and measured on the same prepared data (data.json differs).")
    if len({view.state for view in views}) > 1:
        notes.append("The runs are not in the same state: an unfinished run's last loss is not a result.")
    seeds = {str(view.recipe_table.get("seed", 0)) for view in views}
    notes.append(
        "One run a recipe says nothing about the spread between seeds: a small difference here may be noise."
        if len(seeds) == 1
        else "The runs have different seeds: a small difference between them may be noise."
    )
    return notes


def _held_out(view: View) -> str | None:
    data: Any = view.data
    return repr(sorted(data.items())) if data else None
