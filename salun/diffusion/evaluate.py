"""`salun eval`: any model compared with its original, on held-out prompts, on sets of prompts and on prompt files.

Samples are kept in the cache, so that an interrupted evaluation continues where it was, and other detectors
need no new images. Latents are held, images are not: each is decoded when a detector, a metric or a file needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from salun.compute.device import explained_memory_errors
from salun.diffusion.eval_models import Compared, compared_models, record_of
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.eval_sets import (
    SetResult,
    SetSamples,
    sampled_set,
    seeds_of,
    sets_of,
    wanted_sets,
)
from salun.diffusion.evaluation import (
    EvalPrompts,
    Evaluation,
    eval_prompts,
    evaluate_model,
    evaluated_pair,
    metrics_of,
    metrics_without,
)
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.prompts.sets import PromptSet
from salun.diffusion.stages import evaluation_stages
from salun.errors import ConfigError
from salun.evaluation.calibration import Calibration
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import Detector, DetectorInputs, load_detector
from salun.evaluation.further_sets import ANCHOR, CONCEPT, OTHERS
from salun.evaluation.image_metric import ImageMetric, ImageSet, Prepared, load_image_metrics, measure_images
from salun.evaluation.metric import EvaluationPair
from salun.evaluation.pretrained import CLIP
from salun.evaluation.result_names import result_names
from salun.evaluation.verdict import verdict_on
from salun.progress import Event, Progress, Stage, StageCost, in_parts, silent
from salun.runs.cache import Cache
from salun.runs.record import RunRecord

NO_ORIGINAL = "without its original model a detector's word cannot be checked"


RECORDED = ("command", "options", "device", "versions", "inputs", "notes")  # parts of the record in `eval.json`


@dataclass(frozen=True, eq=False)
class EvalResult:
    """All that an evaluation found.

    Args:
        record: What was evaluated how, as of any run: command, options, versions, files of prompts.
        pairs: Detector → what it sees on the held-out prompts of both models; empty without an original.
        metrics: Detector → metrics, as in `run.json`.
        sets: What was found on each set of prompts; `CONCEPT` and `OTHERS`, the held-out prompts, are the first.
    """

    compared: Compared
    plan: Plan
    options: EvalOptions
    detectors: Mapping[str, Detector]
    pairs: Mapping[str, EvaluationPair]
    metrics: Mapping[str, dict[str, Any]]
    sets: Sequence[SetResult]
    record: RunRecord

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user."""
        return self.record.notes

    def as_json(self) -> dict[str, Any]:
        """As in `eval.json`: the metrics of the first detector, and under `detectors` those of all."""
        recorded = self.record.as_json()
        calibrations = {
            name: {concept.name: pair.calibration(concept) for concept in pair.concepts}
            for name, pair in self.pairs.items()
        }
        sets = [each for each in self.sets if each.prompts.name != ANCHOR]
        data = {
            "n": self.options.n,
            "seed": self.options.seed,
            "concepts": [{"name": c.name, "anchor": c.anchor} for c in self.plan.concepts],
            **next(iter(self.metrics.values())),
            "detectors": dict(self.metrics),
            "sets": {each.prompts.name: self._of_set(each, calibrations) for each in sets},
            "models": self.compared.facts,
            "sampling": {**asdict(self.plan.sampling), **self.record.facts},
            **{name: recorded[name] for name in RECORDED},
        }
        return data | {"verdict": verdict_on(data).as_json()}

    def _of_set(self, of: SetResult, calibrations: Mapping[str, Mapping[str, Calibration]]) -> dict[str, Any]:
        """What became of a set of prompts. calibrations: detector → concept → its calibration on the original."""
        return {
            "n": len(of.prompts.rows),
            "shows": of.prompts.shows,
            "preserve": of.prompts.preserve,
            "detected": {
                name: of.rates(name, detector, self.plan, calibrations.get(name, {}))
                for name, detector in self.detectors.items()
            },
            "image_drift": of.drift.as_json(),
            "image_metrics": dict(of.measured),
        }


def evaluate(
    target: str, options: EvalOptions, progress: Progress = silent, command: str = "salun.diffusion.evaluate.evaluate"
) -> EvalResult:
    """Compare a model with its original, or without one tell how often each concept is detected in its images.

    Args:
        target: A run folder, or a model; then the options name the concept and the original.
        command: As it is recorded, to reproduce the evaluation.

    Raises:
        ConfigError: The concept is missing, or a detector, metric, set or option is wrong.
        DataError: A prompt file, a run's delta or what a detector or metric needs cannot be used.
        ModelError: A model cannot be loaded, or is not the run's.
    """
    compared = compared_models(target, options)
    plan = make_plan(compared.known.settings, compared.known.name, list(compared.names), compared.options)
    advice = "Try {dtype} bf16 or a smaller {resolution}"
    with compared.known.configured(plan.options), explained_memory_errors("out of memory", advice):
        wanted = Wanted.of(target, compared, plan, options, command)
        progress(Event(Stage.PLANNING, stages=wanted.stages))
        wanted.prepare(progress)
        return result_of(wanted, _sampled(wanted, progress), progress)


