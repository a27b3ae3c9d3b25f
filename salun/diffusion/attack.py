"""`salun attack`: does the concept come back? Any model is attacked by several attacks, and success is judged alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from salun.attacks import ATTACKS
from salun.compute.device import explained_memory_errors
from salun.diffusion.attack_options import AttackOptions, ChosenAttack
from salun.diffusion.attacks.task import AttackResult, AttackTask, Known
from salun.diffusion.data.latents import item_seed, sample_latents
from salun.diffusion.eval_models import Compared, compared_models, record_of
from salun.diffusion.evaluation import (
    EvalPrompts,
    Evaluation,
    eval_prompts,
    evaluate_model,
    evaluated_pair,
    metrics_of,
)
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.protocol import DiffusionModel, TokenEncoder
from salun.diffusion.plan import Plan, make_plan, spread
from salun.diffusion.prompts.vocabulary import Prompt
from salun.diffusion.stages import attack_stages, attack_steps
from salun.errors import Cancelled, ConfigError, SalunError
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import Detector, DetectorInputs, facts_of, load_detector
from salun.evaluation.estimate import Estimate
from salun.evaluation.metric import EvaluationPair
from salun.evaluation.pretrained import CLIP
from salun.files import sha256_file
from salun.progress import Event, Progress, Stage, in_parts, silent
from salun.runs.cache import Cache, key_of
from salun.runs.record import RunRecord
from salun.user_text import as_spelled

SIDES = ("erased", "original")  # what is attacked
FORMAT = 2  # of stored results; another one where an attack would find something else than it did
RECORDED = ("command", "options", "device", "versions", "notes")


@dataclass(frozen=True, eq=False)
class Attacked:
    """What came of one attack on one concept.

    Args:
        side: "erased", or "original" for the control.
        seconds: That it took, now or when it was computed.
        error: Why there is no result.
        restored: Whether it came from the cache.
    """

    chosen: ChosenAttack
    concept: str
    side: str
    result: AttackResult | None
    by_chance: float
    seconds: float = 0.0
    error: str = ""
    restored: bool = False

    def as_json(self) -> dict[str, Any]:
        """As in `attack.json`."""
        known = self.result
        return {
            "attack": self.chosen.text,
            "title": self.chosen.title,
            "concept": self.concept,
            "side": self.side,
            "asr": Estimate.percentage(known.shown).as_json() if known is not None else None,
            "tries": known.tries if known is not None else None,
            "by_chance": self.by_chance,
            "passes": known.passes if known is not None else None,
            "seconds": round(self.seconds, 2),
            "curve": [list(point) for point in known.curve] if known is not None else [],
            "x": known.x if known is not None else "",
            "facts": dict(known.facts) if known is not None else {},
            "options": asdict(self.chosen.options),
            "error": self.error,
        }


@dataclass(frozen=True, eq=False)
class AttackReport:
    """All that was attacked.

    Args:
        metrics: Of the erased model on the plain prompts, as in `run.json`.
        before, after: The images behind them.
    """

    compared: Compared
    plan: Plan
    options: AttackOptions
    prompts: EvalPrompts
    before: Evaluation
    after: Evaluation
    metrics: Mapping[str, Any]
    attacked: Sequence[Attacked]
    record: RunRecord

    def as_json(self) -> dict[str, Any]:
        """As in `attack.json`."""
        recorded = self.record.as_json()
        return {
            "n": self.options.n,
            "seed": self.options.seed,
            "concepts": [{"name": c.name, "anchor": c.anchor} for c in self.plan.concepts],
            "plain": {
                name: {"asr": _remaining(values.get("ua"))} for name, values in self.metrics["per_concept"].items()
            },
            "attacks": [each.as_json() for each in self.attacked],
            "metrics": dict(self.metrics),
            "models": self.compared.facts,
            "sampling": asdict(self.plan.sampling),
            **{name: recorded[name] for name in RECORDED},
        }


def _remaining(ua: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The percentage of images that show the concept, out of that of those that do not."""
    if ua is None:
        return None
    return {"value": 100 - ua["value"], "n": ua["n"], "low": 100 - ua["high"], "high": 100 - ua["low"]}


