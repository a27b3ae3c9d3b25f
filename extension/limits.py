"""The maximum lengths of incoming and displayed texts, both of which may be untrusted input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.errors import ConfigError

MAX_TEXT = 2_000  # characters of a text
MAX_ENTRIES = 1_000  # entries of a list
MAX_CONNECTIONS = 200  # at once to `salun ui`; a page has at most six


def check_lengths(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a text that is too long, or a list with too many entries."""
    for name, value in options.items():
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise ConfigError(
                f"has {len(value):,} entries; the limit is {MAX_ENTRIES:,}", option=name, advice="Give fewer"
            )
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > MAX_TEXT:
                raise ConfigError(
                    f"has a text of {len(text):,} characters; the limit is {MAX_TEXT:,}",
                    option=name,
                    advice="Shorten it",
                )


def truncated(text: str, longest: int = MAX_TEXT) -> str:
    """A text for display; a longer one is reduced to its beginning and end."""
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 + 3 :]}"
