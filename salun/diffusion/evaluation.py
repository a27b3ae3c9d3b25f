"""What a model shows and says on held-out prompts: looked at before and after, compared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.plan import Plan, spread
from salun.diffusion.prompts.vocabulary import Prompt
from salun.evaluation import erasure
from salun.evaluation.detector import AttributeClassifier, load_detector
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator
from salun.runs.cache import Cache

NUM_DRIFT_SAMPLES = 64  # (prompt, noise, t) triples behind anchor_gap and retain_change


@dataclass(frozen=True)
class Evaluation:
    """Pictures of the evaluation prompts, uint8 (n, H, W, 3) each, and the network's answers to the probes.

    forget_answer, anchor_answer, retain_answer: float32 (PROBES, c, h, w), predictions on the same noisy latents under
    the forget, anchor and retain prompts.
    """

    forget: np.ndarray
    retain: np.ndarray
    forget_answer: Tensor
    anchor_answer: Tensor
    retain_answer: Tensor


@dataclass(frozen=True)
class EvalPrompts:
    """The evaluation prompts of a run, in order; pictures i of both sides come from the same seeds before and after.

    each: forget prompts per concept, one concept after the other. anchor[i] belongs to forget[i].
    """

    each: int
    forget: list[Prompt]
    anchor: list[Prompt]
    retain: list[Prompt]
    forget_seeds: list[int]
    retain_seeds: list[int]


def questions(plan: Plan, n: int, seed: int) -> EvalPrompts:
    """n forget questions for each concept and n retain questions, spread evenly over the held-out prompts."""
    prompts = plan.prompts
    ask = [(one, i) for one in prompts.concepts for i in spread(n, len(one.eval_forget), seed)]
    keep = spread(n, len(prompts.eval_retain), seed + 1)
    return EvalPrompts(
        n,
        [one.eval_forget[i] for one, i in ask],
        [one.eval_anchor[i] for one, i in ask],
        [prompts.eval_retain[i] for i in keep],
        [item_seed(seed, "eval", 2 * i) for i in range(len(ask))],
        [item_seed(seed, "eval", 2 * i + 1) for i in range(n)],
    )


def observe(
    model: DiffusionModel,
    asked: EvalPrompts,
    progress: Progress = silent,
    stage: Stage = Stage.EVALUATING,
    cache: Cache | None = None,
) -> Evaluation:
    """Look at the model as it is now. cache: only for a model that holds its files' own weights."""
    texts = [p.text for p in asked.forget] + [p.text for p in asked.retain]
    pictures = sample_images(model, texts, asked.forget_seeds + asked.retain_seeds, progress, stage, cache)
    n = len(asked.forget)
    return Evaluation(
        pictures[:n],
        pictures[n:],
        *(_answers(model, [p.text for p in some], progress) for some in (asked.forget, asked.anchor, asked.retain)),
    )


@torch.no_grad()
def _answers(model: DiffusionModel, texts: list[str], progress: Progress = silent) -> Tensor:
    """Predictions on noise latents at t spread over the upper half of the schedule, where a prompt decides most."""
    timesteps = model.schedule.noisier_half(NUM_DRIFT_SAMPLES)
    texts = [texts[i % len(texts)] for i in range(NUM_DRIFT_SAMPLES)] if texts else []
    said = model.encode(texts) if texts else None
    answers = []
    for start in range(0, len(texts), 8):
        assert said is not None
        part = texts[start : start + 8]
        noise = torch.randn(len(part), *model.latent_shape, generator=step_generator(1, start)).to(model.device)
        t = timesteps[start : start + len(part)].to(model.device)
        x_t = model.schedule.add_noise(torch.zeros_like(noise), noise, t)
        answers.append(model.predict(x_t, t, said[start : start + len(part)]))
        progress(Event(Stage.PROBING, start + len(part), len(texts)))
    return torch.cat(answers).cpu() if answers else torch.empty(0)


def compare(
    model: DiffusionModel, plan: Plan, asked: EvalPrompts, before: Evaluation, after: Evaluation
) -> dict[str, Any]:
    """The metrics of a run: the detector's where the model has one for this concept, and the model's own change.

    A figure that cannot be computed is None, with a `reason`.
    """
    own = prediction_drift(before, after)
    folder = model.settings.detector
    if not asked.forget:
        reason = "no evaluation pictures were asked for"
    elif folder is None or any(prompts.attribute is None for prompts in plan.prompts.concepts):
        reason = f"no detector for {plan.name!r} comes with {model.name}: look at the pictures"
    else:
        detector = load_detector(folder, model.device)
        sides = [erasure.Sides(detector.read(side.forget), detector.read(side.retain)) for side in (before, after)]
        return {**erasure.judge(detector, _asked(detector, plan, asked), sides[0], sides[1]), **own}
    empty: dict[str, Any] = dict.fromkeys(("ua", "ra_before", "ra_after", "per_class"))
    return {**empty, "reason": reason, **own}


def _asked(detector: AttributeClassifier, plan: Plan, asked: EvalPrompts) -> erasure.Asked:
    """What the pictures should show, in the detector's own numbers."""
    targets = []
    for i, (concept, prompts) in enumerate(zip(plan.concepts, plan.prompts.concepts, strict=True)):
        assert prompts.attribute is not None and prompts.value is not None
        values = detector.attributes.get(prompts.attribute, [])
        anchor = values.index(prompts.anchor_value) if prompts.anchor_value is not None else None
        rows = slice(i * asked.each, (i + 1) * asked.each)
        targets.append(erasure.Target(concept.name, prompts.attribute, values.index(prompts.value), anchor, rows))
    return erasure.Asked(erasure.labels_of(detector, asked.anchor), erasure.labels_of(detector, asked.retain), targets)


def prediction_drift(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """How the predictions moved, which needs no detector.

    anchor_gap: ‖ε_u(c_f) − ε_o(c_a)‖² / ‖ε_o(c_f) − ε_o(c_a)‖², 1 where nothing happened, 0 where the unlearned model
    answers the forget prompts as the original answers the anchor. retain_change: ‖ε_u(c_r) − ε_o(c_r)‖² / ‖ε_o(c_r)‖².
    """
    if not len(before.forget_answer):
        return {"anchor_gap": None, "retain_change": None}
    apart = (before.forget_answer - before.anchor_answer).square().sum()
    left = (after.forget_answer - before.anchor_answer).square().sum()
    moved = (after.retain_answer - before.retain_answer).square().sum() / before.retain_answer.square().sum()
    return {"anchor_gap": float(left / apart) if apart > 0 else None, "retain_change": float(moved)}
