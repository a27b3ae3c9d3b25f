"""In-context probing (Lu et al. 2025): the attacked model fills the center of an image of the concept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class InpaintOptions(Checked):
    """side: of the hole."""

    steps: int = option(25, "DDIM steps", minimum=2, maximum=1000)
    side: float = option(0.75, "side of the hole in the center, as a fraction of the image's", above=0, maximum=1)


def cost(options: InpaintOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts, with those of the original under the anchors' prompts."""
    return 2 * n * replace(sampling, steps=options.steps).passes


def inpaint(task: AttackTask, options: InpaintOptions) -> AttackResult:
    """Sample with everything outside a hole held to the original's image, in each step's prediction of x_0.

    The prompt is the concept's. An image may show the concept by what was left of it around the hole: compare with
    `asr_of_anchor` in `facts`, where the original fills the hole under the anchor's prompt.
    """
    from salun.diffusion.attacks.task import AttackResult
    from salun.diffusion.attacks.trajectory import starting_noise, trajectory_of

    held = {"known": task.latents, "hole": _hole(task.latents, options.side)}
    with task.victim() as model:
        path = trajectory_of(task, model, task.encode(task.prompts), options.steps, **held)
        latents = path.run(starting_noise(model, task.seeds), task.generator(0))
    task.report(1, 2)
    with task.unerased() as model:
        other = trajectory_of(task, model, model.encode(task.anchors), options.steps, **held)
        of_anchor = task.shows(other.run(starting_noise(model, task.seeds), task.generator(0)))
    task.report(2, 2)
    facts = {"asr_of_anchor": 100 * float(of_anchor.mean())}
    return AttackResult(task.shows(latents), latents, 1, len(task) * path.passes, facts=facts)


def _hole(latents: Tensor, side: float) -> Tensor:
    """bool (1, 1, h, w), True in the center."""
    import torch

    height, width = latents.shape[-2:]
    tall, wide = (max(1, round(side * length)) for length in (height, width))
    hole = torch.zeros(1, 1, height, width, dtype=torch.bool)
    top, left = (height - tall) // 2, (width - wide) // 2
    hole[..., top : top + tall, left : left + wide] = True
    return hole
