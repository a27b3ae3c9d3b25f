"""A run.json is untrusted input: it is read in bounded size, depth and time, and whatever is wrong is one error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from salun.errors import ConfigError, DataError
from salun.runs.folder import check_folder
from salun.runs.reading import MAX_BYTES, read_run

SOUND: dict[str, Any] = {"schema": 1, "status": "cancelled", "options": {"model": "shapes", "concept": ["circle"]}}


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return folder


def test_read_run_fills_what_is_missing(tmp_path: Path) -> None:
    found = read_run(written(tmp_path, json.dumps({**SOUND, "metrics": {"ua": float("nan"), "ra": float("inf")}})))
    assert found["options"] == SOUND["options"]
    assert (found["outputs"], found["mask"], found["error"]) == ([], None, None)
    assert found["metrics"] == {"ua": None, "ra": None}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"options": {"model": "a\0b"}}, "NUL"),
        ({"options": {"model": "a\ud800b"}}, "surrogate"),
        ({"options": {"model": 7}}, r"options\.model is 7, but must be a text or null"),
        ({"options": {"concept": "circle"}}, r"options\.concept"),
        ({"options": []}, "options is"),
        ({"schema": 2}, "schema is 2"),
        ({"status": ["done"]}, r"status \["),
        ({"seed": True}, "seed is true"),
        ({"seed": 10**30}, "an integer of 31 digits"),
        ({"outputs": [{"kind": "delta", "path": 3}]}, "a file's path is 3"),
        ({"timings": {"training": None}}, r"timings\.training is null"),
        ({"mask": 3}, "mask is 3"),
    ],
    ids=str,
)
def test_read_run_rejects_wrong_values(wrong: dict[str, Any], named: str, tmp_path: Path) -> None:
    written(tmp_path, json.dumps({**SOUND, **wrong}))
    with pytest.raises(DataError, match=named):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=named):
        check_folder(tmp_path, resume=True)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"0" * 5_000,
     b'{"x": "' + b"x" * MAX_BYTES + b'"}'],
    ids=["empty", "bytes", "list", "null", "unclosed", "nested", "digits", "large"],
)  # fmt: skip
def test_read_run_rejects_other_files(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a valid record of a run"):
        read_run(written(tmp_path, content))


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFO among files there")
def test_read_run_does_not_wait_for_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(DataError, match="not a regular file"):
        read_run(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        read_run(tmp_path)


def test_read_run_names_a_folder_without_a_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"there is no run\.json in it"):
            read_run(place)
