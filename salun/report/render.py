"""Self-contained HTML pages made of sections, for runs, comparisons, masks and deltas; everything shown is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from salun.files import write_bytes

TEMPLATES = Path(__file__).parent
CHAPTER = re.compile("<!--chapter-->.*?<!--/chapter-->", re.DOTALL)  # of a page, for what is found out later


@dataclass(frozen=True)
class Report:
    """A complete HTML page without external references."""

    html: str

    def save(self, path: Path | str) -> None:
        """Write it atomically."""
        write_bytes(Path(path), self.html.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class ImagePair:
    """Images that belong together, such as before and after, under one caption.

    Args:
        images: Label → JPEG or PNG.
    """

    caption: str
    images: Mapping[str, bytes]


@dataclass(frozen=True)
class Banner:
    """The first thing on a page: what came of it.

    Args:
        outcome: In a word or two; the words before the first space choose the color.
        text: A sentence. next: What to do, another one.
    """

    outcome: str
    text: str
    next: str


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: "" for a part that belongs to the section before.
        rows: A table, its heading first.
        charts: SVG, in which names are escaped.
        images: Alternative text → PNG.
        pairs: Shown side by side, as many as fit.
        links: (path relative to the page or "", what it is, how to use it).
        footer: A remark below.
        wrap: Whether long cells are wrapped.
        folded: The line that opens the section, where it is closed at first.
    """

    title: str
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[str] = ()
    images: Mapping[str, bytes] | None = None
    pairs: Sequence[ImagePair] = ()
    links: Sequence[tuple[str, str, str]] = ()
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
    banner: Banner | None = None,
) -> Report:
    """A page. run: as in `run.json`, for the section on how to reproduce it."""
    parts = {"sections": sections, "headline": headline, "notes": notes, "run": run, "banner": banner}
    return Report(_rendered("page.html.j2", title=title, subtitle=subtitle, **parts))


def with_chapter(html: str, sections: Sequence[Section]) -> Report | None:
    """A page with these sections as its chapter, in place of the one that it has; None for one without a place."""
    chapter = f"<!--chapter-->{_rendered('sections.html.j2', sections=sections)}<!--/chapter-->"
    whole, places = CHAPTER.subn(lambda _: chapter, html, count=1)
    return Report(whole) if places else None


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "size": size,
        "svg": Markup,
        "data_url": _data_url,
        "href": quote,
    }  # charts escape the names they draw
    return environment.get_template(template).render(**values)


def loss_series(rows: Iterable[Any]) -> dict[str, list[tuple[float, float]]]:
    """A run's losses as series of (step or epoch, value), by name.

    Args:
        rows: The `losses` of a run.json, which may be untrusted input: {"step": 1, "forget": 0.5, …} each. Entries of
            another form are skipped, and so are values that are not numbers.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pairs = row.items() if isinstance(row, Mapping) else ()
        numbers = {name: float(v) for name, v in pairs if type(v) in (int, float) and -1e300 < v < 1e300}
        at = numbers.pop("step", numbers.pop("epoch", None))
        if at is not None:
            for name, value in numbers.items():
                series.setdefault(name, []).append((at, value))
    return series


def size(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _data_url(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii")
