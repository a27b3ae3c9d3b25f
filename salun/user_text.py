"""What people type or paste, read as it was meant: quoted paths, decomposed characters, the prompt syntax of hosts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from salun.errors import ConfigError

# a backslash before a bracket only says that it is no syntax; one before another backslash is left alone
_ESCAPED = re.compile(r"(?<!\\)\\([()\[\]])")
_SYNTAX = re.compile(
    r"\([^()]*:\s*[-+]?\d+(?:\.\d+)?\s*\)"  # (a cat:1.3)
    r"|\(\([^()]*\)+"  # ((a cat))
    r"|\[[^\[\]]+\]"  # [a cat], [a cat:a dog:0.5]
    r"|\{[^{}]*\|[^{}]*\}"  # {a cat|a dog}
    r"|<(?:lora|lyco|hypernet):[^<>]*>"
    r"|\b(?:BREAK|AND)\b"
)
_SHOWN = 3  # of the pieces that a message lists


def unquoted(path: str) -> str:
    """A path without the pair of quotes around it that "Copy as path" of Windows adds."""
    stripped = path.strip()
    if len(stripped) > 2 and stripped[0] == stripped[-1] and stripped[0] in "\"'":
        return stripped[1:-1]
    return path


def is_unicode(text: str) -> bool:
    """Whether a text is whole characters: the name of a file on Linux may hold other bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def checked(text: str, what: str) -> str:
    """The text. Raises ConfigError unless it `is_unicode`. what: the option that has it."""
    if not is_unicode(text):
        raise ConfigError(f"{what} is {ascii(text)[:120]}, which is not UTF-8: write it, or name the file, in UTF-8")
    return text


def composed(text: str) -> str:
    """A text in Unicode's composed form (NFC): macOS writes é in file names as e and an accent."""
    return unicodedata.normalize("NFC", text)


def prompt_text(text: str) -> str:
    r"""A prompt as text encoders are to read it: composed, and with `\(` `\)` `\[` `\]` as hosts read them.

    Hosts take unescaped brackets for weights; here they, and all else that is syntax there, are text (`syntax_note`).
    """
    return _ESCAPED.sub(r"\1", composed(text))


def syntax_note(texts: Iterable[str]) -> list[str]:
    """A line for the user if any of the texts holds prompt syntax of hosts; none otherwise."""
    found = list(dict.fromkeys(match[0] for text in texts for match in _SYNTAX.finditer(text)))
    if not found:
        return []
    listed = ", ".join(repr(piece[:40]) for piece in found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
    return [f"prompt syntax is taken literally, without weights, LoRAs or BREAK: {listed}. Write the words alone"]


def as_spelled(path: Path) -> Path:
    """The path as the disk spells it: where there is none of this name, one that differs only in Unicode's form."""
    if path.exists() or not path.name:
        return path
    above = as_spelled(path.parent)
    try:
        alike = [each for each in above.iterdir() if composed(each.name) == composed(path.name)]
    except OSError:
        return path
    return alike[0] if len(alike) == 1 else above / path.name
