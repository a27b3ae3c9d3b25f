"""The clone as ComfyUI node pack and as WebUI extension: both doors open under any folder name, and do no harm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The clone's doors and core under another name, as a host would hold it."""
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


def test_comfyuis_door_loads_the_core_beside_it(clone: Path, tmp_path: Path) -> None:
    """Without the pack's folder on sys.path, as ComfyUI does it; an installed salun is not taken instead."""
    program = "import sys, types; sys.modules['comfy'] = types.ModuleType('comfy')"
    program += LOAD.format(path=str(clone / "__init__.py"), folder=str(clone))
    program += "print(module.NODE_CLASS_MAPPINGS); import salun; print(salun.__file__); salun.Mask"
    lines = run(program, tmp_path).splitlines()
    assert lines == ["{}", str(clone / "salun" / "__init__.py")]


def test_it_says_when_another_salun_is_there_first(clone: Path, tmp_path: Path) -> None:
    program = "import sys, types; sys.modules['comfy'] = types.ModuleType('comfy'); import salun"
    program += LOAD.format(path=str(clone / "__init__.py"), folder=str(clone))
    output = run(program, ROOT)
    assert str(ROOT / "salun") in output
    assert str(clone / "salun") in output


def test_webuis_door_opens_twice_and_takes_a_name_of_its_own(clone: Path, tmp_path: Path) -> None:
    """ "Reload UI" runs the script again; another extension's `extension` package must not be taken for ours."""
    script = clone / "scripts" / "salun_webui.py"
    program = "import sys, types, runpy; sys.modules['extension'] = types.ModuleType('extension')\n"
    program += f"for _ in range(2): runpy.run_path({str(script)!r})\n"
    program += "print(sys.modules['salun_webui_extension'].__file__)"
    assert run(program, tmp_path).strip() == str(clone / "extension" / "__init__.py")


def test_the_installer_installs_nothing_and_says_what_is_missing(clone: Path, tmp_path: Path) -> None:
    assert run(f"import runpy; runpy.run_path({str(clone / 'install.py')!r}, run_name='__main__')", tmp_path) == ""
    blocked = "import sys, runpy; sys.modules['yaml'] = None\n"
    blocked += "import importlib.util as u; find = u.find_spec\n"
    blocked += "u.find_spec = lambda n, *a: None if n == 'yaml' else find(n, *a)\n"
    output = run(blocked + f"runpy.run_path({str(clone / 'install.py')!r}, run_name='__main__')", tmp_path)
    assert "has no yaml" in output
    assert "Nothing was installed" in output
