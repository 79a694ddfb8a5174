"""Lines in SVG, drawn here rather than by a script: for pages with many lines that want their names beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from . import figures

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 150, 12, 44
GAP = 13
"""Pixels between two labels at least."""
SHOWN = 0.4
"""Share of the shortest line from which on lines are shown: before, they are all alike."""
ABOVE = 0.8
"""Spreads of the last points that are shown above the highest of them; what is higher is cut off."""


@dataclass(frozen=True)
class Line:
    """One line, what came of it, and its name beside that."""

    label: str
    points: Sequence[tuple[float, float]]
    """The line; may be empty."""
    end: tuple[float, float]
    """A mark of its own, which no line leads to: what it shows need not be measured as the points are."""
    color: str
    reach: float = 0.0
    """Half of the bar at the mark."""
    strong: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    lines: Sequence[Line]
    x: str
    y: str
    write_x: Callable[[float], str]

    def svg(self) -> str:
        """The picture; empty without lines."""
        ends = [line.end for line in self.lines]
        if not ends:
            return ""
        right = max(x for x, _ in ends) * 1.01
        left = SHOWN * min(x for x, _ in ends)
        seen = [y for line in self.lines for x, y in line.points if x >= left]
        last = [line.end[1] + sign * line.reach for line in self.lines for sign in (-1, 1)]
        last += [line.points[-1][1] for line in self.lines if line.points]
        spread_of_ends = max(last) - min(last) or 0.01 * abs(last[0]) or 1.0
        low = min(last) - 0.1 * spread_of_ends
        high = max(last) + min(ABOVE * spread_of_ends, max(0.1 * spread_of_ends, max(seen, default=0.0) - max(last)))

        def at_x(value: float) -> float:
            return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

        def at_y(value: float) -> float:
            return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

        bottom, edge = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{self.y} over {self.x}")}">']
        for value in ticks(low, high, 6):
            y = at_y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{figures.significant(value, 4)}</text>'
            )
        for value in ticks(left, right, 4):
            x = at_x(value)
            parts.append(f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            text = escape(self.write_x(value))
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
        parts.append(f'<line class="base" x1="{LEFT}" x2="{edge}" y1="{bottom}" y2="{bottom}"/>')
        # A picture in the picture cuts off what leaves it.
        size = f'width="{edge - LEFT}" height="{bottom - TOP}"'
        frame = f'<svg x="{LEFT}" y="{TOP}" {size} viewBox="{LEFT} {TOP} {edge - LEFT} {bottom - TOP}">'
        parts.append(f'<text x="{edge}" y="{HEIGHT - 6}" text-anchor="end">{escape(self.x)}</text>')
        heights = spread([at_y(y) for _, y in ends], GAP, TOP, bottom)
        for line, height in sorted(zip(self.lines, heights, strict=True), key=lambda pair: pair[0].strong):
            parts.append(f'<g style="--color: {line.color}"><title>{escape(line.hint or line.label)}</title>')
            strong = " strong" if line.strong else ""
            if path := "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line.points if x >= left):
                parts.append(f'{frame}<path class="line{strong}" d="M{path}"/></svg>')
            x, y = at_x(line.end[0]), at_y(line.end[1])
            if line.reach:
                reach = line.reach / (high - low) * (HEIGHT - TOP - BOTTOM)
                parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y - reach:.1f}" y2="{y + reach:.1f}"/>')
            parts.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
            parts.append(f'<path class="leader" d="M{x + 5:.1f} {y:.1f}L{edge + 8} {height:.1f}"/>')
            weight = ' class="strong"' if line.strong else ""
            parts.append(f'<text{weight} x="{edge + 12}" y="{height + 4:.1f}">{escape(line.label)}</text></g>')
        return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, `most` of them at most."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step)
    return [place * step for place in range(first, math.floor(high / step) + 1)]


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """The heights, moved as little as need be so that no two are closer than `gap`; in the order given."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    below = top - gap
    for place in order:
        moved[place] = below = max(moved[place], below + gap)
    above = max(bottom, top + gap * (len(order) - 1)) + gap
    for place in reversed(order):
        moved[place] = above = min(moved[place], above - gap)
    return moved
