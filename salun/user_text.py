"""Normalizes typed and pasted text: quoted paths, decomposed characters, the prompt syntax of hosts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from salun.errors import ConfigError

# a backslash before a bracket escapes it; one before another backslash stays
_ESCAPED = re.compile(r"(?<!\\)\\([()\[\]])")
_SYNTAX = re.compile(
    r"\([^()]*:\s*[-+]?\d+(?:\.\d+)?\s*\)"  # (a cat:1.3)
    r"|\(\([^()]*\)+"  # ((a cat))
    r"|\[[^\[\]]+\]"  # [a cat], [a cat:a dog:0.5]
    r"|\{[^{}]*\|[^{}]*\}"  # {a cat|a dog}
    r"|<(?:lora|lyco|hypernet):[^<>]*>"
    r"|\b(?:BREAK|AND)\b"
)
_SHOWN = 3  # pieces of syntax in a note


def unquoted(path: str) -> str:
    """A path without the pair of quotes that "Copy as path" of Windows adds."""
    stripped = path.strip()
    if len(stripped) > 2 and stripped[0] == stripped[-1] and stripped[0] in "\"'":
        return stripped[1:-1]
    return path


def is_hub_id(name: str, revised: bool = False) -> bool:
    """Whether a name has the form of an id of the Hugging Face hub (owner/name), which leads out of no folder.

    Args:
        revised: Whether a revision may follow, as in owner/name@revision.
    """
    repo, at, revision = name.partition("@")
    if at and not (revised and re.fullmatch(r"\w[\w.-]*", revision)):
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", repo) is not None


def is_data_set_id(name: str) -> bool:
    """Whether a list of prompts is named by its id at the hub, as owner/name or owner/name@revision, and not as a file.

    A split may follow after a colon. A name with a dot would be taken for a file's.
    """
    data_set, colon, split = name.partition(":")
    if colon and re.fullmatch(r"\w[\w-]*", split) is None:
        return False
    return is_hub_id(data_set, revised=True) and "." not in data_set.partition("@")[0]


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: a file name on Linux may contain other bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def checked(text: str, option: str) -> str:
    """The text, the value of an option. Raises ConfigError unless it `is_unicode`."""
    if not is_unicode(text):
        raise ConfigError(
            f"is {ascii(text)[:120]}, which is not UTF-8",
            option=option,
            advice="Write the text, or rename the file, in UTF-8",
        )
    return text


def composed(text: str) -> str:
    """A text in Unicode's composed form (NFC): macOS writes é in file names as e and an accent."""
    return unicodedata.normalize("NFC", text)


def prompt_text(text: str) -> str:
    r"""A prompt for a text encoder: in composed form, with `\(` `\)` `\[` `\]` as plain brackets, as in hosts.

    Unescaped brackets are weights in hosts. Here they and all other prompt syntax are literal text: see `syntax_note`.
    """
    return _ESCAPED.sub(r"\1", composed(text))


def syntax_note(texts: Iterable[str]) -> list[str]:
    """A note for the user if a text contains the prompt syntax of hosts, as a list of at most one line."""
    pieces = list(dict.fromkeys(match[0] for text in texts for match in _SYNTAX.finditer(text)))
    if not pieces:
        return []
    listed = ", ".join(repr(piece[:40]) for piece in pieces[:_SHOWN]) + (", …" if len(pieces) > _SHOWN else "")
    return [f"prompt syntax is taken literally, without weights, LoRAs or BREAK: {listed}. Use plain text"]


def as_spelled(path: Path) -> Path:
    """The path as the file system spells it: if there is none, one that differs only in its Unicode form."""
    if path.exists() or not path.name:
        return path
    above = as_spelled(path.parent)
    try:
        alike = [each for each in above.iterdir() if composed(each.name) == composed(path.name)]
    except OSError:
        return path
    return alike[0] if len(alike) == 1 else above / path.name
