"""The jobs of a comparison of methods: what each erases how, in which stages, and what these cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.compare_options import CompareOptions, Variant
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.stages import attack_stages, erasure_stages
from salun.errors import ConfigError
from salun.methods import METHODS
from salun.progress import Stage, StageCost

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
    """All erasures: seed by seed, each concept by each method. Raises ConfigError without a concept."""
    if not options.concept:
        raise ConfigError("no concept is given", advice="Name what to erase: {concept} circle")
    jobs: dict[str, Job] = {}
    variants = options.variants
    for seed in range(options.seed, options.seed + options.seeds):
        for i, concept in enumerate(options.concept):
            for variant in variants:
                name = re.sub(r"[^a-z0-9._=-]+", "-", f"{concept}-{variant.name}-{seed}".lower())
                name = name if name not in jobs else f"{name}-{len(jobs)}"
                jobs[name] = Job(name, variant, concept, options.anchor[i] if options.anchor else None, seed)
    return list(jobs.values())


def job_options(model: Model, options: CompareOptions, job: Job, tuned: Mapping[str, Any]) -> EraseOptions:
    """The options of one erasure: as many passes as SalUn's steps take, unless they say otherwise.

    Args:
        tuned: Values of a search.
    """
    method = METHODS["diffusion"][job.variant.method]
    common = replace(options.options, seed=job.seed, anchor=[] if job.anchor is None else [job.anchor])
    chosen = replace(common, **{**job.variant.options, **tuned})
    by_paper = bool(options.budget == "paper" and method.paper_recipe and "recipe" not in job.variant.options)
    if by_paper:
        chosen = replace(chosen, recipe="paper")
    if chosen.batch_size is None:  # given, so that none is made smaller to fit into memory
        count = make_plan(model.settings, model.name, job.concept, chosen).recipe.batch_size
        if method.data == "prompts" and chosen.recipe != "paper":
            count = 1  # each sample is denoised first, so these methods' papers take one a step
        common, chosen = replace(common, batch_size=model.settings.recipe.batch_size), replace(chosen, batch_size=count)
    if by_paper or chosen.until is not None or "steps" in job.variant.options:
        return chosen
    steps = options.steps or model.settings.recipe.steps
    salun = _training_passes(model, job.concept, replace(common, method="salun", steps=steps))
    of_a_step = _training_passes(model, job.concept, replace(chosen, steps=1))
    return replace(chosen, steps=max(1, round(salun / of_a_step)) if of_a_step else steps)


def _training_passes(model: Model, concept: str, options: EraseOptions) -> int:
    """What a training costs, in passes without gradients."""
    plan = make_plan(model.settings, model.name, concept, options)
    return sum(cost.passes for cost in erasure_stages(plan) if cost.stage in (Stage.FROZEN_TARGETS, Stage.TRAINING))


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
