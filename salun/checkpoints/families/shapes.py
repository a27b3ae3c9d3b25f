"""Counting in tensors' names and shapes, by which the configs of a single file's parts are made."""

from __future__ import annotations

import re
from collections.abc import Iterable

from salun.checkpoints.families.family import Shapes
from salun.checkpoints.safetensors_io import truncated
from salun.errors import ModelError


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers, from 0 on, the pattern finds at the beginning of names; `{}` in it stands for the number.

    Raises ValueError if one is missing in between. (Names are untrusted: what is built is as large as their number.)
    """
    numbered = re.compile(pattern.replace("{}", r"(\d{1,4})"))
    numbers = {int(match[1]) for name in names if (match := numbered.match(name))}
    gap = next((number for number in range(len(numbers)) if number not in numbers), None)
    if gap is not None:
        raise ValueError("no " + pattern.replace("{}", str(gap)).replace("\\", "") + "*")
    return len(numbers)


def check_not_empty(shapes: Shapes, part: str) -> None:
    """Raises ModelError for a tensor without entries: it takes no bytes, but its other sizes may be anything."""
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise ModelError(f"the {part}'s {truncated(empty)} has no entries: it is damaged")
