"""The import rule: downwards only, and nothing heavy or host-specific where it does not belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each layer may import itself and the layers before it
LAYERS = [
    {
        "salun.errors",
        "salun.extras",
        "salun.version",
        "salun.progress",
        "salun.time_left",
        "salun.display",
        "salun.untrusted",
    },
    {"salun.user_text", "salun.options", "salun.images", "salun.files", "salun.compute", "salun.masking.threshold"},
    {
        "salun.attacks",
        "salun.methods",
        "salun.detectors",
        "salun.image_metrics",
        "salun.diffusion.goal",
        "salun.diffusion.options",
        "salun.diffusion.attack_options",
        "salun.diffusion.eval_options",
        "salun.diffusion.train_options",
    },
    {"salun.randomness"},
    {"salun.config", "salun.checkpoints.signature", "salun.checkpoints.safetensors_io", "salun.checkpoints.keymap"},
    {"salun.masking.mask", "salun.runs"},
    {"salun.checkpoints"},
    {"salun.masking"},
    {"salun.delta.xor", "salun.delta.provenance", "salun.delta.stacking"},
    {"salun.delta.delta", "salun.delta.stock_formats"},
    {"salun.evaluation", "salun.report"},
    {"salun.diffusion.prompts", "salun.diffusion.model"},
    {"salun.diffusion", "salun.classification", "salun.evaluation.detectors.self_classifier"},
    {"salun.evaluation.detectors.class_classifier"},
    {"salun.delta", "salun.diagnostics"},
]
HEAVY = {"diffusers", "transformers", "accelerate", "typer", "rich", "gradio", "comfy", "huggingface_hub", "jinja2"}
HEAVY |= {"sklearn", "scipy", "datasets", "timm", "onnxruntime", "torch_fidelity", "torchvision"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """The layer of the longest name in LAYERS that holds a module; None for modules of others."""
    fitting = [
        (len(member), level)
        for level, members in enumerate(LAYERS)
        for member in members
        if module == member or module.startswith(member + ".")
    ]
    return max(fitting)[1] if fitting else None


def nodes(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    """All nodes, or those that run when the file is imported: outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if everywhere or not (later or typing_only):
            yield node
            yield from nodes(node, everywhere)


def imports(text: str, package: str, everywhere: bool) -> set[str]:
    """Absolute names of the modules that a file of `package` imports, relative ones resolved."""
    found = set()
    for node in nodes(ast.parse(text), everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    return found


def imports_of(path: Path, everywhere: bool) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    return imports(path.read_text(encoding="utf-8"), package, everywhere)


FILES = sorted((ROOT / "salun").rglob("*.py"))
# packages without logic; `from package import module` names them too
EMPTY = {module_of(p) for p in FILES if p.name in ("__init__.py", "__main__.py")}
HOSTS = {"cli": "salun_cli", "comfy_nodes": "comfy_nodes", "extension": "extension"}


def test_the_rule_sees_relative_nested_and_typing_imports() -> None:
    text = """
from __future__ import annotations
from . import options
from ..mask import Mask
if TYPE_CHECKING:
    import diffusers
try:
    import rich
except ImportError:
    pass
def later():
    import typer
"""
    at_import = imports(text, "salun.diffusion", everywhere=False)
    assert {"salun.diffusion.options", "salun.mask", "salun.mask.Mask", "rich"} <= at_import
    assert not {"diffusers", "typer"} & at_import
    assert {"diffusers", "typer"} <= imports(text, "salun.diffusion", everywhere=True)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downwards(path: Path) -> None:
    module = module_of(path)
    level = layer_of(module)
    if module in EMPTY:
        return
    assert level is not None, f"{module} has no place in LAYERS"
    for name in imports_of(path, everywhere=True):
        assert name.split(".")[0] not in {*HOSTS, *HOSTS.values()}, f"{module} imports the host {name}"
        other = layer_of(name) if name not in EMPTY else None
        assert other is None or other <= level, f"{module} imports {name}"


def test_imports_form_no_circle() -> None:
    """Modules can be sorted so that each imports only those before it, imports inside functions included."""
    modules = {module_of(path): path for path in FILES if module_of(path) not in EMPTY}
    needs = {name: imports_of(path, everywhere=True) & modules.keys() - {name} for name, path in modules.items()}
    while free := {name for name, found in needs.items() if not found & needs.keys()}:
        needs = {name: found for name, found in needs.items() if name not in free}
    assert not needs, f"these modules import each other in a circle: {sorted(needs)}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_packages_are_imported_where_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path, everywhere=False)} & HEAVY


@pytest.mark.parametrize("host", HOSTS)
def test_no_host_knows_another(host: str) -> None:
    others = {*HOSTS, *HOSTS.values()} - {host, HOSTS[host]}
    for path in sorted((ROOT / host).rglob("*.py")):
        assert not {name.split(".")[0] for name in imports_of(path, everywhere=True)} & others, path


def test_core_losses_and_formats_work_without_diffusers_and_friends() -> None:
    """As inside ComfyUI, which has none of them: the imports are blocked, then a mask, a delta and a step are made."""
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "accelerate", "typer", "transformers", "rich", "huggingface_hub"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import importlib, pkgutil, torch, salun, salun.checkpoints, salun.delta
import salun.masking.mask, salun.masking.saliency, salun.masking.optim, salun.masking.training
import salun.diagnostics.inspect, salun.diffusion.losses, salun.diffusion.prompts.concepts, salun.diffusion.erase
for package in (salun.checkpoints, salun.delta):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
layer = torch.nn.Linear(4, 2)
mask = salun.saliency_mask(layer, [(layer(torch.ones(3, 4)).square().mean(), 3)], 0.5)
before = {n: p.detach().clone() for n, p in layer.named_parameters()}
from salun.masking.training import TrainingSettings, constant, train
train(dict(layer.named_parameters()), mask, lambda s: {"a": layer(torch.ones(1, 4)).sum(), "b": layer.bias.sum()},
      TrainingSettings(2, constant(0.1), torch.optim.Adam))
after = {n: p.detach() for n, p in layer.named_parameters()}
assert salun.Delta.between(before, after).changed == mask.selected == 5
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
