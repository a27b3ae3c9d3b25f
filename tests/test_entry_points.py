"""The clone as ComfyUI node pack and WebUI extension: both entry points work under any folder name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The clone's entry points and core under another name, as in a host's folder."""
    target = tmp_path / "hosts" / "my-own name"
    target.mkdir(parents=True)
    for name in ("__init__.py", "install.py"):
        shutil.copy(ROOT / name, target / name)
    for name in ("comfy_nodes", "extension", "scripts"):
        shutil.copytree(ROOT / name, target / name)
    shutil.copytree(ROOT / "salun", target / "salun", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return target


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {path!r}, submodule_search_locations=[{folder!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
"""


def run(program: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_comfyui_entry_point_loads_its_own_core(clone: Path, tmp_path: Path) -> None:
    """Without the pack's folder on sys.path, as in ComfyUI; an installed salun is not used instead."""
    program = "import sys, types; sys.modules['comfy'] = types.ModuleType('comfy')"
    program += LOAD.format(path=str(clone / "__init__.py"), folder=str(clone))
    program += "print('SalUnErase' in module.NODE_CLASS_MAPPINGS, module.WEB_DIRECTORY)\n"
    program += "import salun; print(salun.__file__); salun.Mask"
    lines = run(program, tmp_path).splitlines()
    assert lines == ["True ./comfy_nodes/web", str(clone / "salun" / "__init__.py")]


def test_comfyui_entry_point_warns_of_another_salun(clone: Path, tmp_path: Path) -> None:
    program = "import sys, types; sys.modules['comfy'] = types.ModuleType('comfy'); import salun"
    program += LOAD.format(path=str(clone / "__init__.py"), folder=str(clone))
    output = run(program, ROOT)
    assert str(ROOT / "salun") in output
    assert str(clone / "salun") in output


def test_webui_entry_point_runs_twice_under_a_unique_module_name(clone: Path, tmp_path: Path) -> None:
    """ "Reload UI" runs the script again; another extension's `extension` package must not be taken for ours."""
    script = clone / "scripts" / "salun_webui.py"
    program = "import sys, types, runpy; sys.modules['extension'] = types.ModuleType('extension')\n"
    program += f"for _ in range(2): runpy.run_path({str(script)!r})\n"
    program += "print(sys.modules['salun_webui_extension'].__file__)"
    assert run(program, tmp_path).strip() == str(clone / "extension" / "__init__.py")


def test_core_that_fails_to_load_is_not_left_in_sys_modules(clone: Path, tmp_path: Path) -> None:
    (clone / "salun" / "__init__.py").write_text("raise RuntimeError('broken core')", encoding="utf-8")
    program = "import sys, types; sys.modules['comfy'] = types.ModuleType('comfy')\ntry:\n"
    program += textwrap.indent(LOAD.format(path=str(clone / "__init__.py"), folder=str(clone)), "    ")
    program += "\nexcept RuntimeError as error: print(error, 'salun' in sys.modules)"
    assert run(program, tmp_path).strip() == "broken core False"


def test_python_m_salun_runs_the_clones_command_line(clone: Path, tmp_path: Path) -> None:
    """Also where another copy is installed: one copy's core never runs under the other's commands."""
    shutil.copytree(ROOT / "cli", clone / "cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", clone)
    elsewhere = tmp_path / "installed" / "salun_cli"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("", encoding="utf-8")
    (elsewhere / "main.py").write_text("def main(): print('the other copy')", encoding="utf-8")
    program = f"import runpy, sys; sys.path[:0] = [{str(clone)!r}, {str(elsewhere.parent)!r}]\n"
    program += "sys.argv = ['salun', '--version']\ntry: runpy.run_module('salun', run_name='__main__')\n"
    program += "except SystemExit: print(sys.modules['salun_cli'].__file__)"
    assert run(program, tmp_path).splitlines()[-1] == str(clone / "cli" / "__init__.py")
    (clone / "pyproject.toml").unlink()  # in site-packages a neighbour named `cli` belongs to another project
    assert run(program, tmp_path).splitlines() == ["the other copy"]


def test_installer_changes_nothing(clone: Path, tmp_path: Path) -> None:
    """As a host runs it: a child process in the host's folder."""

    def state() -> list[object]:
        packages = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
        return [packages, sorted((str(p), p.read_bytes()) for p in clone.rglob("*") if p.is_file())]

    before = state()
    for _ in range(2):
        command = [sys.executable, str(clone / "install.py")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout + done.stderr == ""
        assert state() == before


def test_installer_names_missing_packages(clone: Path, tmp_path: Path) -> None:
    blocked = "import sys, runpy; sys.modules['yaml'] = None\n"
    blocked += "import importlib.util as u; find = u.find_spec\n"
    blocked += "u.find_spec = lambda n, *a: None if n == 'yaml' else find(n, *a)\n"
    output = run(blocked + f"runpy.run_path({str(clone / 'install.py')!r}, run_name='__main__')", tmp_path)
    assert "has no pyyaml" in output
    assert "Nothing was installed" in output
