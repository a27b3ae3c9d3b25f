"""What each command on diffusion models does, in order, and what it costs: behind progress and time left.

Passes are of one sample through the network; a prediction for the text and one for the empty prompt are two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from salun.detectors import fitting_passes_of, passes_of
from salun.evaluation.calibration import fitting, fitting_passes, fitting_rounds
from salun.methods import load
from salun.progress import Stage, StageCost, merged

if TYPE_CHECKING:
    from salun.diffusion.attack_options import AttackOptions, ChosenAttack
    from salun.diffusion.losses import ErasureData
    from salun.diffusion.options import Sampling
    from salun.diffusion.plan import Plan, Samples
    from salun.diffusion.train_options import ClassTrainOptions

HARDENING = 5  # what the pool adds to a step, in passes of a batch forward and backward, as measured
PROBED, CLOSING = 144, 384  # images that probes of a training take for a concept, with others: on the way, at the end;
# the medians of five runs to a goal in benchmarks/results/until (narrow: red, red → blue, zero-snr: night, circle, red)
FEWEST_STEPS = 8  # of the sampler; a probe takes half of the plan's, but not fewer than these
KNOWN = 48  # images of each kind, at most, on which the detector of the probes is calibrated
OTHERS = 32  # images of other prompts, for the harm at the end of a training; half as many, for the drift, on the way
MORE, MOST_MORE = 2, 1024  # times the retain samples, where a goal needs more; at most
PREDICTED = 64  # predictions behind anchor_gap and retain_change, for each kind of prompt, at most: two for each image
PART = 100  # steps that an attack counts as on average
TRAINED = 3  # passes of a sample in a step of a training: a backward one counts as two
LOOKED = 4  # what a detector that looks at images takes for one, with decoding it, in passes, about


def erasure_stages(
    plan: Plan, data: ErasureData | None = None, images: int = 0, masked: bool = False
) -> list[StageCost]:
    """What an erasure does.

    Args:
        data: The training set, where it is there already; nothing is sampled then.
        images: The user's forget images per concept, in place of samples; 0 for none, or where their number is not
            known yet (`options.forget_images`).
        masked: The mask is there already.
    """
    concepts, recipe = len(plan.concepts), plan.recipe
    forget = _forget_latents(plan, data, images)
    sampled = _sampled(plan, plan.samples(masked), forget, images) if data is None else 0
    anchored = recipe.eval_images * sum(bool(concept.anchor) for concept in plan.concepts)
    return merged(
        [
            StageCost(Stage.SAMPLING, sampled, forward=sampled * plan.sampling.passes),
            *_images(plan, Stage.IMAGES_BEFORE, recipe.eval_images, anchored),
            *([] if masked else _saliency(plan, forget)),
            *_training(plan),
            *_images(plan, Stage.IMAGES_AFTER, recipe.eval_images),
            *_detecting(plan.detector, concepts, recipe.eval_images, anchored),
        ]
    )


def of_probes(sampling: Sampling) -> Sampling:
    """With half of the sampler's steps, but not fewer than `FEWEST_STEPS`: enough to see what images show."""
    return replace(sampling, steps=min(sampling.steps, max(FEWEST_STEPS, sampling.steps // 2)))


def further_samples(plan: Plan) -> int:
    """Samples at most that a training to a goal adds to its training set, where those do not suffice."""
    recipe, forget = plan.recipe, 0
    if plan.method.grows and plan.all_latents is not None and not plan.options.forget_images:
        forget = (plan.all_latents - recipe.forget_latents) * len(plan.concepts)
    return retain_growth(plan) + forget * (2 if recipe.anchor_share else 1)


def retain_growth(plan: Plan) -> int:
    """Retain samples that a training to a goal adds, where other images were harmed."""
    grows = plan.goal is not None and plan.method.grows
    return min(MORE * plan.recipe.retain_latents, MOST_MORE) if grows else 0


def mask_stages(plan: Plan, data: ErasureData | None = None) -> list[StageCost]:
    """What it takes to find the mask alone. data: The training set, where it is there already."""
    forget, needed = _forget_latents(plan, data, 0), plan.by_saliency and data is None
    sampled = forget if needed and not plan.options.forget_images else 0
    sampled += _other_latents(plan, 0) if needed and plan.by_ratio else 0
    sampling = StageCost(Stage.SAMPLING, sampled, forward=sampled * plan.sampling.passes)
    return merged([sampling, *_saliency(plan, forget)])


def evaluation_stages(
    plan: Plan, detectors: Sequence[str], n: int, anchors: int, further: int, compared: bool
) -> list[StageCost]:
    """What an evaluation does.

    Args:
        detectors: Their names.
        n: Images of each concept, and of others.
        anchors: Images of the anchors' prompts, which the original samples.
        further: Images of further sets of prompts.
        compared: Whether there is an original.
    """
    concepts, sides = len(plan.concepts), 2 if compared else 1
    before = _images(plan, Stage.IMAGES_BEFORE, n, anchors + further) if compared else []
    judged: list[StageCost] = []
    for name in detectors:
        if compared:
            judged += _detecting(name, concepts, n, anchors, LOOKED)
        else:
            judged.append(_looks(name, n * (concepts + 1), LOOKED))
    of_sets = [_looks(name, further * sides, LOOKED) for name in detectors]
    return merged([*before, *_images(plan, Stage.IMAGES_AFTER, n, further), *judged, *of_sets])


def attack_stages(plan: Plan, options: AttackOptions, batch_size: int) -> list[StageCost]:
    """What attacks on one model, or also on its original, do.

    Args:
        batch_size: Samples of a training step, the original model's own.
    """
    concepts, passes, n = len(plan.concepts), plan.sampling.passes, options.n
    attacked = concepts * (2 if options.control else 1)
    known, steps = attacked * options.images, attacked * sum(attack_steps(plan, options, batch_size))
    anchors = n * sum(bool(concept.anchor) for concept in plan.concepts)
    made = attacked * sum(attack_passes(plan, each, n, batch_size) for each in options.attacks)
    return merged(
        [
            *_images(plan, Stage.IMAGES_BEFORE, n, anchors),
            *_images(plan, Stage.IMAGES_AFTER, n),
            *_detecting(plan.detector, concepts, n, anchors, LOOKED),
            StageCost(Stage.SAMPLING, known, forward=known * passes),
            StageCost(Stage.ATTACKING, steps, forward=made),
        ]
    )


def attack_steps(plan: Plan, options: AttackOptions, batch_size: int) -> list[int]:
    """Steps that each attack counts as for the progress, by its passes; one at least."""
    passes = [attack_passes(plan, each, options.n, batch_size) for each in options.attacks]
    of_all = PART * len(passes) / max(sum(passes), 1)
    return [max(1, round(of_all * each)) for each in passes]


def attack_passes(plan: Plan, chosen: ChosenAttack, n: int, batch_size: int) -> int:
    """Passes of one attack on n prompts of one concept, at most; where that is not known, of their images."""
    known = chosen.attack.passes(chosen.options, n, plan.sampling, batch_size)
    return n * plan.sampling.passes if known is None else known


def sample_stages(sampling: Sampling, images: int) -> list[StageCost]:
    """What sampling images into a file does."""
    return [StageCost(Stage.SAMPLING, images, forward=images * sampling.passes), StageCost(Stage.SAVING, 1)]


def class_training_stages(
    options: ClassTrainOptions, sampling: Sampling, shown: int, saved: bool = True, judged: int = 0
) -> list[StageCost]:
    """What the training of a class-conditional model does.

    Args:
        options: Resolved.
        shown: Images that are sampled on the way, each time, and at the end.
        saved: Whether the model is written.
        judged: Samples that a classifier judges at the end.
    """
    steps, batch_size = options.steps or 0, options.batch_size or 0
    of_samples = shown * sampling.passes
    on_the_way = steps // options.samples_every * of_samples if options.samples_every else 0
    return merged(
        [
            StageCost(Stage.TRAINING, steps, forward=on_the_way, backward=steps * batch_size),
            StageCost(Stage.SAVING, int(saved)),
            StageCost(Stage.SAMPLING, shown, forward=of_samples),
            *([StageCost(Stage.IMAGES_AFTER, judged, forward=judged * sampling.passes)] if judged else []),
        ]
    )


def _forget_latents(plan: Plan, data: ErasureData | None, images: int) -> int:
    return len(data.forget_latents) if data is not None else (images or plan.recipe.forget_latents) * len(plan.concepts)


def _sampled(plan: Plan, needed: Samples | None, forget: int, images: int) -> int:
    """Latents of a training set that are sampled. forget, images: Of the concepts; the user's images per concept."""
    retain = plan.recipe.retain_latents
    mine = 0 if images or plan.options.forget_images else forget
    others = _other_latents(plan, images)
    return {None: 0, "forget": mine, "anchor": others - retain, "all": mine + others}[needed]


def _other_latents(plan: Plan, images: int) -> int:
    """Anchor and retain latents of a training set. images: The user's forget images per concept, 0 for none."""
    recipe = plan.recipe
    anchors = min(images or recipe.forget_latents, recipe.forget_latents) * len(plan.concepts)
    return (anchors if recipe.anchor_share else 0) + recipe.retain_latents


def _images(plan: Plan, stage: Stage, n: int, more: int = 0) -> list[StageCost]:
    """Images and predictions of a model. n: of each concept, and of others. more: further images."""
    images = n * (len(plan.concepts) + 1) + more
    predictions = 3 * min(PREDICTED, 2 * n * len(plan.concepts))
    return [StageCost(stage, images, forward=images * plan.sampling.passes + predictions)]


def _saliency(plan: Plan, forget: int) -> list[StageCost]:
    if not plan.by_saliency:
        return []
    recipe, parts = plan.recipe, len(plan.concepts) if plan.options.combine == "union" else 1
    batches = parts * recipe.saliency_timesteps * math.ceil(forget // parts / recipe.batch_size)
    of_sample = 3 if plan.by_ratio else 2  # guidance takes two, the retain loss one
    steps = 2 * batches if plan.by_ratio else batches
    return [StageCost(Stage.SALIENCY, steps, backward=forget * recipe.saliency_timesteps * of_sample)]


def _training(plan: Plan) -> list[StageCost]:
    """Those of the method; by default its steps, and before them the frozen targets of as many."""
    if plan.method.stages:
        made: list[StageCost] = load(plan.method.stages)(plan)
        return made if plan.goal is None else _towards_goal(plan, made)
    steps, samples = plan.recipe.steps, plan.recipe.steps * plan.recipe.batch_size * 2
    ahead = samples * 3 // 2 if plan.options.target_guidance else samples if plan.needs_frozen else 0
    pool = plan.recipe.steps * plan.recipe.batch_size * HARDENING if plan.options.harden else 0
    if plan.goal is not None:  # frozen targets are made on the way
        return _towards_goal(plan, [StageCost(Stage.TRAINING, steps, ahead, samples + pool)])
    frozen = [StageCost(Stage.FROZEN_TARGETS, steps, forward=ahead)] if ahead else []
    return [*frozen, StageCost(Stage.TRAINING, steps, backward=samples + pool)]


def _towards_goal(plan: Plan, stages: list[StageCost]) -> list[StageCost]:
    """The stages of a training of the recipe's steps, which are as good a guess as any, with its probes."""
    of_image = len(plan.concepts) * (of_probes(plan.sampling).passes + passes_of(plan.detector))
    probes, closing = PROBED * of_image, CLOSING * of_image
    return _calibration(plan) + [
        replace(each, forward=each.forward + probes, most=plan.budget, closing=closing)
        if each.stage is Stage.TRAINING
        else each
        for each in stages
    ]


def _calibration(plan: Plan) -> list[StageCost]:
    """That of the detector of the probes, on the training set, and other images to compare with."""
    concepts, recipe = len(plan.concepts), plan.recipe
    forget, retain = min(KNOWN, recipe.forget_latents), min(KNOWN, recipe.retain_latents)
    fitting = _fitting(plan.detector, concepts, forget, retain)
    goal = plan.goal if recipe.anchor_share else None
    anchored = sum(bool(each.anchor and goal.anchor_for(each.name)) for each in plan.concepts) if goal else 0
    seen = (concepts + anchored) * forget + retain
    others = OTHERS * (of_probes(plan.sampling).passes + passes_of(plan.detector))
    forward = fitting.forward + seen * passes_of(plan.detector) + others
    return [StageCost(Stage.CALIBRATING, fitting.steps + seen + OTHERS, forward=forward)]


def _detecting(name: str, concepts: int, n: int, anchors: int, looked: int = 0) -> list[StageCost]:
    """What a detector takes for the images of both models, and before that to be fitted on some of the original's.

    Args:
        n: Images of each concept, and of others.
        anchors: Images of the anchors' prompts, of the original alone.
        looked: See `_looks`.
    """
    return [_fitting(name, concepts, n, n + anchors), _looks(name, 2 * n * (concepts + 1) + anchors, looked)]


def _fitting(name: str, concepts: int, n: int, others: int) -> StageCost:
    """The fit of a detector, on some of n images of each concept and of others; its steps are images of its rounds."""
    a, b, each = int(fitting(n).sum()), int(fitting(others).sum()), fitting_passes_of(name)
    if not (a and b and each):
        return StageCost(Stage.CALIBRATING, 0)
    steps, passes = concepts * sum(fitting_rounds(a, b)), concepts * fitting_passes(a, b, each)
    return StageCost(Stage.CALIBRATING, steps, forward=passes)


def _looks(name: str, images: int, looked: int) -> StageCost:
    """looked: Passes that a detector of images takes for one; 0 to leave it out."""
    each = passes_of(name) or looked
    return StageCost(Stage.DETECTING, images if each else 0, forward=images * each)
