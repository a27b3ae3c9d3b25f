"""The wheel: nothing of a generic name in site-packages, everything needed inside, and it runs from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from salun.extras import PACKAGES, install_command

ROOT = Path(__file__).resolve().parents[1]
CODE = ("salun", "cli", "comfy_nodes", "extension", "scripts", "locales")
OF_DEVELOPERS = {"docs", "browser", "dev"}  # no message names them


def test_packages_of_the_extras_are_those_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: tuple(packages) for name, packages in project["optional-dependencies"].items()}
    assert {name: packages for name, packages in extras.items() if name not in OF_DEVELOPERS} == PACKAGES


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("fid",), 'pip install "torch-fidelity>=0.4" (the extra fid)'),
        (("nudenet",), 'pip install "nudenet==3.0.8" "onnxruntime>=1.19" (the extra nudenet)'),
        (("nudenet", "onnxruntime"), 'pip install "onnxruntime>=1.19" (the extra nudenet)'),
    ],
)
def test_install_command_names_the_packages_and_the_extra(arguments: tuple[str, ...], command: str) -> None:
    assert install_command(*arguments) == command


def test_no_message_installs_salun_from_a_package_index() -> None:
    """None has it, so that `pip install salun[ui]` would fail, or install what another person has put there."""
    files = [file for folder in CODE for file in ROOT.glob(f"{folder}/**/*") if file.suffix in {".py", ".js", ".json"}]
    assert len(files) > 300
    wrong = re.compile(r"salun\[|pip install ['\"]?salun")
    assert [file.name for file in files if wrong.search(file.read_text(encoding="utf-8"))] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what git knows, so that leftovers of other builds cannot slip in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    return next(target.glob("*.whl"))


@pytest.mark.slow
def test_only_our_names_land_in_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"salun", "salun_cli", "salun_webui_extension", "salun-0.1.0.dist-info"}
    for needed in (
        "salun/py.typed",
        "salun/assets/concepts.yaml",
        "salun/assets/models.yaml",
        "salun/assets/shapes/salun.yaml",
        "salun/assets/shapes/README.md",
        "salun/assets/shapes/unet/diffusion_pytorch_model.safetensors",
        "salun/assets/shapes/oracle/detector.safetensors",
        "salun/report/page.html.j2",
        "salun_webui_extension/page.js",
    ):
        assert needed in names


@pytest.mark.slow
def test_no_module_and_no_asset_is_left_behind(wheel: Path) -> None:
    """The packages are listed by hand, so that only three names land: a new one must not be forgotten."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in sorted((ROOT / "salun").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            assert path.relative_to(ROOT).as_posix() in names
    for path in sorted((ROOT / "cli").rglob("*.py")):
        assert f"salun_cli/{path.relative_to(ROOT / 'cli').as_posix()}" in names
    for path in sorted((ROOT / "extension").rglob("*.py")):
        assert f"salun_webui_extension/{path.relative_to(ROOT / 'extension').as_posix()}" in names


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """The environment sees this one's packages (torch is large) through a path file, but not this clone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # installed before the other packages come into sight: pip must not meet an editable salun among them
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (Path(own) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    script = python.with_name("salun.exe" if os.name == "nt" else "salun")

    def salun(*arguments: str, start: tuple[str, ...] = (str(script),)) -> str:
        command = [*start, *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import salun; print(salun.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(own)
    assert "erase" in salun("--help")
    assert "circle" in salun("concepts", "--model", "shapes")
    assert "circle" in salun("concepts", "--model", "shapes", start=(str(python), "-m", "salun"))
    output = salun(
        "erase", "--concept", "circle", "--steps", "2", "--batch-size", "4", "--forget-latents", "4",
        "--retain-latents", "4", "--eval-images", "2", "--sampling-steps", "4",
    )  # fmt: skip
    reports = [line.split(maxsplit=1)[1] for line in output.splitlines() if line.startswith("Report:")]
    assert len(reports) == 1 and Path(reports[0]).is_relative_to(empty) and Path(reports[0]).is_file()
