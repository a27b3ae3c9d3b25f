"""Charts as inline SVG, so that reports need no JavaScript."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]


def bars(blocks: Mapping[str, Sequence[int]]) -> str:
    """A bar for each block. blocks: block → (selected, total)."""
    height, left = 20, max([230, *(7 * len(block) for block in blocks)])
    room = 300
    parts = [
        f'<svg class="chart" viewBox="0 0 {left + room + 110} {height * len(blocks) + 8}" role="img" '
        'aria-label="fraction of weights selected, by block">'
    ]
    for i, (block, (selected, total)) in enumerate(blocks.items()):
        top, fraction = 4 + i * height, selected / total if total else 0.0
        parts.append(f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(block)}</text>')
        parts.append(f'<rect class="room" x="{left}" y="{top + 3}" width="{room}" height="12"/>')
        parts.append(f'<rect class="bar" x="{left}" y="{top + 3}" width="{room * fraction:.1f}" height="12"/>')
        parts.append(f'<text x="{left + room + 8}" y="{top + 13}">{fraction:.1%} of {_short(total)}</text>')
    return "".join([*parts, "</svg>"])


def _short(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.1f} k" if n >= 1e3 else str(n)


def curves(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """A line for each name, through its (x, y) points. Empty if there is no point.

    Args:
        log: Whether the y axis is logarithmic and lines are running means, with the values faint behind them. Values
            of 0 or less are drawn at the lowest positive one; without any positive value the chart is empty.
        y_range: Ends of the y axis; None for the least and the largest value.
    """
    values = [y for line in series.values() for _, y in line if y > 0 or not log]
    if not values:
        return ""
    lowest = min(values)

    def scaled(y: float) -> float:
        return math.log10(max(y, lowest)) if log else y

    width, height, left, bottom, room = 640, 240, 62, 34, min(150, 44 + 7 * max(map(len, series)))
    xs = [x for line in series.values() for x, _ in line]
    (x0, x1), (y0, y1) = _widened(min(xs), max(xs)), y_range or _widened(scaled(lowest), scaled(max(values)))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (scaled(y) - y0) / (y1 - y0)
        return left + (width - left - room) * across, 10 + (height - bottom - 10) * (1 - up)

    label = escape(f"{y_label} against {x_label}")
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for value in _decades(y0, y1) if log else _ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<line x1="{left}" x2="{width - room}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1):
        x, _ = at(value, lowest)
        parts.append(f'<text x="{x:.1f}" y="{height - 19}" text-anchor="middle">{value:g}</text>')
    middle = (left + width - room) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 12 {(height - bottom) / 2})"'
    parts.append(f'<text x="12" y="{(height - bottom) / 2}" {turned}>{escape(y_label)}</text>')
    for i, (name, line) in enumerate(series.items()):
        kind, top = f"s{i % 6}", 18 + 16 * i
        if log and len(line) > 24:
            parts.append(_polyline([at(x, y) for x, y in line], f"{kind} faint"))
            line = _running_mean(line)
        drawn = [at(x, y) for x, y in line]
        parts.append(_polyline(drawn, kind))
        if len(drawn) <= 24:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in drawn]
        parts.append(f'<line class="{kind}" x1="{width - room + 10}" x2="{width - room + 26}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text x="{width - room + 32}" y="{top + 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _decades(low: float, high: float) -> list[float]:
    """Ticks from 10^low to 10^high: powers of ten, with twice and five times each where there are few."""
    powers = range(math.floor(low), math.floor(high) + 1)
    few = high - low < 2
    ticks = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if few else (1,))]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def scatter(points: Mapping[str, tuple[float, float, float]], x_label: str, y_label: str) -> str:
    """A named disk at each (x, y), its area by the third number, which is not negative. Empty if there is none."""
    if not points:
        return ""
    width, height, left, bottom, right = 640, 340, 56, 34, 110
    xs, ys, sizes = zip(*points.values(), strict=True)
    (x0, x1), (y0, y1), largest = _widened(min(xs), max(xs)), _widened(min(ys), max(ys)), max(sizes) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + 14 + (width - left - right - 14) * across, 18 + (height - bottom - 32) * (1 - up)

    label = escape(f"{y_label} against {x_label}")
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for value in _ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1):
        x, _ = at(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{height - 19}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{width / 2:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="12">{escape(y_label)}</text>')
    for name, (x, y, size) in points.items():
        px, py = at(x, y)
        radius = 3 + 9 * math.sqrt(size / largest)
        parts.append(f'<circle class="s0" cx="{px:.1f}" cy="{py:.1f}" r="{radius:.1f}" fill-opacity="0.4"/>')
        parts.append(f'<text x="{px + radius + 3:.1f}" y="{py + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _polyline(points: Points, kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _running_mean(line: Points) -> Points:
    """The mean of each value and those before it, over a twentieth of all."""
    span = max(1, len(line) // 20)
    parts = [line[max(0, i - span) : i + 1] for i in range(len(line))]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, widened where it is empty."""
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def heat(table: Sequence[Sequence[int]], names: Sequence[str], title: str) -> str:
    """A confusion matrix: counts by true class (down) and predicted class (across), rows shaded by fraction."""
    n, cell, left, top = len(table), 26, 92, 36
    size = left + n * cell + 8
    parts = [f'<svg class="heat" viewBox="0 0 {size} {top + n * cell + 8}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{left}" y="12">{escape(title)}</text>')
    for i, name in enumerate(names):
        short = name if len(name) <= 12 else name[:11] + "…"
        y = top + i * cell
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">{escape(short)}</text>')
        parts.append(f'<text x="{left + i * cell + 13}" y="{top - 6}" text-anchor="middle">{escape(short[:3])}</text>')
        total = sum(table[i])
        for j, count in enumerate(table[i]):
            fraction = count / total if total else 0.0
            x = left + j * cell
            parts.append(
                f'<rect class="{"correct" if i == j else "wrong"}" x="{x}" y="{y}" width="{cell - 1}" '
                f'height="{cell - 1}" fill-opacity="{fraction:.3f}"/>'
            )
            if count:
                parts.append(f'<text x="{x + 12.5}" y="{y + 17}" text-anchor="middle">{count}</text>')
    return "".join([*parts, "</svg>"])