@dataclass(frozen=True, eq=False)
class Wanted:
    """What an evaluation is to find out: of which models, on which prompts, and who looks at the images.

    Args:
        record: Of what is evaluated how, with every option resolved.
        prompts: The held-out prompts.
        sets: Further prompts.
        detectors, measures: By their names in the result.
    """

    compared: Compared
    plan: Plan
    options: EvalOptions
    record: RunRecord
    prompts: EvalPrompts
    sets: Sequence[PromptSet]
    detectors: Mapping[str, Detector]
    measures: Mapping[str, ImageMetric]

    @classmethod
    def of(cls, target: str, compared: Compared, plan: Plan, options: EvalOptions, command: str) -> Wanted:
        """That of the options; the known model must be configured as the plan says. Raises as `evaluate`."""
        record = _record_of(target, options, compared, plan, command)
        sets = wanted_sets(options, plan, compared.known, record)
        prompts = eval_prompts(plan, options.n, options.seed)
        detectors, measures = _detectors(compared, plan, options), _measures(compared, options)
        return cls(compared, plan, options, record, prompts, sets, detectors, measures)

    @property
    def stages(self) -> list[StageCost]:
        """What the evaluation does, in order, and what it costs."""
        anchors, further = len(self.prompts.anchors[0]), sum(len(of.rows) for of in self.sets)
        compared = self.compared.original is not None
        return evaluation_stages(self.plan, list(self.detectors), self.prompts.each, anchors, further, compared)

    def prepare(self, progress: Progress) -> None:
        """Have metrics read what they need before anything is sampled. Raises DataError as `Prepared.prepare`."""
        largest = max(len(self.prompts.forget), len(self.prompts.retain), *(len(of.rows) for of in self.sets))
        for metric in self.measures.values():
            if isinstance(metric, Prepared):
                metric.prepare(largest, progress)

    def sampled(
        self, model: DiffusionModel, stage: Stage, progress: Progress, cache: Cache | None, weights: str | None = None
    ) -> Side:
        """A model's latents on all prompts; arguments as `evaluate_model`."""
        anchors = len(self.prompts.anchors[0]) if stage is Stage.IMAGES_BEFORE else 0
        images = [len(self.prompts.forget) + len(self.prompts.retain) + anchors, *(len(of.rows) for of in self.sets)]
        parts, seed = in_parts(progress, images), self.options.seed
        held_out = evaluate_model(model, self.prompts, next(parts), stage, cache, weights, hold_images=False)
        sets = [sampled_set(model, of, seeds_of(of, seed), next(parts), stage, cache, weights) for of in self.sets]
        return Side(held_out, sets)


def result_of(wanted: Wanted, sides: Mapping[str, Side], progress: Progress) -> EvalResult:
    """What detectors and metrics find in the images.

    Args:
        sides: "after", the evaluated model, and "before", the original, where there is one. The network holds the
            original's weights.
    """
    plan, detectors, pairs = wanted.plan, wanted.detectors, {}
    if "before" in sides:
        seen = sides["before"].held_out, sides["after"].held_out
        pairs = {name: evaluated_pair(of, plan, wanted.prompts, *seen, progress) for name, of in detectors.items()}
    sets = [*_held_out(wanted, sides, pairs, progress), *_further(wanted, sides, progress)]
    erased_by = plan if wanted.compared.change is not None else None
    metrics = {
        name: metrics_of(of, pairs[name], erased_by) if name in pairs else metrics_without(of, NO_ORIGINAL)
        for name, of in detectors.items()
    }
    return EvalResult(wanted.compared, plan, wanted.options, detectors, pairs, metrics, sets, wanted.record)


def _record_of(target: str, options: EvalOptions, compared: Compared, plan: Plan, command: str) -> RunRecord:
    """The record of an evaluation, with every option resolved that the model or the run decides."""
    record = record_of(target, options, compared, plan, command, {"detector": _detector_names(options, plan)})
    if plan.options.detector and not options.detector:
        record.notes.append(f"the detector is {plan.detector}, as in the run")
    return record


