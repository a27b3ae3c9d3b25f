"""The errors a user can meet. Each message says what, where, and what to do; the CLI prints it as one line."""

from __future__ import annotations

from collections.abc import Sequence


class SalunError(Exception):
    """Any error that salun raises on purpose."""


class ConfigError(SalunError):
    """An option that cannot be read, is out of range, or contradicts another."""


class ModelError(SalunError):
    """A model that cannot be found, read, or is of a kind salun does not handle."""


class MaskError(SalunError):
    """A mask that does not fit its model, or cannot be made."""


class DataError(SalunError):
    """Data (prompts, latents, pictures, detectors) that cannot be used."""


class TrainingError(SalunError):
    """Training that went wrong: a loss that is not finite."""


class Cancelled(SalunError):
    """The user asked to stop. line: what to tell of it, where that is not for whoever catches this to say."""

    def __init__(self, *arguments: object, line: str | None = None) -> None:
        super().__init__(*arguments)
        self.line = line


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, as a message lists them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
