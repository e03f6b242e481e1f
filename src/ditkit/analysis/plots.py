"""Scatter plots as SVG that takes its colours from the page, so that it is right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

_WIDTH, _HEIGHT = 520, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48


@dataclass(frozen=True)
class Point:
    """One numbered mark.

    Args:
        x, y: where; y must be positive, its axis is logarithmic.
        mark: the short text in the mark, such as the number of its table row.
        title: shown when the mouse is over it.
        kind: the class of its colours in the page's style sheet.
    """

    x: float
    y: float
    mark: str
    title: str
    kind: str


def scatter(points: Sequence[Point], x_label: str, y_label: str, joined: str = "plain") -> str:
    """An SVG element: linear x from 0, logarithmic y, the points of the kind `joined` linked by a line.

    Points whose y is not positive or not finite have no place on the axis and are left out.
    """
    shown = [p for p in points if p.y > 0 and math.isfinite(p.y) and math.isfinite(p.x)]
    if not shown:
        return ""
    ticks_x = _linear_ticks(max(1.0, *(p.x for p in shown)))
    ticks_y = _log_ticks(min(p.y for p in shown), max(p.y for p in shown))
    low, high = math.log10(ticks_y[0]), math.log10(ticks_y[-1])

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / ticks_x[-1]

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (math.log10(y) - low) / (high - low)

    base, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f"aria-label={quoteattr(f'{y_label} against {x_label}')}>"
    ]
    for x in ticks_x:
        parts.append(
            f'<line class="grid" x1="{across(x):.1f}" y1="{_TOP}" x2="{across(x):.1f}" y2="{base}"/>'
        )
        parts.append(f'<text x="{across(x):.1f}" y="{base + 18}" text-anchor="middle">{x:g}</text>')
    for y in ticks_y:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{up(y):.1f}" x2="{right}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    height = (_TOP + base) / 2
    parts.append(
        f'<text class="axis" x="14" y="{height}" text-anchor="middle" '
        f'transform="rotate(-90 14 {height})">{escape(y_label)}</text>'
    )
    line = sorted((p for p in shown if p.kind == joined), key=lambda p: p.x)
    if len(line) > 1:
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in line)
        parts.append(f'<polyline class="{joined}" points="{path}"/>')
    for p in shown:
        x, y = across(p.x), up(p.y)
        parts.append(
            f"<g class={quoteattr('mark ' + p.kind)}><title>{escape(p.title)}</title>"
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10"/>'
            f'<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle">{escape(p.mark)}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def _linear_ticks(top: float) -> list[float]:
    """From 0 to beyond `top` in at most seven round steps."""
    rough = top / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
    count = math.ceil(top * 1.02 / step)
    return [round(i * step, 10) for i in range(count + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2, 5 times a power of ten that enclose the range: at least two."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    values = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    first = max(i for i, v in enumerate(values) if v <= low * 0.95)
    last = min(i for i, v in enumerate(values) if v >= high * 1.05)
    ticks = values[first : last + 1]
    if len(ticks) > 8:  # wide ranges: whole powers only
        ticks = [10.0**p for p in powers if ticks[0] / 10 < 10.0**p < ticks[-1] * 10]
    return [float(f"{v:.6g}") for v in ticks]
