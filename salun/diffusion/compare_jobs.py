"""The jobs of a comparison of methods: what each erases how, in which stages, and what these cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.compare_options import NOT_COMPARED, CompareOptions, Variant
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.stages import attack_stages, erasure_stages
from salun.diffusion.unread import check_shared, unread, without
from salun.errors import ConfigError, fill, literal
from salun.methods import METHODS
from salun.progress import Stage, StageCost

MAKING = (Stage.SAMPLING, Stage.SALIENCY, Stage.FROZEN_TARGETS, Stage.TRAINING)  # stages that make the model
SHARED = (Stage.SAMPLING, Stage.IMAGES_BEFORE)  # stages whose results jobs of one concept and seed share
USUAL_TRIALS = 4  # of a search, which has three to five


@dataclass(frozen=True)
class Job:
    """One erasure of a comparison.

    Args:
        name: Of its folder.
        concept: Its name. anchor: None for the preset's.
    """

    name: str
    variant: Variant
    concept: str
    anchor: str | None
    seed: int


def jobs_of(options: CompareOptions) -> list[Job]:
    """All erasures: seed by seed, each concept by each method.

    Raises:
        ConfigError: There is no concept, or an option that has no effect with any of the methods.
    """
    if not options.concept:
        raise ConfigError("no concept is given", advice="Name what to erase: {concept} circle")
    jobs: dict[str, Job] = {}
    variants = options.variants
    check_shared(options.options, [variant.options for variant in variants])
    for seed in range(options.seed, options.seed + options.seeds):
        for i, concept in enumerate(options.concept):
            for variant in variants:
                name = re.sub(r"[^a-z0-9._=-]+", "-", f"{concept}-{variant.name}-{seed}".lower())
                name = name if name not in jobs else f"{name}-{len(jobs)}"
                jobs[name] = Job(name, variant, concept, options.anchor[i] if options.anchor else None, seed)
    return list(jobs.values())


def with_methods(model: Model, options: CompareOptions) -> tuple[CompareOptions, list[str]]:
    """With the methods that the model can take, where the options name none, and notes on the others."""
    known = METHODS["diffusion"].values()
    rest = [method.name for method in known if model.settings.labels and method.text]
    if options.methods or not rest:
        return options, []
    chosen = [method.name for method in known if method.name not in rest]
    note = f"{model.name} takes class labels, which these methods do not edit: {', '.join(rest)}"
    return replace(options, methods=chosen), [note]


def job_options(model: Model, options: CompareOptions, job: Job, tuned: Mapping[str, Any]) -> EraseOptions:
    """The options of one erasure: as many passes as SalUn's steps take, unless they say otherwise.

    Those for all methods that have no effect with this one are at their defaults.

    Args:
        tuned: Values of a search.

    Raises:
        ConfigError: They cannot work; for what the variant sets, the error names it.
    """
    common = replace(options.options, seed=job.seed, anchor=[] if job.anchor is None else [job.anchor])
    with _naming(job.variant):
        given = {**job.variant.options, **tuned}
        chosen = _where_read(replace(common, **given), given)
        chosen = _of_paper(model, options, job, chosen)
        chosen = _with_steps(model, options, job, common, chosen)
        make_plan(model.settings, model.name, job.concept, chosen)
    return chosen


@contextmanager
def _naming(variant: Variant) -> Iterator[None]:
    """Context manager: an error about an option that only variants set says which one does, and not how to set it."""
    try:
        yield
    except ConfigError as error:
        if error.option not in (*variant.options, *NOT_COMPARED):
            raise
        message = f"has {variant.name}, whose {error.option} {error.message}"
        advice = literal(fill(error.advice, str))
        raise ConfigError(message, option="methods", advice=advice, code=error.code) from error


def _where_read(options: EraseOptions, given: Mapping[str, Any] = MappingProxyType({})) -> EraseOptions:
    """Without options that have no effect, but for those given to this method."""
    return without(options, [name for name in unread(options) if name not in given])


def _of_paper(model: Model, options: CompareOptions, job: Job, chosen: EraseOptions) -> EraseOptions:
    """By the paper's recipe, where the budget asks for it and there is one."""
    if options.budget != "paper" or "recipe" in job.variant.options:
        return chosen
    by_paper = replace(chosen, recipe="paper")
    try:
        make_plan(model.settings, model.name, job.concept, by_paper)
    except ConfigError as error:
        if error.option == "recipe":
            return chosen
        raise
    return by_paper


