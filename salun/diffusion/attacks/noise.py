"""Noise-based probing (Lu et al. 2025): more noise in sampling leads off the paths that the erasure was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling

ETAS = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
SCALES = (1.0, 1.02, 1.03, 1.04)


@dataclass(frozen=True)
class NoiseOptions(Checked):
    """scales: how many of `SCALES` are tried with each η."""

    steps: int = option(25, "DDIM steps", minimum=2, maximum=1000)
    scales: int = option(1, "factors of the noise that are tried with each η", minimum=1, maximum=len(SCALES))


def cost(options: NoiseOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return len(ETAS) * options.scales * n * replace(sampling, steps=options.steps).passes


def noise(task: AttackTask, options: NoiseOptions) -> AttackResult:
    """DDIM with η from 1 to 1.85, and its noise up to 4 % larger; a prompt succeeds if any image shows the concept."""
    from salun.diffusion.attacks.task import AttackResult, Best
    from salun.diffusion.attacks.trajectory import starting_noise, trajectory_of

    best = Best(len(task))
    pairs = [(eta, scale) for scale in SCALES[: options.scales] for eta in ETAS]
    for i, (eta, scale) in enumerate(pairs):
        with task.victim() as model:
            path = trajectory_of(task, model, task.encode(task.prompts), options.steps, eta=eta, scale=scale)
            latents = path.run(starting_noise(model, task.seeds), task.generator(i))
        task.passes += len(task) * path.passes
        best.add(latents, task.shows(latents))
        best.mark(f"η {eta:g} × {scale:g}" if options.scales > 1 else f"η {eta:g}")
        task.report(i + 1, len(pairs))
    return AttackResult(best.shown, best.latents, len(pairs), task.passes, best.curve, "noise")
