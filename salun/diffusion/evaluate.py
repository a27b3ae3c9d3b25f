"""`salun eval`: any model compared with its original, on held-out prompts, on sets of prompts and on prompt files.

Samples are kept in the cache, so that an interrupted evaluation continues where it was, and other detectors
need no new images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salun.checkpoints.locate import find
from salun.compute.device import explained_memory_errors
from salun.config import read_record
from salun.delta.delta import Delta
from salun.diffusion.data.latents import decode_images, item_seed, sample_latents
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluation import (
    EvalPrompts,
    Evaluation,
    eval_prompts,
    evaluate_model,
    evaluated_pair,
    metrics_of,
)
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseJob, EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.prompts.concepts import Concept
from salun.diffusion.prompts.prompt_file import PromptRow, prompts_of_hub, read_prompts
from salun.diffusion.prompts.sets import PromptSet, prompt_sets
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation.detector import Detection, Detector, DetectorInputs, Samples, load_detector
from salun.evaluation.estimate import Estimate
from salun.evaluation.metric import EvaluationPair
from salun.evaluation.metrics.image_drift import drift_of
from salun.progress import Progress, Stage, silent
from salun.runs.cache import Cache
from salun.runs.reading import file_of, read_finished


@dataclass(frozen=True, eq=False)
class Compared:
    """Two models to compare: an original and what became of it.

    Args:
        erased: The model of a file of its own, or `original`, which `change` turns into the erased one.
        change: Network tensors of the erased model, where it is not a model of its own.
        weights: A hash of these.
        names: What to evaluate, and `options` how its prompts are made.
    """

    original: Model
    erased: Model
    names: Sequence[Concept]
    options: EraseOptions
    change: Mapping[str, Tensor] | None = None
    weights: str | None = None

    @contextmanager
    def as_erased(self) -> Iterator[Model]:
        """Context manager: the model with its erased weights."""
        if self.change is None:
            yield self.erased
            return
        self.original.load(self.change)
        try:
            yield self.original
        finally:
            self.original.load(self.original.original())


@dataclass(frozen=True, eq=False)
class SetResult:
    """A set of prompts, sampled from both models, and what each detector sees there: name → (before, after)."""

    prompts: PromptSet
    before: Samples
    after: Samples
    seen: Mapping[str, tuple[Detection, Detection]]


@dataclass(frozen=True, eq=False)
class EvalResult:
    """All that an evaluation found.

    Args:
        pairs: Detector → what it sees on the held-out prompts. metrics: likewise, as in `run.json`.
    """

    compared: Compared
    plan: Plan
    options: EvalOptions
    prompts: EvalPrompts
    before: Evaluation
    after: Evaluation
    detectors: Mapping[str, Detector]
    pairs: Mapping[str, EvaluationPair]
    metrics: Mapping[str, dict[str, Any]]
    sets: Sequence[SetResult]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """As in `eval.json`: the metrics of the first detector, and under `detectors` those of all."""
        first = next(iter(self.metrics.values()))
        return {
            "n": self.options.n,
            "seed": self.options.seed,
            "concepts": [{"name": c.name, "anchor": c.anchor} for c in self.plan.concepts],
            "notes": list(self.notes),
            **first,
            "detectors": dict(self.metrics),
            "sets": {each.prompts.name: set_metrics(each, self) for each in self.sets},
        }


def evaluate(target: str, options: EvalOptions, progress: Progress = silent) -> EvalResult:
    """Compare a model with its original.

    Args:
        target: A run folder, or a model; then the options name the original and the concept.

    Raises:
        ConfigError: The original or the concept is missing, or a detector, set or option is wrong.
        DataError: A prompt file or a run's delta cannot be used.
        ModelError: A model cannot be loaded, or is not the run's.
    """
    compared = _compared(target, options)
    original, cache = compared.original, Cache.of_user()
    plan = make_plan(original.settings, original.name, list(compared.names), compared.options)
    names = options.detector or [plan.detector]
    inputs = DetectorInputs(plan.subjects, original.settings.detector, original, original.device)
    advice = "Try {dtype} bf16 or a smaller {resolution}"
    with original.configured(plan.options), explained_memory_errors("out of memory", advice):
        detectors = {name: load_detector(name, inputs) for name in dict.fromkeys(names)}
        sets, notes = _sets(options, plan, original)
        prompts = eval_prompts(plan, options.n, options.seed)
        before = evaluate_model(original, prompts, progress, Stage.IMAGES_BEFORE, cache)
        parts = [_sampled(original, each, options.seed, progress, Stage.IMAGES_BEFORE, cache) for each in sets]
        with compared.as_erased() as erased, erased.configured(plan.options):
            after = evaluate_model(erased, prompts, progress, Stage.IMAGES_AFTER, cache, compared.weights)
            others = [
                _sampled(erased, each, options.seed, progress, Stage.IMAGES_AFTER, cache, compared.weights)
                for each in sets
            ]
        pairs = {name: evaluated_pair(of, plan, prompts, before, after, progress) for name, of in detectors.items()}
        results = [
            SetResult(
                of,
                first,
                second,
                {name: (d.detect(first, progress), d.detect(second, progress)) for name, d in detectors.items()},
            )
            for of, first, second in zip(sets, parts, others, strict=True)
        ]
    metrics = {name: metrics_of(detectors[name], pair) for name, pair in pairs.items()}
    return EvalResult(compared, plan, options, prompts, before, after, detectors, pairs, metrics, results, notes)


def _compared(target: str, options: EvalOptions) -> Compared:
    """The two models. Raises ConfigError where one of them or the concept is missing."""
    folder = Path(target).expanduser()
    if (folder / "run.json").is_file():
        for given in ("against", "concept", "anchor"):
            if getattr(options, given):
                raise ConfigError("is named by the run folder already", option=given, advice=f"Omit {{{given}}}")
        return _of_run(folder, options)
    if not options.against:
        raise ConfigError(
            f"{target} is not a run folder, so its original is needed: what a detector sees in the original's images "
            "says what its word is worth",
            advice="Name the original model by {against}",
        )
    if not options.concept:
        raise ConfigError("no concept is given", advice="Name what the model should have forgotten: {concept} circle")
    original, erased = _loaded([options.against, target], options)
    if original.family.name != erased.family.name or original.latent_shape != erased.latent_shape:
        raise ModelError(
            f"{target} ({erased.family.name}) and {options.against} ({original.family.name}) differ in kind"
        )
    return Compared(original, erased, [Concept(name) for name in options.concept], _erase_options(options))


def _loaded(names: Sequence[str], options: EvalOptions) -> list[Model]:
    """The models of these names; `components` are for those that are single files."""
    files = [find(name, options.models_dir)[0].is_file() for name in names]
    without = replace(options, components=None)
    return [load_with(n, options if file or not any(files) else without) for n, file in zip(names, files, strict=True)]


def _of_run(folder: Path, options: EvalOptions) -> Compared:
    """The models of a finished run, from its folder alone, which is untrusted input."""
    record = read_finished(folder)
    delta = file_of(record, folder, "delta")
    if delta is None:
        raise DataError(
            f"{folder} holds no delta",
            advice="run the erasure again without {output}, or with one that ends in .salun.safetensors",
        )
    job = EraseJob(**read_record(record, folder / "run.json"))
    used = _erase_options(options, job.options)
    used = replace(used, device=options.device, allow_pickle=options.allow_pickle, detector=None)  # not as recorded
    model = load_with(str(job.model), used)
    loaded = Delta.load(delta)
    change = loaded.apply(model.original())
    return Compared(model, model, [Concept(name) for name in job.concept], used, change, loaded.result_hash)


def _erase_options(options: EvalOptions, base: EraseOptions | None = None) -> EraseOptions:
    """The options by which prompts are made and images sampled: the given ones, others as in `base`."""
    defaults = EvalOptions()
    shared = {item.name for item in dataclasses.fields(EraseOptions)} & {i.name for i in dataclasses.fields(options)}
    given = {name: getattr(options, name) for name in shared - {"detector"}}
    given = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    return replace(base or EraseOptions(), **given)


def _sets(options: EvalOptions, plan: Plan, model: Model) -> tuple[list[PromptSet], list[str]]:
    """The wanted sets of prompts, of n prompts at most, and notes for the user."""
    vocabulary = model.settings.vocabulary
    if options.sets and vocabulary is not None:
        raise ConfigError(
            f"are prompts in free text, but {model.name} knows the words of its vocabulary only", option="sets"
        )
    made = prompt_sets(options.sets, plan.concepts, plan.prompts, options.synonyms, _similarity(model))
    notes = []
    for source in options.prompts:
        path = Path(source).expanduser()
        rows = read_prompts(path, skip_empty=True) if path.suffix or path.exists() else prompts_of_hub(source)
        made.append(PromptSet(path.name, rows))
        side = model.settings.sampling.resolution
        other = sum((row.width or side, row.height or side) != (side, side) for row in rows[: options.n])
        if other:
            notes.append(f"{path.name}: {other} prompts ask for another size; all are sampled at {side}×{side}")
    for i, each in enumerate(made):
        if len(each.rows) > options.n:
            notes.append(f"{each.name}: the first {options.n:,} of {len(each.rows):,} prompts (-n)")
            made[i] = replace(each, rows=each.rows[: options.n])
    return made, notes


def _similarity(model: Model) -> Callable[[str, Sequence[str]], list[str]]:
    """A function of (phrase, nouns): the nouns, the nearest to the phrase first, by the model's own text encoder."""

    @torch.no_grad()
    def similar(phrase: str, nouns: Sequence[str]) -> list[str]:
        encoded = model.encode([phrase, *nouns]).hidden.float().mean(1)
        centered = F.normalize(encoded - encoded[1:].mean(0), dim=1)  # all encodings share a large common part
        order = (centered[1:] @ centered[0]).argsort(descending=True)
        return [nouns[int(i)] for i in order]

    return similar