def attack(
    target: str, options: AttackOptions, progress: Progress = silent, command: str = "salun.diffusion.attack.attack"
) -> AttackReport:
    """Attack a model, and tell how often each attack brings each concept back.

    Results are kept in the cache, so that an interrupted call continues after the last finished attack.

    Args:
        target: A run folder, or a model; then the options name the concept and the original.
        command: As it is recorded.

    Raises:
        ConfigError: The original is missing or does not show the concept, the detector cannot tell, or an option is
            wrong.
        DataError, ModelError: A model or file cannot be used.
    """
    _ = options.attacks  # checked before a model is loaded
    return attack_compared(target, compared_models(target, options), options, progress, command)


def attack_compared(
    target: str,
    compared: Compared,
    options: AttackOptions,
    progress: Progress = silent,
    command: str = "",
    cache: Cache | None = None,
) -> AttackReport:
    """As `attack`, of models that are loaded.

    Args:
        target: As it is recorded.
        cache: Of samples and results; by default the user's.
    """
    original, plan = attack_plan(target, compared, options)
    advice = "Try {dtype} bf16 or a smaller {resolution}"
    models = {id(model): model for model in (original, compared.erased)}.values()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.temporarily_trainable())
            stack.enter_context(model.configured(plan.options))
        stack.enter_context(explained_memory_errors("out of memory", advice))
        return _attacked(target, compared, plan, options, progress, command, cache or Cache.of_user())


def attack_plan(target: str, compared: Compared, options: AttackOptions) -> tuple[DiffusionModel, Plan]:
    """(the original, what is attacked). Raises ConfigError without an original, or for a concept it does not know."""
    original = compared.original
    if original is None:
        raise ConfigError(
            f"{target} is attacked without its original, which images of the concept and the detector come from",
            advice="Name it by {against}",
        )
    plan = make_plan(original.settings, original.name, list(compared.names), compared.options)
    return original, replace(plan, detector=options.detector or plan.detector)


def with_defaults(options: AttackOptions, original: DiffusionModel) -> AttackOptions:
    """Where no attack is named, with those that need no file, and no longer prompts of tokens than the model takes."""
    longest = original.longest if isinstance(original, TokenEncoder) else 0
    known = [name for name, of in ATTACKS["diffusion"].items() if of.default and of.tokens <= longest]
    return options if options.attack else replace(options, attack=known)


def _attacked(
    target: str,
    compared: Compared,
    plan: Plan,
    options: AttackOptions,
    progress: Progress,
    command: str,
    cache: Cache,
) -> AttackReport:
    """The plain prompts, and then each attack on each concept."""
    original = compared.original
    assert original is not None
    full = with_defaults(options, original)
    chosen = full.attacks
    prompts = eval_prompts(plan, options.n, options.seed)
    stages = attack_stages(plan, full, original.settings.recipe.batch_size)
    progress(Event(Stage.PLANNING, stages=stages))
    before = evaluate_model(original, prompts, progress, Stage.IMAGES_BEFORE, cache, hold_images=False)
    with compared.as_erased() as erased:
        after = evaluate_model(erased, prompts, progress, Stage.IMAGES_AFTER, cache, compared.weights, False)
    clip = ClipModel(options.clip or CLIP, device=original.device)
    inputs = DetectorInputs(plan.subjects, original.settings.detector, original, original.device, clip=clip)
    detector = load_detector(plan.detector, inputs)
    pair = evaluated_pair(detector, plan, prompts, before, after, progress)
    unknown = pair.cannot_tell()
    if unknown is not None:
        raise ConfigError(
            f"is {plan.detector}, by which no attack can be judged: {unknown.reason}",
            option="detector",
            advice="Use another {detector}, or a concept that the original shows",
        )
    resolved = {"detector": plan.detector, "attack": [each.text for each in chosen]}
    record = record_of(target, options, compared, plan, command, resolved)
    record.notes += plan.notes
    tasks = _tasks(compared, plan, options, prompts, before, pair, detector, progress, cache)
    sizes = attack_steps(plan, full, original.settings.recipe.batch_size)
    parts = [(side, task, *each) for side, task in tasks for each in zip(chosen, sizes, strict=True)]
    results: list[Attacked] = []
    before_it, restored = 0, 0
    for side, task, each, size in parts:
        part = before_it, size, len(tasks) * sum(sizes)
        task = replace(task, part=part, restored=restored, progress=progress, passes=0)
        results.append(_run(task, side, each, cache))
        before_it += size
        restored += size if results[-1].restored else 0
        replace(task, restored=restored).report(1, 1)
    metrics = metrics_of(detector, pair)
    return AttackReport(compared, plan, options, prompts, before, after, metrics, results, record)


