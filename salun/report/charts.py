"""Inline SVG charts, drawn by hand: two are needed, and a page without scripts needs no library for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def loss_series(rows: Iterable[Any], axis: str) -> dict[str, list[tuple[float, float]]]:
    """The points (x, loss) of each named loss, by name.

    Args:
        rows: The `losses` of a run.json, which may be untrusted input: {"step": 1, "forget": 0.5, …} each; entries of
            another form are skipped.
        axis: Key of x, "step" or "epoch".
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pairs = row.items() if isinstance(row, dict) else ()
        numbers = {name: value for name, value in pairs if type(value) in (int, float) and -1e300 < value < 1e300}
        x = numbers.pop(axis, None)
        for name, loss in numbers.items() if x is not None else ():
            series.setdefault(name, []).append((x, loss))
    return series


def loss_curve(rows: Iterable[Any]) -> str:
    """Each named loss over the steps, see `loss_series`: values faint, a running mean in full. Empty without steps."""
    lines = loss_series(rows, "step")
    steps = [x for line in lines.values() for x, _ in line]
    positive = [loss for line in lines.values() for _, loss in line if loss > 0]
    if not positive or min(steps) == max(steps):
        return ""
    width, height, left, bottom = 640, 220, 64, 28
    first, last = min(steps), max(steps)
    low, high = math.log10(min(positive)), math.log10(max(positive))
    low, high = (low, high) if high - low > 0.5 else (low - 0.25, high + 0.25)

    def x(step: float) -> float:
        return left + (width - left - 8) * (step - first) / (last - first)

    def y(value: float) -> float:
        return 8 + (height - bottom - 8) * (1 - (math.log10(max(value, 10**low)) - low) / (high - low))

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="losses over the steps">']
    for decade in range(math.ceil(low), math.floor(high) + 1):
        at = y(10.0**decade)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for share in (0.0, 0.5, 1.0):
        step = first + share * (last - first)
        anchor = ("start", "middle", "end")[int(2 * share)]
        parts.append(f'<text x="{x(step):.1f}" y="{height - 8}" text-anchor="{anchor}">step {step:.0f}</text>')
    for i, (name, line) in enumerate(lines.items()):
        parts.append(f'<text x="{left + 8 + 90 * i}" y="18" class="s{i % 6} name">{escape(name[:12])}</text>')
        values, span = [loss for _, loss in line], max(1, len(line) // 20)
        smooth = [sum(values[max(0, k - span) : k + 1]) / (k + 1 - max(0, k - span)) for k in range(len(values))]
        for drawn, strength in ((values, "raw"), (smooth, "mean")):
            points = " ".join(f"{x(step):.1f},{y(v):.1f}" for (step, _), v in zip(line, drawn, strict=True))
            parts.append(f'<polyline class="s{i % 6} {strength}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def layer_bars(layers: Mapping[str, tuple[int, int]]) -> str:
    """Mask density per block of the network. layers: parameter → (selected, total), in module order."""
    return bars(per_block(layers))


def per_block(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """(selected, total) summed over the parameters of each block, in the order of the blocks' first parameters."""
    blocks: dict[str, tuple[int, int]] = {}
    for name, (selected, total) in layers.items():
        before = blocks.get(block_of(name), (0, 0))
        blocks[block_of(name)] = (before[0] + selected, before[1] + total)
    return blocks


def bars(blocks: Mapping[str, Sequence[int]]) -> str:
    """A bar for each block: block → (selected, total)."""
    height, left, width = 20, 230, 640
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height * len(blocks) + 8}" role="img" '
        'aria-label="share of the weights selected, per block">'
    ]
    for i, (block, (selected, total)) in enumerate(blocks.items()):
        top, share = 4 + i * height, selected / total if total else 0.0
        room = width - left - 110
        parts.append(f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(block)}</text>')
        parts.append(f'<rect class="room" x="{left}" y="{top + 3}" width="{room}" height="12"/>')
        parts.append(f'<rect class="bar" x="{left}" y="{top + 3}" width="{room * share:.1f}" height="12"/>')
        parts.append(f'<text x="{left + room + 8}" y="{top + 13}">{share:.0%} of {_short(total)}</text>')
    return "".join([*parts, "</svg>"])


def block_of(name: str) -> str:
    """The block a UNet parameter belongs to: down_blocks.0.attentions, mid_block.resnets, time_embedding, …"""
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if parts[0] == "mid_block" else parts[0]


def _short(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.1f} k" if n >= 1e3 else str(n)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """A line with dots for each name: its (x, y) points. across, up: what the axes are. Empty if there is no point."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    width, height, left, bottom, room = 640, 240, 56, 34, 150
    x0, x1 = _widened(min(x for x, _ in points), max(x for x, _ in points))
    y0, y1 = _widened(min(y for _, y in points), max(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - room) * (x - x0) / (x1 - x0), 10 + (height - bottom - 10) * (
            1 - (y - y0) / (y1 - y0)
        )

    label = escape(f"{up} against {across}")
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for value in _ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<line x1="{left}" x2="{width - room}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1):
        x, _ = at(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{height - 19}" text-anchor="middle">{value:g}</text>')
    middle = (left + width - room) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(across)}</text>')
    for i, (name, line) in enumerate(series.items()):
        kind, top = f"s{i % 6}", 18 + 16 * i
        drawn = [at(x, y) for x, y in line]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>')
        if len(drawn) <= 24:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in drawn]
        parts.append(f'<line class="{kind}" x1="{width - room + 10}" x2="{width - room + 26}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text x="{width - room + 32}" y="{top + 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, made wider where it is none."""
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def heat(table: Sequence[Sequence[int]], names: Sequence[str], title: str) -> str:
    """A confusion matrix: counts by true class (down) and answer (across), each row shaded by its shares."""
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
            share = count / total if total else 0.0
            x = left + j * cell
            parts.append(
                f'<rect class="{"own" if i == j else "other"}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{share:.3f}"/>'
            )
            if count:
                parts.append(f'<text x="{x + 12.5}" y="{y + 17}" text-anchor="middle">{count}</text>')
    return "".join([*parts, "</svg>"])
