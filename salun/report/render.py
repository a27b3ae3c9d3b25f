"""Self-contained HTML pages made of sections, for runs, comparisons, masks and deltas; everything shown is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun.files import write_bytes

TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Report:
    """A complete HTML page without external references."""

    html: str

    def save(self, path: Path | str) -> None:
        """Write it atomically."""
        write_bytes(Path(path), self.html.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: "" for a part that belongs to the section before.
        rows: A table, its heading first.
        charts: SVG, in which names are escaped.
        images: Alternative text → PNG.
        footer: A remark below.
        wrap: Whether long cells are wrapped.
        folded: What to open the section by, where it is closed at first.
    """

    title: str
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[str] = ()
    images: Mapping[str, bytes] | None = None
    footer: str = ""
    wrap: bool = False
    folded: str = ""


def page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    headline: Sequence[str] = (),
    notes: Sequence[str] = (),
    run: Mapping[str, Any] | None = None,
) -> Report:
    """A page. run: as in `run.json`, for the section on how to reproduce it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "svg": Markup, "data_url": _data_url}  # charts escape the names they draw
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return Report(
        template.render(title=title, subtitle=subtitle, sections=sections, headline=headline, notes=notes, run=run)
    )


def loss_series(
    history: Sequence[Mapping[str, float | None] | Sequence[float | None]],
    names: Sequence[str] = ("forget", "retain"),
) -> dict[str, list[tuple[float, float]]]:
    """A run's losses as series of (step, value).

    Args:
        history: Named losses with their "step" or "epoch"; or lists that begin with it, whose losses `names` names.
            A loss of None is skipped.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        named = row if isinstance(row, Mapping) else dict(zip(("step", *names), row, strict=False))
        at = named.get("step", named.get("epoch"))
        for name, value in named.items():
            if name not in ("step", "epoch") and value is not None and at is not None:
                series.setdefault(name, []).append((float(at), float(value)))
    return series


def size(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