def _sampled(
    model: Model,
    of: PromptSet,
    seed: int,
    progress: Progress,
    stage: Stage,
    cache: Cache,
    weights: str | None = None,
) -> Samples:
    """The set's images, each by its row's seed and guidance, or else by its number and the model's own."""
    settings = model.settings
    latents: Tensor | None = None
    groups: dict[float | None, list[int]] = {}
    for i, row in enumerate(of.rows):
        groups.setdefault(row.guidance, []).append(i)
    try:
        for guidance, rows in groups.items():
            sampling = settings.sampling if guidance is None else replace(settings.sampling, guidance=guidance)
            model.settings = replace(settings, sampling=sampling)
            seeds = [_seed(of.rows[i], seed, i) for i in rows]
            made = sample_latents(model, [of.rows[i].text for i in rows], seeds, progress, stage, cache, weights).cpu()
            latents = torch.empty(len(of.rows), *made.shape[1:]) if latents is None else latents
            latents[rows] = made
    finally:
        model.settings = settings
    assert latents is not None
    images = decode_images(model, latents)
    return Samples(images, latents, [row.text for row in of.rows], compare_prompts=of.preserve)


def _seed(row: PromptRow, seed: int, index: int) -> int:
    return row.seed if row.seed is not None else item_seed(seed, "eval", index)


