"""Evaluation on held-out prompts: images and predictions of a model, and the metrics of two evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import decode_images, item_seed, lazy_images, sample_latents
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.plan import Plan, spread
from salun.diffusion.prompts.vocabulary import Prompt
from salun.diffusion.stages import PREDICTED
from salun.evaluation.calibration import fitting
from salun.evaluation.detector import (
    Detection,
    Detector,
    DetectorInputs,
    Fitted,
    Samples,
    Subject,
    facts_of,
    load_detector,
)
from salun.evaluation.metric import (
    EvaluationPair,
    ExpectedConcept,
    FittedOn,
    ModelEvaluation,
    Predictions,
    Source,
)
from salun.evaluation.registry import measure
from salun.evaluation.verdict import verdict_on
from salun.progress import Event, Progress, Stage, in_parts, silent
from salun.randomness import step_generator
from salun.runs.cache import Cache

NOTHING = Detection({}, 0.0)
NO_IMAGES = "no evaluation images were requested"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model on the evaluation prompts.

    Args:
        forget, retain: Samples of both kinds of prompts.
        predictions: (k, c, h, w) each, on the same noisy latents under prompts of each kind.
        anchor: Samples of the anchors' prompts, of the original model only.
    """

    forget: Samples
    retain: Samples
    predictions: Predictions
    anchor: Samples | None = None


@dataclass(frozen=True)
class EvalPrompts:
    """The evaluation prompts of a run and the seeds of their images, which are the same before and after.

    Args:
        each: Forget prompts per concept, one concept after the other.
        anchor: The anchor's prompt of each forget prompt.
    """

    each: int
    forget: list[Prompt]
    anchor: list[Prompt]
    retain: list[Prompt]
    forget_seeds: list[int]
    retain_seeds: list[int]

    def rows_of(self, concept: int) -> slice:
        """The forget prompts of a concept, by its number."""
        return slice(concept * self.each, (concept + 1) * self.each)

    @property
    def anchors(self) -> tuple[list[Prompt], list[int]]:
        """The anchors' prompts that are not empty, and their seeds, which are those of the forget images."""
        rows = [i for i, prompt in enumerate(self.anchor) if prompt.text]
        return [self.anchor[i] for i in rows], [self.forget_seeds[i] for i in rows]


def eval_prompts(plan: Plan, n: int, seed: int) -> EvalPrompts:
    """n forget prompts for each concept and n retain prompts, spread evenly over the held-out ones."""
    prompts = plan.prompts
    forget = [(of, i) for of in prompts.concepts for i in spread(n, len(of.eval_forget), seed)]
    retain = spread(n, len(prompts.eval_retain), seed + 1)
    return EvalPrompts(
        n,
        [of.eval_forget[i] for of, i in forget],
        [of.eval_anchor[i] for of, i in forget],
        [prompts.eval_retain[i] for i in retain],
        [item_seed(seed, "eval", 2 * i) for i in range(len(forget))],
        [item_seed(seed, "eval", 2 * i + 1) for i in range(n)],
    )


def evaluate_model(
    model: DiffusionModel,
    prompts: EvalPrompts,
    progress: Progress = silent,
    stage: Stage = Stage.IMAGES_AFTER,
    cache: Cache | None = None,
    weights: str | None = None,
    hold_images: bool = True,
) -> Evaluation:
    """Sample the model as it is now, and predict.

    Args:
        stage: `IMAGES_BEFORE` for the original, which samples anchors too.
        cache, weights: As in `sample_latents`.
        hold_images: Whether all images are decoded now and held; otherwise each when it is read (`lazy_images`).
    """
    anchors = prompts.anchors if stage is Stage.IMAGES_BEFORE else ([], [])
    texts = [*(p.text for p in prompts.forget), *(p.text for p in prompts.retain), *(p.text for p in anchors[0])]
    seeds = [*prompts.forget_seeds, *prompts.retain_seeds, *anchors[1]]
    latents = sample_latents(model, texts, seeds, progress, stage, cache, weights)
    held, images = latents.cpu(), decode_images(model, latents) if hold_images else None
    n, m = len(prompts.forget), len(prompts.forget) + len(prompts.retain)
    forget, retain, anchor = (
        Samples(
            images[rows] if images is not None else lazy_images(model, held[rows]),
            held[rows],
            texts[rows],
            compare_prompts=rows.start == n,
        )
        for rows in (slice(n), slice(n, m), slice(m, None))
    )
    kinds = (prompts.forget, prompts.anchor, prompts.retain)
    count = min(PREDICTED, 2 * len(prompts.forget))  # (prompt, noise, t) triples

    def go_on() -> None:  # a few passes, which count as part of the stage
        progress(Event(stage))

    predictions = Predictions(*(_predict(model, [p.text for p in of], count, go_on) for of in kinds))
    return Evaluation(forget, retain, predictions, anchor if anchors[0] else None)


