"""A report and a plan as Markdown, for terminals and for `docs/`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from calledshot.recipe.units import show_bytes, show_count, show_hours

from .analysis import ALPHA, Effect
from .matching import unmatched
from .plan import Plan, Run
from .report import Report, Row, differences

NOTHING = "–"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first row its header; all but the first `left` columns to the right."""
    header, *body = rows
    rule = ["---" if place < left else "--:" for place in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *body)
    )


def bits(value: float | None) -> str:
    """Bits per byte."""
    return NOTHING if value is None else f"{value:.4f}"


def plan_markdown(plan: Plan, runs: Sequence[Run], states: dict[str, str], parallel: int, stated: float = 0.0) -> str:
    """What would be run: each arm's recipe against the baseline's, and how long it would take."""
    suite, parts = plan.suite, []
    parts.append(f"# Plan of {suite.name}\n\n{suite.about}".rstrip())
    for size in suite.sizes:
        cells = [plan.cells[arm.name, size.name] for arm in suite.arms_at(size)]
        against = partial(unmatched, baseline=plan.baseline(size.name))
        lines = [["arm", "seeds", "matched by", "parameters", "non-embedding", "FLOPs a token", "tokens", "moved",
                  "not matched"]]  # fmt: skip
        for cell in cells:
            cost, reference = cell.cost, cell.arm is suite.reference
            lines.append(
                [
                    cell.arm.name,
                    str(len(suite.seeds_of(cell.arm, size))),
                    "baseline" if reference else cell.match,
                    show_count(cost.parameters.total),
                    show_count(cost.parameters.non_embedding),
                    show_count(cost.flops_per_token.total),
                    "to be measured" if cell.pending else show_count(cost.tokens or 0),
                    str(cell.adjusted or NOTHING),
                    NOTHING if reference else differences(None if cell.pending else against(cell)),
                ]
            )
        parts.append(f"## {size.name}\n\n{table(lines)}")
    parts += filter(None, [plan.caution])
    parts.append(time_left(plan, runs, states, parallel, stated))
    return "\n\n".join(parts)


def time_left(plan: Plan, runs: Sequence[Run], states: dict[str, str], parallel: int, stated: float = 0.0) -> str:
    """Runs, tokens and hours that are left."""
    left = [run for run in runs if states[run.name] != "done"]
    tokens = sum(run.recipe.duration.tokens for run in left)
    text = f"{len(runs)} runs, {len(runs) - len(left)} of them done; {show_count(tokens)} tokens left"
    if pending := sum(cell.pending for cell in plan.cells.values()):
        text += f" (without {pending} arms whose tokens wait for a measurement of their speed)"
    seconds = [plan.seconds(run, stated) for run in left]
    if not left:
        return f"{text}."
    if any(one is None for one in seconds):
        return f"{text}. How long that takes is not known yet: give --speed, or train one run."
    hours = sum(one for one in seconds if one) / 3600 / parallel
    origin = "at the speeds measured here" if plan.rates else "at the speed given, scaled by FLOPs"
    return f"{text}: about {show_hours(hours)} of training, {parallel} at a time, {origin}."


def report_markdown(report: Report) -> str:
    """The whole report."""
    suite = report.suite
    parts = [f"# {suite.name}\n\n{suite.about}".rstrip()]
    parts.append(
        f"Baseline: **{suite.baseline}**. Lower bits per byte are better; differences are arm less baseline, with the "
        f"95 % t interval of that test alone; of the verdicts {ALPHA:.0%} are expected to be false (Benjamini and "
        "Hochberg over all tests)."
    )
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    parts += [f"## {size.name}\n\n{size_markdown(report, size.name)}" for size in suite.sizes]
    parts.append(f"## Does it transfer?\n\n{transfer_markdown(report)}")
    if report.remarks:
        lines = "\n".join(f"- **{one.arm}** at {one.size}: {one.text}." for one in report.remarks)
        parts.append(f"## Remarks\n\n{lines}")
    return "\n\n".join(parts)


