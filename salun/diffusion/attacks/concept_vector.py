"""Ring-A-Bell's concept vector without its search: what sets the concept apart in the encodings is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.model.protocol import Conditioning
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class ConceptVectorOptions(Checked):
    """strengths: how many of 1, 2, 3, … are tried."""

    strengths: int = option(3, "strengths η that are tried: 1, 2, 3, …", minimum=1, maximum=100)


def cost(options: ConceptVectorOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return options.strengths * n * sampling.passes


def concept_vector(task: AttackTask, options: ConceptVectorOptions) -> AttackResult:
    """Condition on enc(prompt) + η·v, where v = mean of enc(with the concept) − enc(with the anchor).

    The prompt is the anchor's, so that nothing of it names the concept.
    """
    from salun.diffusion.attacks.task import AttackResult, Best

    best, anchored, v = Best(len(task)), task.encode(task.anchors), vector(task)
    for eta in range(1, options.strengths + 1):
        best.add(*task.attempt(moved(anchored, v, float(eta)), task.seeds))
        best.mark(eta)
        task.report(eta, options.strengths)
    texts = [f"{anchor} + η·v" for anchor in task.anchors]
    return AttackResult(
        best.shown, best.latents, options.strengths, task.passes, best.curve, "strengths η up to", texts=texts
    )


def vector(task: AttackTask) -> Conditioning:
    """v, (1,): the mean difference of the training prompts' encodings and their anchors'."""
    from salun.diffusion.model.protocol import Conditioning

    prompts = task.plan.prompts.concepts[task.concept]
    shows, lacks = (task.encode([prompt.text for prompt in of]) for of in (prompts.forget, prompts.anchor))
    return Conditioning(
        (shows.hidden - lacks.hidden).mean(0, keepdim=True),
        {name: (value - lacks.extra[name]).mean(0, keepdim=True) for name, value in shows.extra.items()},
    )


def moved(conditioning: Conditioning, v: Conditioning, strength: float) -> Conditioning:
    """enc + η·v of n conditionings."""
    from salun.diffusion.model.protocol import Conditioning

    return Conditioning(
        conditioning.hidden + strength * v.hidden,
        {name: value + strength * v.extra[name] for name, value in conditioning.extra.items()},
    )