def _tasks(
    compared: Compared,
    plan: Plan,
    options: AttackOptions,
    prompts: EvalPrompts,
    before: Evaluation,
    pair: EvaluationPair,
    detector: Detector,
    progress: Progress,
    cache: Cache,
) -> list[tuple[str, AttackTask]]:
    """(what is attacked, task) of each concept."""
    original, tasks = compared.original, []
    assert original is not None

    def sampled(texts: Sequence[Prompt], role: str, n: int, progress: Progress = progress) -> Known:
        chosen = [texts[i].text for i in spread(n, len(texts), options.seed)]
        seeds = [item_seed(options.seed, role, i) for i in range(n)]
        return Known(chosen, sample_latents(original, chosen, seeds, progress, Stage.SAMPLING, cache).cpu())

    sides = SIDES if options.control else SIDES[:1]
    parts = in_parts(progress, [options.images] * len(pair.concepts) * len(sides))
    for side in sides:
        for i, concept in enumerate(pair.concepts):
            rows = prompts.rows_of(i)
            erased = side == "erased"
            expected = detector.target(plan.subjects[i])
            assert expected is not None
            task = AttackTask(
                original,
                compared.erased if erased else original,
                compared.change if erased else None,
                plan,
                i,
                detector,
                expected,
                pair.calibration(concept),
                [prompt.text for prompt in prompts.forget[rows]],
                [prompt.text for prompt in prompts.anchor[rows]],
                prompts.forget_seeds[rows],
                before.forget.latents[list(range(len(before.forget)))[rows]],
                sampled(plan.prompts.concepts[i].forget, "forget", options.images, next(parts)),
                lambda n: sampled(plan.prompts.retain, "retain", n),
                lambda name: load_with(name, options),
                (compared.weights or compared.erased.base_hash) if erased else original.base_hash,
                options.seed,
            )
            tasks.append((side, task))
    return tasks


def _run(task: AttackTask, side: str, chosen: ChosenAttack, cache: Cache) -> Attacked:
    """One attack, unless its result is in the cache."""
    concept = task.plan.concepts[task.concept].name
    title = f"{chosen.title} on the {side} model" if side == "original" else chosen.title
    task.progress(Event(Stage.ATTACKING, message=f"{title}: “{concept}”"))
    task.report(0, 1)
    task = replace(task, argument=chosen.argument)
    false_alarms = float(task.calibration.negatives.mean())
    key = _key(task, chosen)
    stored = _stored(cache, key) if key is not None else None
    if stored is not None:
        result, seconds = stored
    else:
        began = time.perf_counter()
        try:
            result = chosen.attack.call(task, chosen.options)
        except Cancelled:
            raise
        except SalunError as failure:
            return Attacked(chosen, concept, side, None, 100 * false_alarms, error=str(failure))
        seconds = time.perf_counter() - began
        if key is not None:
            cache.put(key, result.as_tensors({"seconds": seconds}))
    chance = 100 * (1 - (1 - false_alarms) ** result.tries)
    return Attacked(chosen, concept, side, result, chance, seconds, restored=stored is not None)


def _stored(cache: Cache, key: str) -> tuple[AttackResult, float] | None:
    """A result of the cache and the seconds that it took; None if there is none."""
    entry = cache.get(key)
    if entry is None:
        return None
    result, facts = AttackResult.of_tensors(entry)
    return result, float(facts["seconds"])


def _key(task: AttackTask, chosen: ChosenAttack) -> str | None:
    """The cache key of a result: everything that it depends on. None for an argument that names a model."""
    path = as_spelled(Path(chosen.argument).expanduser())
    if chosen.argument and not path.is_file():
        return None
    attacked, original = task.attacked, task.original
    return key_of(
        what="attack",
        format=FORMAT,
        attack=[chosen.attack.name, sorted(asdict(chosen.options).items())],
        argument=sha256_file(path) if chosen.argument else "",
        attacked=[task.weights_hash, attacked.parts_hash],
        original=[original.base_hash, original.parts_hash],
        prompts=[list(task.prompts), list(task.anchors), list(task.seeds), list(task.known.prompts)],
        concepts=task.plan.prompts.digest,
        detector=[facts_of(task.detector), task.calibration.threshold],
        sampling=asdict(task.plan.sampling),
        samplers=original.sampler_facts(),
        training=[task.batch_size, task.lr],
        seed=task.seed,
        dtype=str(attacked.dtype),
        device=attacked.device.type,
        torch=torch.__version__,
    )