def set_metrics(result: SetResult, of: EvalResult) -> dict[str, Any]:
    """What became of a set of prompts: per detector the rate of each concept, and the drift of its images."""
    rates: dict[str, Any] = {}
    for name, (before, after) in result.seen.items():
        detector, pair = of.detectors[name], of.pairs[name]
        thresholds = {concept.name: pair.calibration(concept).threshold for concept in pair.concepts}
        for subject in of.plan.subjects:
            target = detector.target(subject)
            assert target is not None
            threshold = thresholds[subject.name]
            sides = [side.scores[target.attribute][:, target.label] >= threshold for side in (before, after)]
            rates.setdefault(name, {})[subject.name] = _both(*sides)
        if result.prompts.preserve and detector.prompt_match is not None:
            sides = [side.shows(detector.prompt_match, 0) for side in (before, after)]
            rates[name]["as prompted"] = _both(*sides)
    drift = drift_of(result.before.latents, result.after.latents)
    return {
        "n": len(result.prompts.rows),
        "shows": result.prompts.shows,
        "preserve": result.prompts.preserve,
        "detected": rates,
        "image_drift": drift.as_json(),
    }


def _both(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    sides = {"before": before, "after": after}
    return {name: Estimate.percentage(hits).as_json() for name, hits in sides.items()}
