"""Diffusion completion (Lu et al. 2025): the original takes the first steps, and the attacked model the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun.errors import ConfigError
from salun.options import Checked, option

if TYPE_CHECKING:
    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class CompletionOptions(Checked):
    """first: steps of the original, at most."""

    steps: int = option(25, "DDIM steps of both models together", minimum=2, maximum=1000)
    first: int = option(3, "steps that the original takes, at most", minimum=1, maximum=999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first >= self.steps:
            raise ConfigError(
                f"is {self.first}, but must be less than the number of steps, {self.steps}", option="first"
            )


def cost(options: CompletionOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return options.first * n * replace(sampling, steps=options.steps).passes


def completion(task: AttackTask, options: CompletionOptions) -> AttackResult:
    """Sample the original for 1, 2, … `first` DDIM steps, and then the attacked model under the same prompt."""
    from salun.diffusion.attacks.task import AttackResult, Best
    from salun.diffusion.attacks.trajectory import starting_noise, trajectory_of

    best, x = Best(len(task)), starting_noise(task.original, task.seeds)
    for step in range(1, options.first + 1):
        with task.unerased() as model:
            path = trajectory_of(task, model, model.encode(task.prompts), options.steps)
            x = path.run(x, task.generator(0), step - 1, step)
        with task.victim() as model:
            path = trajectory_of(task, model, task.encode(task.prompts), options.steps)
            latents = path.run(x, task.generator(0), step)
        task.passes += len(task) * path.passes
        best.add(latents, task.shows(latents))
        best.mark(step)
        task.report(step, options.first)
    curve, x_label = best.curve, f"steps of {options.steps} by the original"
    return AttackResult(best.shown, best.latents, options.first, task.passes, curve, x_label)
