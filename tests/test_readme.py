"""The README is true: its two commands are one line each, and its Python runs and erases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.S | re.M)


def test_the_first_two_shell_blocks_are_one_line_each() -> None:
    main, tests = blocks("sh")[:2]
    assert len(main.splitlines()) == len(tests.splitlines()) == 1
    assert main.strip().endswith("salun erase --concept circle --model shapes")
    assert tests.strip().endswith("pytest -q -n 2 --dist loadfile")


def test_the_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_python_example_runs_and_the_default_recipe_erases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's ten lines, in an empty folder, at full length."""
    (program,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)  # our own text
    assert {p.name for p in tmp_path.iterdir()} == {"erased.safetensors", "circle.salun.safetensors", "report.html"}
    metrics = names["run"].metrics
    # 96 pictures of each kind: where 98 % is true, fewer than 91 % would be a 1 in 10,000 draw
    assert metrics["ua"]["value"] >= 91
    assert metrics["anchor"]["value"] >= 85
    assert metrics["unclassified"]["value"] <= 6
    assert metrics["ra_before"]["value"] - metrics["ra_after"]["value"] <= 5


def test_the_config_file_shown_is_one(tmp_path: Path) -> None:
    from salun.config import read_config

    (tmp_path / "job.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    assert read_config(tmp_path / "job.yaml")["concept"] == ["nudity", "violence"]


def test_every_option_shown_exists() -> None:
    """Options in the README's text and commands that start with `salun erase` or stand by themselves."""
    import dataclasses

    from salun.classification.unlearn_options import CompareOptions, UnlearnOptions
    from salun.diffusion.eval_options import EvalOptions
    from salun.diffusion.options import EraseJob

    kinds = (EraseJob, EvalOptions, CompareOptions, UnlearnOptions)
    known = {"--" + item.name.replace("_", "-") for kind in kinds for item in dataclasses.fields(kind)}
    known |= {"--config", "--dry-run", "--resume", "--force", "--json"}  # of the command itself
    known |= {
        "--delta",
        "--strength",
        "--prompt",
        "--install-completion",
        "--num_processes",
        "--dist",
        "--energy",
        "--base",
    }  # of others
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", TEXT))
    assert shown - known - {"--check"} == set()
