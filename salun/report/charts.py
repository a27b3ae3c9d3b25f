"""Inline SVG charts, drawn by hand: two are needed, and a page without scripts needs no library for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape


def loss_curve(losses: Sequence[Sequence[float]]) -> str:
    """Forget and retain loss over the steps: (step, forget, retain) each. Raw values faint, a running mean in full."""
    if len(losses) < 2:
        return ""
    width, height, left, bottom = 640, 220, 64, 28
    steps = [float(row[0]) for row in losses]
    values = [[float(row[k]) for row in losses] for k in (1, 2)]
    positive = [v for series in values for v in series if v > 0]
    if not positive:
        return ""
    low, high = math.log10(min(positive)), math.log10(max(positive))
    low, high = (low, high) if high - low > 0.5 else (low - 0.25, high + 0.25)

    def x(step: float) -> float:
        return left + (width - left - 8) * (step - steps[0]) / (steps[-1] - steps[0])

    def y(value: float) -> float:
        return 8 + (height - bottom - 8) * (1 - (math.log10(max(value, 10**low)) - low) / (high - low))

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="losses over the steps">']
    for decade in range(math.ceil(low), math.floor(high) + 1):
        at = y(10.0**decade)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for share in (0.0, 0.5, 1.0):
        step = steps[0] + share * (steps[-1] - steps[0])
        anchor = ("start", "middle", "end")[int(2 * share)]
        parts.append(f'<text x="{x(step):.1f}" y="{height - 8}" text-anchor="{anchor}">step {step:.0f}</text>')
    for series, kind in zip(values, ("forget", "retain"), strict=True):
        span = max(1, len(series) // 20)
        smooth = [sum(series[max(0, i - span) : i + 1]) / (i + 1 - max(0, i - span)) for i in range(len(series))]
        for line, strength in ((series, "raw"), (smooth, "mean")):
            points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, line, strict=True))
            parts.append(f'<polyline class="{kind} {strength}" points="{points}"/>')
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