def _detector_names(options: EvalOptions, plan: Plan) -> list[str]:
    return list(dict.fromkeys(options.detector or [plan.detector]))


def _detectors(compared: Compared, plan: Plan, options: EvalOptions) -> dict[str, Detector]:
    """The wanted detectors, by their names in results. Raises ConfigError for `self` without the original."""
    names = _detector_names(options, plan)
    if compared.original is None and "self" in names:
        raise ConfigError(
            "is self, which asks the original model",
            option="detector",
            advice="Name the original by {against}, or use another {detector}",
        )
    model = compared.known
    subjects = [replace(each, neighbors=tuple(options.neighbors)) for each in plan.subjects]
    inputs = DetectorInputs(
        subjects, model.settings.detector, compared.original, model.device, clip=_clip(compared, options)
    )
    return {shown: load_detector(name, inputs) for name, shown in zip(names, result_names(names), strict=True)}


def _measures(compared: Compared, options: EvalOptions) -> dict[str, ImageMetric]:
    """The wanted metrics of images, likewise. Raises ConfigError for one that compares models, if there is only one."""
    loaded = load_image_metrics(options.metric, _clip(compared, options), compared.known.device)
    alone = [name for name, of in loaded.items() if of.needs_original and compared.original is None]
    if alone:
        raise ConfigError(
            f"is {alone[0]}, which compares images with the original model's",
            option="metric",
            advice="Name the original by {against}, or real images, as in {metric} fid:FOLDER",
        )
    return dict(zip(result_names(list(loaded)), loaded.values(), strict=True))


def _clip(compared: Compared, options: EvalOptions) -> ClipModel:
    """The CLIP model of whatever names none itself; nothing is loaded before it is used."""
    return ClipModel(options.clip or CLIP, device=compared.known.device)


@dataclass(frozen=True, eq=False)
class Side:
    """A model's images: of the held-out prompts, and of each further set."""

    held_out: Evaluation
    sets: Sequence[SetSamples]


def _sampled(wanted: Wanted, progress: Progress) -> dict[str, Side]:
    """The latents of the original ("before"), if there is one, and of the model ("after")."""
    compared, cache, sides = wanted.compared, Cache.of_user(), {}
    if compared.original is not None:
        sides["before"] = wanted.sampled(compared.original, Stage.IMAGES_BEFORE, progress, cache)
    with compared.as_erased() as erased, erased.configured(wanted.plan.options):
        sides["after"] = wanted.sampled(erased, Stage.IMAGES_AFTER, progress, cache, compared.weights)
    return sides


def _held_out(
    wanted: Wanted, sides: Mapping[str, Side], pairs: Mapping[str, EvaluationPair], progress: Progress
) -> list[SetResult]:
    """What was found on the held-out prompts; what a pair has seen already is not looked at again."""
    kinds = {CONCEPT: "forget", OTHERS: "retain", ANCHOR: "anchor"}
    results = []
    for name, of in sets_of(wanted.prompts).items():
        kind = kinds[name]
        parts = {side: getattr(each.held_out, kind) for side, each in sides.items()}
        images = {side: SetSamples.of(part) for side, part in parts.items() if part is not None}
        if not images:
            continue
        seen = {
            detector: {side: getattr(getattr(pairs[detector], side), kind) for side in images}
            if detector in pairs
            else {side: part.detected(looks, progress) for side, part in images.items()}
            for detector, looks in wanted.detectors.items()
        }
        measured = _measured(wanted.measures, images, progress) if name != ANCHOR else {}
        results.append(SetResult(of, seeds_of(of, 0), images, seen, measured))
    return results


def _further(wanted: Wanted, sides: Mapping[str, Side], progress: Progress) -> list[SetResult]:
    """What was found on each further set."""
    results = []
    sizes = [len(of.rows) for of in wanted.sets for _ in wanted.detectors for _ in sides]
    counted = in_parts(progress, sizes)
    for i, of in enumerate(wanted.sets):
        images = {side: each.sets[i] for side, each in sides.items()}
        seen = {
            name: {side: part.detected(detector, next(counted)) for side, part in images.items()}
            for name, detector in wanted.detectors.items()
        }
        measured = _measured(wanted.measures, images, progress)
        results.append(SetResult(of, seeds_of(of, wanted.options.seed), images, seen, measured))
    return results


def _measured(
    measures: Mapping[str, ImageMetric], images: Mapping[str, SetSamples], progress: Progress
) -> dict[str, Any]:
    if not measures:
        return {}
    sets = {side: ImageSet(of.images, of.prompts) for side, of in images.items()}
    return measure_images(measures, sets.get("before"), sets["after"], progress)