@torch.no_grad()
def _predict(model: DiffusionModel, texts: list[str], count: int, go_on: Callable[[], None]) -> Tensor:
    """`count` predictions on noise, at t spread over the upper half of the schedule, where a prompt decides most.

    Args:
        go_on: Called after each batch, where a host may cancel.
    """
    timesteps = model.schedule.noisier_half(count)
    texts = [texts[i % len(texts)] for i in range(count)] if texts else []
    conditioning = model.encode(texts) if texts else None
    predictions = []
    for start in range(0, len(texts), 8):
        assert conditioning is not None
        part = texts[start : start + 8]
        noise = torch.randn(len(part), *model.latent_shape, generator=step_generator(1, start)).to(model.device)
        t = timesteps[start : start + len(part)].to(model.device)
        x_t = model.schedule.add_noise(torch.zeros_like(noise), noise, t)
        predictions.append(model.predict(x_t, t, conditioning[start : start + len(part)]))
        go_on()
    return torch.cat(predictions).cpu() if predictions else torch.empty(0)


def compare(
    model: DiffusionModel,
    plan: Plan,
    prompts: EvalPrompts,
    before: Evaluation,
    after: Evaluation,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The metrics of a run, as in `run.json`.

    Args:
        model: With its original weights.
        prompts: The evaluation prompts of both evaluations.

    Raises:
        ConfigError: The plan's detector is not at hand, or cannot detect a concept.
    """
    if not prompts.forget:
        unknown: dict[Source, str] = dict.fromkeys(("detections", "predictions", "latents"), NO_IMAGES)
        none = ModelEvaluation(NOTHING, NOTHING, before.predictions)
        measured = measure(EvaluationPair([], {}, {}, {}, none, none, unknown))
        return _with_verdict({**measured, "cause": "no images"}, plan)
    inputs = DetectorInputs(plan.subjects, model.settings.detector, model, model.device)
    detector = load_detector(plan.detector, inputs)
    return metrics_of(detector, evaluated_pair(detector, plan, prompts, before, after, progress), plan)


def evaluated_pair(
    detector: Detector,
    plan: Plan,
    prompts: EvalPrompts,
    before: Evaluation,
    after: Evaluation,
    progress: Progress = silent,
) -> EvaluationPair:
    """What a detector sees in two evaluations of at least one image each."""
    parts = _parts(before)
    fitted = _fitted(detector, plan, prompts, before, progress) if isinstance(detector, Fitted) else None
    seen = list(_detections(detector, [*parts, *_parts(after)], progress))
    return EvaluationPair(
        _expected_concepts(detector, plan.subjects, prompts),
        detector.labels,
        _expected_labels(detector, prompts.anchor),
        expected_retain(detector, prompts.retain),
        _evaluated(before, seen[: len(parts)]),
        _evaluated(after, seen[len(parts) :]),
        {},
        before.forget.prompts,
        fitted,
    )


def _fitted(detector: Fitted, plan: Plan, prompts: EvalPrompts, before: Evaluation, progress: Progress) -> FittedOn:
    """Fit a detector on some of the original's images of each kind."""
    others = _others(before)
    on = FittedOn(np.tile(fitting(prompts.each), len(plan.subjects)), fitting(len(others)))
    shows = {}
    for i, subject in enumerate(plan.subjects):
        rows = np.zeros(len(on.forget), bool)
        rows[prompts.rows_of(i)] = True
        shows[subject.name] = before.forget[np.flatnonzero(rows & on.forget)]
    detector.fit(shows, others[np.flatnonzero(on.others)], progress)
    return on


def _others(side: Evaluation) -> Samples:
    """Images of other prompts and of the anchors'."""
    if side.anchor is None:
        return side.retain
    return Samples.cat([side.retain, side.anchor])


def metrics_of(detector: Detector, pair: EvaluationPair, erased_by: Plan | None = None) -> dict[str, Any]:
    """The metrics of a pair, as in `run.json`. erased_by: what the erased model was made by, where that is known."""
    return _with_verdict({**measure(pair), "detector": facts_of(detector)}, erased_by)


def metrics_without(detector: Detector, reason: str) -> dict[str, Any]:
    """The metrics where nothing could be measured for want of an original, in the words of `reason`."""
    return _with_verdict({"reason": reason, "cause": "no original", "reasons": {}, "detector": facts_of(detector)})


def _with_verdict(metrics: dict[str, Any], erased_by: Plan | None = None) -> dict[str, Any]:
    if erased_by is not None:
        metrics = metrics | {"method": erased_by.method.name}
        metrics |= {"goal": str(erased_by.goal)} if erased_by.goal is not None else {}
    return {**metrics, "verdict": verdict_on(metrics).as_json()}


def _parts(side: Evaluation) -> list[Samples]:
    return [side.forget, side.retain, *([side.anchor] if side.anchor is not None else [])]


def _evaluated(side: Evaluation, seen: Sequence[Detection]) -> ModelEvaluation:
    """seen: in each of its `_parts`."""
    anchor = seen[2] if len(seen) > 2 else None
    return ModelEvaluation(seen[0], seen[1], side.predictions, anchor, side.retain.latents)


def _detections(detector: Detector, parts: Sequence[Samples], progress: Progress) -> Iterator[Detection]:
    """Of each part; the progress counts all of them."""
    for part, of_part in zip(parts, in_parts(progress, list(map(len, parts))), strict=True):
        yield detector.detect(part, of_part)


def _expected_labels(detector: Detector, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Attribute → the label that each prompt's image should show, int64 (n,), −1 where it names none.

    Without attributes of which prompts name a label that the detector does not know.
    """
    named = {name: {p.labels[name] for p in prompts if name in p.labels} for name in detector.labels}
    return {
        name: np.array([labels.index(p.labels[name]) if name in p.labels else -1 for p in prompts], np.int64)
        for name, labels in detector.labels.items()
        if named[name] and named[name] <= set(labels)
    }


def expected_retain(detector: Detector, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Attribute → the label that each retain prompt's image should show, int64 (n,), −1 where it names none.

    Where the prompts name no label: that each image is as its prompt says, if the detector can decide that.
    """
    expected = _expected_labels(detector, prompts)
    if not expected and detector.prompt_match is not None:
        return {detector.prompt_match: np.zeros(len(prompts), np.int64)}
    return expected


def _expected_concepts(detector: Detector, subjects: Sequence[Subject], prompts: EvalPrompts) -> list[ExpectedConcept]:
    """The concepts in the detector's terms."""
    concepts, anchors = [], 0
    for i, subject in enumerate(subjects):
        target = detector.target(subject)
        assert target is not None
        rows = prompts.rows_of(i)
        count = sum(bool(prompt.text) for prompt in prompts.anchor[rows])
        anchor_rows, anchors = slice(anchors, anchors + count), anchors + count
        concepts.append(ExpectedConcept(subject.name, target.attribute, target.label, target.anchor, rows, anchor_rows))
    return concepts