def _with_steps(
    model: Model, options: CompareOptions, job: Job, common: EraseOptions, chosen: EraseOptions
) -> EraseOptions:
    """With a batch size, and with steps that take as many passes as SalUn's.

    Args:
        common: The options for all methods.
    """
    method = METHODS["diffusion"][chosen.method]
    if "steps" not in method.reads:
        return chosen
    if chosen.batch_size is None:  # given, so that none is made smaller to fit into memory
        count = make_plan(model.settings, model.name, job.concept, chosen).recipe.batch_size
        if method.data == "prompts" and chosen.recipe != "paper":
            count = 1  # each sample is denoised first, so these methods' papers take one a step
        common, chosen = replace(common, batch_size=model.settings.recipe.batch_size), replace(chosen, batch_size=count)
    if chosen.recipe == "paper" or chosen.until is not None or "steps" in job.variant.options:
        return chosen
    steps = options.steps or model.settings.recipe.steps
    by_salun = _where_read(replace(common, method="salun", steps=steps))
    of_a_step = _training_passes(model, job.concept, replace(chosen, steps=1))
    return replace(chosen, steps=max(1, round(_training_passes(model, job.concept, by_salun) / of_a_step)))


def _training_passes(model: Model, concept: str, options: EraseOptions) -> int:
    """What a training costs, in passes without gradients."""
    plan = make_plan(model.settings, model.name, concept, options)
    return sum(cost.passes for cost in erasure_stages(plan) if cost.stage in (Stage.FROZEN_TARGETS, Stage.TRAINING))


def passes_of(plan: Plan) -> int | None:
    """What making an erased model costs, its samples and mask included, in passes without gradients.

    None for a training to a goal, whose steps no plan knows.
    """
    if plan.goal is not None:
        return None
    return sum(cost.passes for cost in erasure_stages(plan) if cost.stage in MAKING)


def paper_notes(options: CompareOptions, jobs: Sequence[Job], plans: Sequence[Plan]) -> list[str]:
    """A note on methods that train, but have no numbers of a paper for the model, where the budget asks for them."""
    if options.budget != "paper":
        return []
    names = [
        job.variant.name
        for job, plan in zip(jobs, plans, strict=True)
        if plan.options.recipe != "paper" and "steps" in plan.method.reads
    ]
    unknown = "no numbers of a paper are known for these methods, which take as many passes as SalUn's steps: "
    return [unknown + ", ".join(dict.fromkeys(names))] if names else []


def search_jobs(options: CompareOptions) -> list[Job]:
    """The searches of the budget `tuned`, one for each variant: on the first concept at the first seed."""
    if options.budget != "tuned":
        return []
    anchor = options.anchor[0] if options.anchor else None
    return [
        Job("search", variant, options.concept[0], anchor, options.seed)
        for variant in options.variants
        if METHODS["diffusion"][variant.method].tunes not in (None, *variant.options)
    ]


def plans_of(model: Model, options: CompareOptions, jobs: Sequence[Job]) -> list[Plan]:
    """The plan of each job, by values that are not searched. Raises ConfigError for one that cannot work."""
    return [make_plan(model.settings, model.name, job.concept, job_options(model, options, job, {})) for job in jobs]


def attack_options(options: CompareOptions, seed: int) -> AttackOptions:
    """How the model of a job with this seed is attacked."""
    return AttackOptions(attack=options.attack, n=options.attacked, seed=seed + 1)


def job_stages(model: Model, options: CompareOptions, plans: Sequence[Plan]) -> list[list[StageCost]]:
    """What each erasure does, with its attacks; the cache has what an earlier one of its concept and seed sampled."""
    batch_size = model.settings.recipe.batch_size
    erased, attacked = dict[Any, int](), dict[Any, int]()
    listed = []
    for plan in plans:
        chosen = attack_options(options, plan.options.seed)
        attacks = attack_stages(plan, chosen, batch_size) if options.attack else []
        listed.append(_unshared(plan, erasure_stages(plan), erased) + _unshared(plan, attacks, attacked))
    return listed


def search_stages(plans: Sequence[Plan]) -> list[list[StageCost]]:
    """What the search of each variant does: an erasure for each value."""
    sampled = dict[Any, int]()
    return [[cost for _ in range(USUAL_TRIALS) for cost in _unshared(p, erasure_stages(p), sampled)] for p in plans]


def _unshared(plan: Plan, stages: Sequence[StageCost], sampled: dict[Any, int]) -> list[StageCost]:
    """Stages without the passes for what an earlier job has sampled.

    Args:
        sampled: Samples by concept, seed and stage; those of these stages are added.
    """
    left = []
    for cost in stages:
        if cost.stage in SHARED:
            key = (plan.concepts[0].name, plan.options.seed, cost.stage)
            known = min(sampled.get(key, 0), cost.steps)
            sampled[key] = max(sampled.get(key, 0), cost.steps)
            cost = replace(cost, forward=round(cost.forward * (1 - known / cost.steps)))
        left.append(cost)
    return left
