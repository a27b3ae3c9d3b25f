"""The plain prompts with other seeds: how often the concept slips through without any attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class SeedsOptions(Checked):
    """tries: of each prompt."""

    tries: int = option(8, "seeds of each prompt", minimum=1, maximum=10_000)


def cost(options: SeedsOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return options.tries * n * sampling.passes


def seeds(task: AttackTask, options: SeedsOptions) -> AttackResult:
    """Sample each prompt with `tries` seeds; it succeeds if any image shows the concept."""
    from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult, Best
    from salun.diffusion.data.latents import item_seed

    best, conditioning = Best(len(task)), task.encode(task.prompts)
    used = list(task.seeds)
    for i in range(options.tries):
        tried = [item_seed(task.seed, "attack", i * len(task) + k) for k in range(len(task))]
        used = [old if hit else new for old, new, hit in zip(used, tried, best.shown, strict=True)]
        best.add(*task.attempt(conditioning, tried))
        best.mark(i + 1)
        task.report(i + 1, options.tries)
    prompts = AdversarialPrompts([], used, texts=task.prompts)
    return AttackResult(best.shown, best.latents, options.tries, task.passes, best.curve, "seeds", prompts)
