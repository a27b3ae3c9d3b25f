"""README and docs are true: commands are one line each, Python runs and erases, links, options and pages exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.strip().lower())) for title in titles}


def test_the_first_two_shell_blocks_are_one_line_each() -> None:
    main, tests = blocks("sh")[:2]
    assert len(main.splitlines()) == len(tests.splitlines()) == 1
    assert main.strip().endswith("salun erase --concept circle --model shapes")
    assert tests.strip().endswith("pytest -q -n 2 --dist loadfile")


def test_places_that_wait_for_the_public_address_are_listed() -> None:
    """CONTRIBUTING.md names each, and each says that there is no address yet."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The public address")[2]
    section = guide.partition("\n## ")[0]
    waiting = {
        page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
        for page in PAGES
        if page.name != "CONTRIBUTING.md" and re.search(r"\bREPO\b", page.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"`([\w/-]+\.md)`", section)) == set(waiting)
    assert [page for page, text in waiting.items() if not re.search(r"public\s+(address )?yet", text)] == []
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    empty = re.findall(r'^(\w+) = ""', project, re.M)
    assert empty == ["PublisherId", "Icon"] and "\n[project.urls]" not in project
    assert all(f"`{name}`" in section for name in [*empty, "[project.urls]"])


def test_links_of_readme_and_docs_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (heading and heading not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_every_page_and_image_of_the_docs_can_be_reached() -> None:
    import yaml

    class Site(yaml.SafeLoader):
        """Tags of MkDocs are of no interest here."""

    Site.add_multi_constructor("!", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Site)
    listed = set(re.findall(r"[\w/.-]+\.md", repr(config["nav"])))
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md") if not page.match("decisions/0*")}
    assert listed == pages, "nav of mkdocs.yml"
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [image.name for image in docs.glob("*.*g") if image.name not in text] == []


def test_every_page_of_results_begins_with_what_it_shows() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8").split("## Results")[1]
    pages = set(re.findall(r"\(([\w-]+\.md)\)", index)) - {"performance.md"}
    assert len(pages) > 10
    for page in pages:
        title, first, *_ = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n\n")
        assert title.startswith("# ") and first.startswith("**What it shows.** "), page


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """Headings that quote a message: each part between “…” is in a text of the code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    parts = [part.strip() for title in re.findall(r"^### ([^A-Z].*)$", page, re.M) for part in title.split("…")]
    files = (file for folder in ("salun", "cli", "extension", "comfy_nodes") for file in ROOT.glob(f"{folder}/**/*.py"))
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [part for part in parts if part and part not in code] == []


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

    guide = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (tmp_path / "job.yaml").write_text(blocks("yaml", guide)[0], encoding="utf-8")
    assert read_config(tmp_path / "job.yaml")["concept"] == ["nudity", "violence"]


def test_every_option_shown_exists() -> None:
    """Options in the README and in the guide to the command line."""
    import dataclasses

    from salun.classification.unlearn_options import CompareOptions, UnlearnOptions
    from salun.diffusion.eval_options import EvalOptions
    from salun.diffusion.options import EraseJob

    kinds = (EraseJob, EvalOptions, CompareOptions, UnlearnOptions)
    known = {"--" + item.name.replace("_", "-") for kind in kinds for item in dataclasses.fields(kind)}
    known |= {"--config", "--dry-run", "--resume", "--force", "--json", "--debug", "--help"}
    known |= {
        "--browser",
        "--delta",
        "--strength",
        "--prompt",
        "--install-completion",
        "--num_processes",
        "--dist",
        "--energy",
        "--base",
    }  # of others
    text = TEXT + (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
    assert shown - known - {"--check"} == set()
