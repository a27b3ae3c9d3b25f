"""Concept inversion (Pham et al. 2024): new tokens are learned in the attacked model from images of the concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling

LOOKS = 2  # at images on the way, of which the best counts


@dataclass(frozen=True)
class InversionOptions(Checked):
    """A textual inversion."""

    steps: int = option(100, "optimization steps of each start", minimum=1, maximum=1_000_000)
    length: int = option(1, "tokens that stand for the concept", minimum=1, maximum=64)
    lr: float = option(0.02, "learning rate", above=0, maximum=10)
    start: str = option("both", "tokens to start from", choices=("both", "concept", "anchor"))


def cost(options: InversionOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    from salun.diffusion.stages import TRAINED

    starts = 2 if options.start == "both" else 1
    return starts * (options.steps * batch_size * TRAINED + LOOKS * n * sampling.passes) + n * sampling.passes


def inversion(task: AttackTask, options: InversionOptions) -> AttackResult:
    """Learn vectors v* = argmin MSE(ε, ε_θ(x_t, t, prompt with v* for the concept)), and prompt with them.

    Which start and step counts is decided on images of other seeds than those that are reported.
    """
    from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult

    subject = task.plan.subjects[task.concept]
    names = {"concept": subject.phrase or subject.name, "anchor": subject.anchor_phrase}
    starts = list(names) if options.start == "both" else [options.start]
    tried: list[tuple[float, list[Tensor], str]] = []
    curve: list[tuple[float | str, float]] = []
    for number, start in enumerate(starts):
        for steps, rate, vectors in _learned(task, options, names[start]):
            tried.append((rate, vectors, start))
            curve.append((number * options.steps + steps, max(each[0] for each in tried)))
            task.report(len(tried), LOOKS * len(starts))
    _, vectors, best = max(tried, key=lambda each: each[0])
    rows = _rows(task, task.prompts, options.length)
    latents, shown = task.attempt(task.tokens.encode_tokens(rows, vectors), task.seeds)
    texts = [" ".join("*" if token < 0 else task.tokens.text_of([token]) for token in row) for row in rows]
    prompts = AdversarialPrompts(rows, list(task.seeds), [vector.cpu() for vector in vectors], texts)
    facts = {"batch_size": task.batch_size, "start": best}
    counted = f"steps from the {' and then the '.join(starts)}, the best so far, on other seeds"
    return AttackResult(shown, latents, 1, task.passes, curve, counted, prompts, facts)


def _rows(task: AttackTask, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Each prompt's tokens, with slots in place of the concept."""
    from salun.diffusion.attacks.soft_tokens import phrases_of, replaced

    phrases, slots = phrases_of(task.plan, task.concept, task.tokens), [-1 - j for j in range(length)]
    return [replaced(task.tokens.tokens(prompt), phrases, slots) for prompt in prompts]


def _learned(task: AttackTask, options: InversionOptions, start: str) -> list[tuple[int, float, list[Tensor]]]:
    """(steps, how often the concept shows on other seeds, vectors) at each look."""
    import torch

    from salun.diffusion.attacks.soft_tokens import learn, vectors_of
    from salun.diffusion.data.latents import item_seed
    from salun.diffusion.model.protocol import Conditioning

    vectors = [vector.requires_grad_(True) for vector in vectors_of(task, start, options.length)]
    rows = _rows(task, task.known.prompts, options.length)

    def conditioning(chosen: Tensor) -> Conditioning:
        return task.tokens.encode_tokens([rows[i] for i in chosen.tolist()], vectors)

    looks, optimizer, done = [], None, 0
    seeds = [item_seed(task.seed, "probe", i) for i in range(len(task))]
    for look in range(1, LOOKS + 1):
        steps = max(options.steps * look // LOOKS, 1)
        with task.victim() as model, task.tokens.encoding():
            optimizer = learn(task, model, vectors, conditioning, range(done, steps), options.lr, optimizer)
            done = steps
            with torch.no_grad():
                attacking = task.tokens.encode_tokens(_rows(task, task.prompts, options.length), vectors)
        _, shown = task.attempt(attacking, seeds)
        looks.append((steps, float(shown.mean()), [vector.detach().clone() for vector in vectors]))
    return looks
