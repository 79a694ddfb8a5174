"""How the cost of a training step grows with parameters, context, experts and ranks, beside what is predicted.

    python benchmarks/growth.py --out docs/growth.md
    python benchmarks/growth.py --only context --steps 6

Every case runs in processes of its own, the engine as `shot train` builds it, compiled, on random tokens; cases of one
axis take turns. Predicted is a step's time from the FLOPs that `shot recipe show` counts, at the FLOP/s of the axis's
first case, so that a point above the line is a size that the hardware likes less; and the memory that
`shot recipe memory` predicts, with nothing fitted. Memory is measured as in memory.py: tensors that live at once on the
rank that holds most. Ranks share the cores of one machine and one batch: their time is predicted to stay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calledshot import machine
from calledshot.recipe import cost, layout
from calledshot.recipe.units import show_count
from calledshot.training.world import World
from memory import BASE, Case, Count, Steps, in_processes, model, predicted

MIDDLE = Case("", compiled=True, rows=8, micro_rows=8)
"""2,048 tokens of context 256, width 256, 6 layers."""


def sized(width: int, layers: int) -> tuple[str, ...]:
    """A decoder with heads of 64."""
    return model(width=width, layers=layers, heads=width // 64, kv_heads=max(1, width // 128))


def long(context: int) -> Case:
    """As many tokens in fewer, longer rows."""
    rows = max(1, 4096 // context)
    return replace(MIDDLE, overrides=model(context=context, width=128, heads=2, kv_heads=1), rows=rows, micro_rows=rows)


def shared(ranks: int, key: str) -> Case:
    """The batch and the cores divided among ranks."""
    overrides = (f"parallel.{key}={ranks}",) if ranks > 1 else ()
    return replace(MIDDLE, overrides=(*sized(384, 6), *overrides), ranks=ranks, micro_rows=8 // ranks)


AXES: dict[str, dict[str, Case]] = {
    "parameters": {
        f"{cost(replace(MIDDLE, overrides=keys).recipe()).parameters.total / 1e6:.2g}M": replace(MIDDLE, overrides=keys)
        for keys in (sized(128, 4), sized(256, 6), sized(384, 8), sized(512, 12), sized(768, 12))
    },
    "context": {str(context): long(context) for context in (128, 256, 512, 1024, 2048, 4096)},
    "experts": {
        str(count): replace(MIDDLE, overrides=model(experts=count, top_k=2) if count else ())
        for count in (0, 4, 8, 16, 32, 64)
    },
    "replicas": {str(ranks): shared(ranks, "replicate") for ranks in (1, 2, 4)},
    "shards": {str(ranks): shared(ranks, "shard") for ranks in (1, 2, 4)},
}


@dataclass(frozen=True)
class Point:
    """One case, measured and predicted."""

    place: str
    parameters: int
    active: int
    flops: float
    """Of an update, all ranks together."""
    seconds: float
    predicted_seconds: float
    memory: int
    predicted_memory: float


def measure(case: Case, steps: int) -> dict[str, float]:
    """Median seconds of an update of this rank, and bytes that live at most."""
    count = None if torch.cuda.is_available() else Count()
    torch.set_num_threads(max(1, machine.usable_cores() // case.ranks))
    world = World.join()
    world.arrange(layout(case.recipe(), world.size))
    warm = Steps(case, world)
    if count is None:
        torch.cuda.reset_peak_memory_stats()
    else:
        count.begin()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        warm.step()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if count is None else count.peak
    world.leave()
    return {"seconds": statistics.median(times), "bytes": peak}


def axis(cases: dict[str, Case], name: str, steps: int, rounds: int, device: str) -> list[Point]:
    """The points of an axis, its cases in turns."""
    seconds: dict[str, list[float]] = {place: [] for place in cases}
    memory = dict.fromkeys(cases, 0)
    for _ in range(rounds):
        for place, case in cases.items():
            answers = [
                json.loads(one) for one in in_processes(case, "--measure", name, place, str(steps), file=__file__)
            ]
            seconds[place].append(max(one["seconds"] for one in answers))
            memory[place] = max(memory[place], *(int(one["bytes"]) for one in answers))
    points: list[Point] = []
    for place, case in cases.items():
        found = cost(case.recipe())
        flops = float(found.flops_per_token.total * found.batch_tokens)
        took = statistics.median(seconds[place])
        foreseen = flops / points[0].flops * points[0].seconds if points else took
        counts = found.parameters
        said = predicted(case, device).peak
        points.append(Point(place, counts.total, counts.active, flops, took, foreseen, memory[place], said))
        print(f"{name} {place}: {took:.3f} s, {memory[place] / 2**20:,.0f} MiB", flush=True)
    return points


def table(points: list[Point], name: str) -> list[str]:
    """Rows of Markdown."""
    lines = [
        f"| {name} | parameters | active | FLOPs a step | s a step | predicted | ratio | memory, MiB | predicted | "
        "error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in points:
        lines.append(
            f"| {one.place} | {show_count(one.parameters)} | {show_count(one.active)} | {show_count(one.flops)} | "
            f"{one.seconds:.3f} | {one.predicted_seconds:.3f} | {one.seconds / one.predicted_seconds:.2f} | "
            f"{one.memory / 2**20:,.0f} | {one.predicted_memory / 2**20:,.0f} | "
            f"{one.predicted_memory / one.memory - 1:+.0%} |"
        )
    return lines


WIDE, HIGH, LEFT, BOTTOM, GAP = 250, 190, 46, 40, 24


def picture(found: dict[str, list[Point]]) -> str:
    """Measured points on predicted lines, an axis a column, seconds above and memory below; logarithmic heights."""
    size = f"{len(found) * (WIDE + GAP) + GAP} {2 * (HIGH + GAP) + 30}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for column, (name, points) in enumerate(found.items()):
        for row, (title, unit, values) in enumerate(
            (
                ("seconds a step", 1.0, [(one.seconds, one.predicted_seconds) for one in points]),
                ("memory, MiB", 2.0**20, [(one.memory, one.predicted_memory) for one in points]),
            )
        ):
            x0, y0 = GAP + column * (WIDE + GAP), 30 + row * (HIGH + GAP)
            pairs = [(measured / unit, foreseen / unit) for measured, foreseen in values]
            low = math.floor(math.log2(min(min(pair) for pair in pairs)))
            high = max(low + 1, math.ceil(math.log2(max(max(pair) for pair in pairs))))

            wide, share = (WIDE - LEFT) / len(pairs), (HIGH - BOTTOM) / (high - low)

            def at(place: int, value: float, x=x0 + LEFT, y=y0, wide=wide, share=share, high=high) -> str:
                return f"{x + (place + 0.5) * wide:.1f},{y + share * (high - math.log2(value)):.1f}"

            parts.append(f'<text x="{x0 + LEFT}" y="{y0 - 6}">{title}</text>')
            for power in range(low, high + 1, max(1, (high - low) // 4)):
                y = at(0, 2.0**power).split(",")[1]
                parts.append(f'<path d="M{x0 + LEFT} {y}H{x0 + WIDE}" stroke="#ddd"/>')
                parts.append(f'<text x="{x0 + LEFT - 4}" y="{y}" dy="4" text-anchor="end">{2.0**power:,g}</text>')
            line = " ".join(at(place, foreseen) for place, (_, foreseen) in enumerate(pairs))
            parts.append(f'<polyline points="{line}" fill="none" stroke="#999" stroke-dasharray="4 3"/>')
            for place, (measured, _) in enumerate(pairs):
                x, y = at(place, measured).split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#1f6feb"/>')
                parts.append(
                    f'<text x="{x}" y="{y0 + HIGH - BOTTOM + 15}" text-anchor="middle">{points[place].place}</text>'
                )
            middle = x0 + (LEFT + WIDE) / 2
            parts.append(f'<text x="{middle}" y="{y0 + HIGH - BOTTOM + 31}" text-anchor="middle">{name}</text>')
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown; the picture goes beside it")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        name, place, steps = asked.measure
        print(json.dumps(measure(AXES[name][place], int(steps))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: axis(AXES[name], name, asked.steps, asked.rounds, device) for name in asked.only}
    lines = [
        "# How cost grows",
        "",
        f"`python benchmarks/growth.py --steps {asked.steps} --rounds {asked.rounds}`: {machine.fingerprint()}; base "
        f"{' '.join(BASE)}; {device}, compiled, bfloat16.",
        "",
        "Predicted seconds are a step's FLOPs at the FLOP/s of the axis's first row; predicted memory is that of "
        "`shot recipe memory`, nothing fitted.",
        "",
        *([f"![Measured points on predicted lines]({asked.out.stem}.svg)", ""] if asked.out else []),
    ]
    for name, points in found.items():
        lines += [f"## {name.capitalize()}", "", *table(points, name), ""]
    print("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines), encoding="utf-8")
        asked.out.with_suffix(".svg").write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