def size_markdown(report: Report, size: str) -> str:
    """The tables of one size."""
    rows = [row for row in report.rows if row.size == size]
    noise, parts = report.analysis.noise[size], []
    if noise:
        floor = report.analysis.floor.get(size)
        text = (
            f"Noise of seeds: standard deviation {noise.sd:.4f} bits per byte, pooled over {noise.arms} "
            f"arm{'s' if noise.arms > 1 else ''} ({noise.degrees} degrees of freedom)"
        )
        parts.append(text + (f"; an arm of one seed shows from {floor:.4f} on." if floor else "."))
    else:
        parts.append("Noise of seeds: not known.")
    lines = [["arm", "bits per byte", "seeds", "against the baseline", "verdict", "at equal FLOPs", "at equal seconds"]]
    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    lines[0] += names
    for row in rows:
        lines.append(
            [
                row.arm,
                bits(row.loss),
                state(row),
                difference(row.effect),
                verdict(row),
                row.by_flops.effect.verdict if row.by_flops else NOTHING,
                row.by_seconds.effect.verdict if row.by_seconds else NOTHING,
                *(bits(row.measures.get(name)) for name in names),
            ]
        )
    parts += [table(lines), table(costs(rows)), *filter(None, [report.clocks.get(size)])]
    pairs = [one for one in report.analysis.effects if one.size == size and one.against != report.suite.baseline]
    if pairs:
        parts.append(
            table(
                [["compared", "difference", "verdict"]]
                + [[f"{one.arm} against {one.against}", difference(one), one.verdict] for one in pairs]
            )
        )
    return "\n\n".join(parts)


def costs(rows: Sequence[Row]) -> list[list[str]]:
    """What every arm costs, side by side."""
    lines = [["arm", "parameters", "non-embedding", "active", "FLOPs a token", "tokens", "FLOPs", "seconds", "tokens/s",
              "memory", "decode tokens/s", "KV bytes a token", "changed lines", "not matched"]]  # fmt: skip
    for row in rows:
        account = row.account
        lines.append(
            [
                row.arm,
                show_count(account.parameters),
                show_count(account.non_embedding),
                show_count(account.active),
                show_count(account.flops_per_token),
                known(row.tokens),
                NOTHING if row.flops is None else f"{row.flops:.3g}",
                known(row.seconds),
                known(row.tokens_per_second),
                NOTHING if row.memory is None else show_bytes(row.memory),
                known(row.decode),
                f"{account.kv_bytes_per_token:,}",
                f"{row.changed_lines} (+1 moved)" if row.adjusted else str(row.changed_lines),
                NOTHING if row.effect is None else row.differs,
            ]
        )
    return lines


def transfer_markdown(report: Report) -> str:
    """Verdicts by size, and how the order changes."""
    suite, analysis = report.suite, report.analysis
    lines = [["arm", *(size.name for size in suite.sizes)]]
    for arm in suite.arms:
        cells = [analysis.effect(arm.name, size.name) for size in suite.sizes]
        if arm.name != suite.baseline:
            lines.append([arm.name, *(one.verdict if one else NOTHING for one in cells)])
    parts = [table(lines)]
    counts = analysis.verdicts
    tested = sum(count for name, count in counts.items() if name != "no verdict")
    if tested:
        shares = ", ".join(f"{counts[name]} {name}" for name in ("better", "worse", "inside the noise"))
        sure = sum(one.sure for one in analysis.effects)
        parts.append(
            f"Of {tested} tests: {shares} ({counts['inside the noise'] / tested:.0%} inside the noise). "
            f"Differences that Holm's correction leaves too: {sure}."
        )
    order = analysis.order
    parts += [f"{size}: {' < '.join(arms)}" for size, arms in order.by_size.items() if len(arms) > 1]
    if order.correlations:
        parts.append(
            "Rank correlation (Spearman): "
            + ", ".join(f"{a} and {b} {value:.2f} over {count} arms" for a, b, value, count in order.correlations)
            + "."
        )
    for one in order.flips:
        parts.append(
            f"The order changes: {one.first} is better than {one.second} at {one.better_at}, and worse at "
            f"{one.worse_at}, both outside the noise."
        )
    if not order.flips and len(suite.sizes) > 1:
        parts.append("No two arms change their order outside the noise.")
    return "\n\n".join(parts)


def difference(effect: Effect | None) -> str:
    """A difference with its interval."""
    if effect is None or effect.difference is None:
        return NOTHING
    if effect.low is None:
        return f"{effect.difference:+.4f}"
    return f"{effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]"


def verdict(row: Row) -> str:
    """A verdict with what must be held against it."""
    if row.effect is None:
        return "baseline"
    text = row.effect.verdict
    reason = row.effect.reason or ("unstable" if row.stability.unstable else "")
    return f"{text} ({reason})" if reason else text


def state(row: Row) -> str:
    """Runs that count, and those that do not."""
    others = [f"{count} {name}" for name, count in row.states.items() if name != "done"]
    return ", ".join([str(row.seeds), *others])


def known(value: float | None) -> str:
    """A count, or nothing."""
    return NOTHING if value is None else show_count(value)
