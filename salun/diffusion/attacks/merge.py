"""Merging: whether a mean with the original, or with another model of its family, brings the concept back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling

FRACTIONS = (0.25, 0.5, 0.75)  # of the other model, for the curve


@dataclass(frozen=True)
class MergeOptions(Checked):
    """fraction: of the other model."""

    fraction: float = option(0.5, "fraction of the other model, by default the original", minimum=0, maximum=1)


def cost(options: MergeOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return len({*FRACTIONS, options.fraction}) * n * sampling.passes


def merge(task: AttackTask, options: MergeOptions) -> AttackResult:
    """θ + s·(θ_other − θ): at s = `fraction` for the result, and at more values for the curve."""
    from salun.diffusion.attacks.task import AttackResult

    weights, other = task.weights(), _other(task)
    conditioning, curve, made = task.encode(task.prompts), [], None
    fractions = sorted({*FRACTIONS, options.fraction})
    for i, fraction in enumerate(fractions, 1):
        mixed = {name: w + fraction * (other[name].to(w) - w) for name, w in weights.items()}
        with task.altered(mixed):
            latents, shown = task.attempt(conditioning, task.seeds)
        curve.append((fraction, float(shown.mean())))
        made = (latents, shown) if fraction == options.fraction else made
        task.report(i, len(fractions))
    assert made is not None
    return AttackResult(made[1], made[0], 1, task.passes, curve, "fraction of the other model")


def _other(task: AttackTask) -> Mapping[str, Tensor]:
    """The other model's tensors. Raises ModelError for one of another family or size."""
    from salun.errors import ModelError

    if not task.argument:
        return task.original.original()
    other, known = task.load(task.argument).original(), task.original.original()
    if set(other) != set(known) or any(tuple(other[name].shape) != tuple(known[name].shape) for name in known):
        raise ModelError(f"{task.argument} cannot be merged with {task.original.name}: their networks differ")
    return other
