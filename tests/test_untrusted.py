"""JSON and YAML from untrusted files: what is read, and what is rejected in one line, soon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from salun.untrusted import DEPTH, parse_json, parse_yaml, read_json, read_yaml


def test_read_json_gives_what_json_gives(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, True, "é🙂"], "b": {"c": -(2**63)}}
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == values


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 60 + "]" * 60, '{"a":' * 60 + "1" + "}" * 60], ids=len)
def test_read_json_rejects_deep_nesting(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"nested more than {DEPTH} deep"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1" * 5_000, "beyond 64 bits"),
        (str(2**64), "beyond 64 bits"),
        (r'"\ud800"', "not Unicode"),
        ("{", "Expecting"),
        (b"\xff\xfe\xfd", "decode"),
    ],
)
def test_read_json_rejects_in_one_line(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_read_json_reads_no_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + "1," * 1000 + "1]", encoding="utf-8")
    assert len(read_json(path)) == 1001
    with pytest.raises(ValueError, match="the limit is 100"):
        read_json(path, 100)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_read_json_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path)


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "- " * 20_000, "{a: " * 10_000, "? " * 20_000], ids=lambda text: text[:4]
)
def test_parse_yaml_rejects_deep_nesting_at_once(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"nested more than {DEPTH} deep|valid YAML"):
        parse_yaml(text)
    assert time.monotonic() - began < 2


def test_parse_yaml_takes_no_time_for_many_names(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("".join(f"a{i}:\n" for i in range(20_000)), encoding="utf-8")
    began = time.monotonic()
    assert len(read_yaml(path)) == 20_000
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: &x [1]\nc: *x\n", "aliases"),
        ("a: 1\na: 2\n", "a is given twice"),
        ("a: [1\n", r"valid YAML \(line 2\)"),
        ("a: 2024-01-01\n", "holds a date"),
        ("a: 0x" + "f" * 9_000, "beyond 64 bits"),
        ("a: " + "1" * 9_000, "a number that is too long"),
        ("a: !!python/object:os.system x\n", r"valid YAML \(line 1\)"),
    ],
)
def test_parse_yaml_rejects_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_parse_yaml_reads_numbers_as_people_write_them() -> None:
    assert parse_yaml("lr: 1e-4\nsteps: 10\n") == {"lr": 1e-4, "steps": 10}
    assert parse_yaml("") is None
