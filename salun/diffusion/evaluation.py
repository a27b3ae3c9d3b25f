"""Evaluation on held-out prompts: images and predictions of a model, and the metrics of two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.plan import Plan, spread
from salun.diffusion.prompts.concepts import Concept, ConceptPrompts
from salun.diffusion.prompts.vocabulary import Prompt
from salun.evaluation.detector import Detection, Detector, choose_detector, facts_of
from salun.evaluation.estimate import Unknown
from salun.evaluation.metric import EvaluationPair, ExpectedConcept, ModelEvaluation, Predictions, Source
from salun.evaluation.registry import measure
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator
from salun.runs.cache import Cache

NUM_DRIFT_SAMPLES = 64  # (prompt, noise, t) triples behind anchor_gap and retain_change
NOTHING = Detection({}, 0.0)
NO_IMAGES = Unknown("no evaluation images were requested")


@dataclass(frozen=True)
class Evaluation:
    """A model on the evaluation prompts.

    Args:
        forget, retain: Images, uint8 (n, H, W, 3).
        forget_prediction, anchor_prediction, retain_prediction: float32 (NUM_DRIFT_SAMPLES, c, h, w), predictions on
            the same noisy latents under prompts of each kind.
    """

    forget: np.ndarray
    retain: np.ndarray
    forget_prediction: Tensor
    anchor_prediction: Tensor
    retain_prediction: Tensor

    @property
    def predictions(self) -> Predictions:
        """The predictions, as metrics take them."""
        return Predictions(self.forget_prediction, self.anchor_prediction, self.retain_prediction)


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
    stage: Stage = Stage.EVALUATING,
    cache: Cache | None = None,
) -> Evaluation:
    """Sample the model as it is now, and predict. cache: only for a model with its original weights."""
    texts = [p.text for p in prompts.forget] + [p.text for p in prompts.retain]
    images = sample_images(model, texts, prompts.forget_seeds + prompts.retain_seeds, progress, stage, cache)
    n, kinds = len(prompts.forget), (prompts.forget, prompts.anchor, prompts.retain)
    return Evaluation(images[:n], images[n:], *(_predict(model, [p.text for p in of], progress) for of in kinds))


@torch.no_grad()
def _predict(model: DiffusionModel, texts: list[str], progress: Progress = silent) -> Tensor:
    """Predictions on noise latents at t spread over the upper half of the schedule, where a prompt decides most."""
    timesteps = model.schedule.noisier_half(NUM_DRIFT_SAMPLES)
    texts = [texts[i % len(texts)] for i in range(NUM_DRIFT_SAMPLES)] if texts else []
    conditioning = model.encode(texts) if texts else None
    predictions = []
    for start in range(0, len(texts), 8):
        assert conditioning is not None
        part = texts[start : start + 8]
        noise = torch.randn(len(part), *model.latent_shape, generator=step_generator(1, start)).to(model.device)
        t = timesteps[start : start + len(part)].to(model.device)
        x_t = model.schedule.add_noise(torch.zeros_like(noise), noise, t)
        predictions.append(model.predict(x_t, t, conditioning[start : start + len(part)]))
        progress(Event(Stage.PROBING, start + len(part), len(texts)))
    return torch.cat(predictions).cpu() if predictions else torch.empty(0)


def compare(
    model: DiffusionModel,
    plan: Plan,
    prompts: EvalPrompts,
    before: Evaluation,
    after: Evaluation,
    *,
    detector: str | None = None,
) -> dict[str, Any]:
    """The metrics of a run, as in `run.json`.

    Args:
        prompts: The evaluation prompts of both evaluations.
        detector: Name of the detector; by default the first one that covers the concepts.
    """
    names = [(of.attribute, concept.name) for concept, of in _paired(plan)]
    chosen = choose_detector(names, model.settings.detector, model.device, detector) if prompts.forget else NO_IMAGES
    if isinstance(chosen, Unknown):
        sources: tuple[Source, ...] = ("detections",) if prompts.forget else ("detections", "predictions")
        unknown = dict.fromkeys(sources, chosen.reason)
        return measure(EvaluationPair([], {}, {}, {}, _evaluated(before), _evaluated(after), unknown))
    pair = EvaluationPair(
        _expected_concepts(chosen, plan, prompts),
        chosen.labels,
        _expected_labels(chosen, prompts.anchor),
        _expected_labels(chosen, prompts.retain),
        _evaluated(before, chosen),
        _evaluated(after, chosen),
        {},
    )
    return {**measure(pair), "detector": facts_of(chosen)}


def _paired(plan: Plan) -> list[tuple[Concept, ConceptPrompts]]:
    return list(zip(plan.concepts, plan.prompts.concepts, strict=True))


def _evaluated(side: Evaluation, detector: Detector | None = None) -> ModelEvaluation:
    if detector is None:
        return ModelEvaluation(NOTHING, NOTHING, side.predictions)
    return ModelEvaluation(detector.detect(side.forget), detector.detect(side.retain), side.predictions)


def _expected_labels(detector: Detector, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Attribute → the label that each prompt's image should show, int64 (n,), −1 where it names none."""
    return {
        name: np.array([labels.index(p.labels[name]) if name in p.labels else -1 for p in prompts], np.int64)
        for name, labels in detector.labels.items()
    }


def _expected_concepts(detector: Detector, plan: Plan, prompts: EvalPrompts) -> list[ExpectedConcept]:
    """The concepts in the detector's terms."""
    concepts = []
    for i, (concept, of) in enumerate(_paired(plan)):
        assert of.attribute is not None and of.value is not None
        labels = detector.labels[of.attribute]
        anchor = labels.index(of.anchor_value) if of.anchor_value is not None else None
        rows = slice(i * prompts.each, (i + 1) * prompts.each)
        concepts.append(ExpectedConcept(concept.name, of.attribute, labels.index(of.value), anchor, rows))
    return concepts
