"""How long texts may be that come in, and how long those are that are shown: both may be untrusted input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun.errors import ConfigError

LONGEST = 2_000  # characters of a text
MOST = 1_000  # entries of a list
CONNECTIONS = 200  # at once to `salun ui`; a page has at most six


def check_lengths(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a text that is too long, or a list with too many entries."""
    for name, value in options.items():
        if isinstance(value, list) and len(value) > MOST:
            raise ConfigError(f"{name} has {len(value):,} entries; the limit is {MOST:,}. Give fewer.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > LONGEST:
                raise ConfigError(f"{name}: a text has {len(text):,} characters; the limit is {LONGEST:,}. Shorten it.")


def truncated(text: str, longest: int = LONGEST) -> str:
    """A text as it may be shown: of a longer one its beginning and its end, which tells what to do."""
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 + 3 :]}"
