"""The import rule: downwards only, and nothing heavy or host-specific where it does not belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each layer may import itself and the layers before it
LAYERS = [
    {"salun.errors", "salun.progress"},
    {"salun.options", "salun.device", "salun.processes", "salun.threshold"},
    {"salun.formats.tensorfile"},
    {"salun.formats.hashing", "salun.mask", "salun.run_record"},
    {"salun.formats.delta", "salun.saliency", "salun.optim"},
    {"salun.training", "salun.evaluation", "salun.report"},
    {"salun.diffusion"},
    {"salun.inspection"},
]
HEAVY = {"diffusers", "transformers", "accelerate", "typer", "rich", "gradio", "comfy", "huggingface_hub", "jinja2"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    for level, members in enumerate(LAYERS):
        if any(module == member or module.startswith(member + ".") for member in members):
            return level
    return None


def imports(path: Path, everywhere: bool) -> set[str]:
    """Modules a file imports: everywhere in it, or at its top level only (not under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = sorted((ROOT / "salun").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downwards(path: Path) -> None:
    module = module_of(path)
    level = layer_of(module)
    if module in ("salun", "salun.__main__", "salun.formats"):
        return  # doors: they hold no logic
    assert level is not None, f"{module} has no place in LAYERS"
    for name in imports(path, everywhere=True):
        assert name.split(".")[0] not in ("cli", "salun_cli", "comfy_nodes", "extension"), name
        other = layer_of(name)
        assert other is None or other <= level, f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_packages_are_imported_where_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & HEAVY


def test_core_losses_and_formats_work_without_diffusers_and_friends() -> None:
    """As inside ComfyUI, which has none of them: the imports are blocked, then a mask, a delta and a step are made."""
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "accelerate", "typer", "transformers", "rich", "huggingface_hub"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch, salun
import salun.inspection, salun.diffusion.losses, salun.diffusion.concepts, salun.diffusion.erase
layer = torch.nn.Linear(4, 2)
mask = salun.saliency_mask(layer, [(layer(torch.ones(3, 4)).square().mean(), 3)], 0.5)
before = {n: p.detach().clone() for n, p in layer.named_parameters()}
from salun.training import TrainingSettings, fine_tune
fine_tune(dict(layer.named_parameters()), mask, lambda s: (layer(torch.ones(1, 4)).sum(), layer.bias.sum()),
          TrainingSettings(2, 0.1, 1.0))
after = {n: p.detach() for n, p in layer.named_parameters()}
assert salun.Delta.between(before, after).changed == mask.selected == 5
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
