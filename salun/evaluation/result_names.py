"""Names of detectors and metrics in results, which are published: without the paths of the machine they are from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from salun.user_text import as_spelled, unquoted


def result_names(names: Sequence[str]) -> list[str]:
    """The names as results show them: of a folder or file in a name only its own name, numbered where two would agree.

    Args:
        names: As given, each once: "self", "clip:FOLDER", "nudenet:mace:FILE", "fid:FOLDER". The id of a model on the
            hub is not a path and stays, unless there is such a folder, which is then what is used.

    Returns:
        As many different names: "clip:models/ViT-L" and "clip:others/ViT-L" become "clip:ViT-L" and "clip:ViT-L 2".
    """
    shown: list[str] = []
    for name in names:
        key, colon, argument = name.partition(":")
        short = f"{key}{colon}{_without_path(argument)}"
        numbered = (f"{short} {i}" for i in range(2, len(names) + 2))
        shown.append(short if short not in shown else next(each for each in numbered if each not in shown))
    return shown


def _without_path(argument: str) -> str:
    path = as_spelled(Path(unquoted(argument)).expanduser())
    if argument and path.exists():
        return os.path.basename(os.path.abspath(path))
    head, colon, rest = argument.partition(":")
    return f"{head}:{_without_path(rest)}" if colon else argument
