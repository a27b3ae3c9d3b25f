"""Config files: valid files are read, and errors name the line or the nearest option."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from salun.config import read_config
from salun.diffusion.options import GROUPS, EraseJob
from salun.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("concept: circle\n", {"concept": ["circle"]}),
        ("concept: [circle, red]\nanchor: [square, '']\n", {"concept": ["circle", "red"], "anchor": ["square", ""]}),
        ("lr: 1e-4\nbatch-size: 4\nretain_weight: 2\n", {"lr": 1e-4, "batch_size": 4, "retain_weight": 2}),
        ("\ufeffconcept: Frau Müller\r\nsteps: 5\r\n", {"concept": ["Frau Müller"], "steps": 5}),
        ("show_sensitive: true\nsteps: null\n", {"show_sensitive": True, "steps": None}),
        ("# nothing set\n", {}),
        ("steps: 1e3\nbatch_size: 5.0\n", {"steps": 1000, "batch_size": 5}),
    ],
)
def test_read_config_returns_values(text: str, values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8"))
    read = read_config(path)
    assert read == values
    assert {name: type(value) for name, value in read.items()} == {name: type(v) for name, v in values.items()} or (
        "retain_weight" in values
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "unknown option 'stepz'. Did you mean 'steps'?"),
        ("steps: many", "steps is 'many', but must be an integer"),
        ("steps: 2.5", "steps is 2.5, but must be an integer"),
        ("steps: .inf", "steps is inf"),
        ("steps: .nan", "steps is nan"),
        ("steps: 0", "job.yaml: steps is 0, but must be at least 1"),
        ("density: 2", "job.yaml: density is 2, but must be at most 1"),
        ("concept: 5", "concept is 5, but must be a list of texts"),
        ("concept: no", "concept is False"),  # YAML's no
        ("show_sensitive: 1", "show_sensitive is 1"),
        ("target: moving", "frozen, online"),
        ("- circle", "expected lines like"),
        ("circle", "expected lines like"),
        ("a: &x [1]\nconcept: *x", "aliases"),
        ("steps: 5\nsteps: 6", "steps is given twice"),
        ("batch-size: 5\nbatch_size: 6", "batch_size is given twice"),
        ("concept: 'circle", "is not valid YAML"),
        ("concept: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("resume: true", "unknown option 'resume'"),
    ],
)
def test_read_config_rejects_invalid_text(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert message in str(error.value)
    assert "job.yaml" in str(error.value)


def test_read_config_rejects_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    (tmp_path / "x.yaml").write_bytes(b"concept: \xff\xfe")
    (tmp_path / "big.yaml").write_text("#" * 2_000_000, encoding="utf-8")
    for name, message in (
        ("x.json", "not valid JSON"),
        ("x.yaml", "UTF-8"),
        ("big.yaml", "2,000,000"),
        (".", "cannot be"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path / name)


def test_read_config_of_a_run_json_omits_its_paths(tmp_path: Path) -> None:
    record = {"schema": 1, "options": {"model": "shapes", "concept": ["red"], "steps": 5, "output": ["x/"]}}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_config(tmp_path / "run.json") == {"model": "shapes", "concept": ["red"], "steps": 5}


def test_groups_contain_every_option() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(item.name for item in dataclasses.fields(EraseJob))
