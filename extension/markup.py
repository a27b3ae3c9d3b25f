"""Lines of HTML for the page. Names and texts are escaped."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, SalunError

from .jobs import Job
from .messages import render

logger = logging.getLogger("salun")


def good(text: str) -> str:
    """A status line."""
    return f'<p role="status">{escape(text)}</p>'


def bad(text: str) -> str:
    """An error line."""
    return f'<p class="salun-bad" role="alert">{escape(text)}</p>'


def named_only(gr: Any) -> dict[str, bool]:
    """Arguments of a list whose choice must be the one that is seen: nothing can be typed, or it is taken (gradio 3).

    Otherwise gradio returns to the previous choice without a word. `allow_custom_value` prevents that in gradio 3 only:
    5 and later do so where a text was pasted, and 4 remembers the choice by its position, so that after an update the
    new checkpoint in the place of the old one could not be chosen.
    """
    return {"allow_custom_value": True} if int(gr.__version__.split(".")[0]) < 4 else {"filterable": False}


def verdict(outcome: str, text: str, next: str) -> str:
    """The first thing of a finished run, as `page_cards.js` shows it of a job."""
    attributes = f'class="salun-verdict" data-outcome="{escape(outcome.split(" ")[0].lower())}"'
    return f"<div {attributes}><strong>{escape(outcome)}</strong><p>{escape(text)}</p><p>{escape(next)}</p></div>"


def table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = ()) -> str:
    """A table of texts."""
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="salun-table">{head}{body}</table>'


def image(path: Path, alt: str) -> str:
    """A PNG image within the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def chosen(value: Any, what: str = "a run") -> str:
    """The name that is chosen in a list. Raises ConfigError if none is."""
    if not value:
        raise ConfigError(f"Choose {what} first")
    return str(value)


def loss_chart(rows: Iterable[Any]) -> str:
    """The losses of a run as SVG, as in its report; empty where there is none. rows: as in `run.json`."""
    from salun.report import charts
    from salun.report.render import loss_series

    return charts.curves(loss_series(rows), "step", "loss", log=True)


def safe(answer: Callable[..., str]) -> Callable[..., str]:
    """An event handler whose errors are shown on the page, where a host might show the error of another task."""

    def call(*given: Any) -> str:
        try:
            return answer(*given)
        except SalunError as error:
            return bad(render(error))
        except Exception as error:
            logger.exception("the page")
            return bad(f"{type(error).__name__}: {error}")

    return call


def queued(start: Callable[..., Job]) -> Callable[..., str]:
    """An event handler that queues a job."""
    return safe(lambda *given: good(f"Queued: “{start(*given).title}”. It keeps running if you close this page."))
