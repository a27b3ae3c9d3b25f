"""Results of benchmarks in files, so that an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stored(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; measured, written and printed first where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(found), flush=True)
    return found
