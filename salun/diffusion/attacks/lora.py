"""A LoRA on top: whether one that was made for the original, on anything, brings the concept back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class LoraOptions(Checked):
    """strength: of the LoRA."""

    strength: float = option(1.0, "strength of the LoRA", minimum=-10, maximum=10)


def cost(options: LoraOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return n * sampling.passes


def lora(task: AttackTask, options: LoraOptions) -> AttackResult:
    """θ + s·(α/r)·BA of a file in the format of kohya's scripts; its part for the text encoder is not used."""
    from salun.diffusion.attacks.task import AttackResult

    weights = task.weights()
    changes = lora_changes(Path(task.argument).expanduser(), weights, list(task.original.original()))
    with task.altered({name: weights[name] + options.strength * change for name, change in changes.items()}):
        latents, shown = task.attempt(task.encode(task.prompts), task.seeds)
    task.report(1, 1)
    return AttackResult(shown, latents, 1, task.passes, facts={"layers": len(changes)})


def lora_changes(path: Path, weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Parameter → what a LoRA file adds to it at strength 1.

    Args:
        path: Untrusted input.
        weights: All matrices and convolutions of the network by diffusers' names.
        names: Of all its tensors.

    Raises:
        ModelError: The file cannot be read, has no layer of this network, or one of another shape.
    """
    from salun.checkpoints import safetensors_io
    from salun.delta.stock_formats import module_keys
    from salun.errors import ModelError

    keys = {module: name for name, module in module_keys(names).items() if name.endswith(".weight")}
    header = safetensors_io.read_header(path)
    entries = header.entries
    modules = [key.removesuffix(".lora_down.weight") for key in entries if key.endswith(".lora_down.weight")]
    changes = {}
    for module in modules:
        if module not in keys:
            continue
        name = keys[module]
        if f"{module}.lora_up.weight" not in entries:
            raise ModelError(f"{path} has {module}.lora_down.weight, but no lora_up.weight")
        down, up = (entries[f"{module}.{part}.weight"].shape for part in ("lora_down", "lora_up"))
        shape = weights[name].shape
        if len(down) < 2 or len(up) < 2 or (up[0], *down[1:]) != tuple(shape) or up[1] != down[0]:
            raise ModelError(f"{path}: {module} is of another shape than in this network")
        a, b = (
            safetensors_io.read_one(path, header, f"{module}.{part}.weight").float()
            for part in ("lora_down", "lora_up")
        )
        alpha = f"{module}.alpha"
        factor = float(safetensors_io.read_one(path, header, alpha)) / len(a) if alpha in entries else 1.0
        changes[name] = factor * (b.flatten(1) @ a.flatten(1)).view(shape)
    if not changes:
        raise ModelError(f"{path} has no LoRA layer of this network", advice="Name a LoRA of the same family")
    return changes
