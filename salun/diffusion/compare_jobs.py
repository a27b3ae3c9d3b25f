"""The erasures of a comparison: what each is, on equal terms, and what a run folder holds of it already.

Each is a run folder of its own in `jobs/`. A comparison's folder may be untrusted input: what is read from it is
checked, and what another run made is rejected, so that no table mixes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from salun.diffusion.compare_options import CompareOptions, Variant
from salun.diffusion.context import record_of
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.diffusion.stages import erasure_stages
from salun.errors import ConfigError, DataError
from salun.methods import METHODS
from salun.progress import Stage
from salun.runs.folder import check_links
from salun.runs.reading import read_run
from salun.runs.record import RunRecord


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
    if options.budget == "paper" and method.paper_recipe and "recipe" not in job.variant.options:
        return replace(chosen, recipe="paper")
    if chosen.until is not None or "steps" in job.variant.options:
        return chosen
    steps = options.steps or model.settings.recipe.steps
    if method.data == "prompts" and "batch_size" not in job.variant.options and options.batch_size is None:
        chosen = replace(
            chosen, batch_size=1
        )  # each sample is denoised first, so these methods' papers take one a step
    salun = _training_passes(model, job.concept, replace(common, method="salun", steps=steps))
    of_a_step = _training_passes(model, job.concept, replace(chosen, steps=1))
    return replace(chosen, steps=max(1, round(salun / of_a_step)) if of_a_step else steps)


def _training_passes(model: Model, concept: str, options: EraseOptions) -> int:
    """What a training costs, in passes without gradients."""
    plan = make_plan(model.settings, model.name, concept, options)
    return sum(cost.passes for cost in erasure_stages(plan) if cost.stage in (Stage.FROZEN_TARGETS, Stage.TRAINING))


def comparison_record(
    model: Model, options: CompareOptions, folder: Path, command: str = "", resume: bool = False
) -> RunRecord:
    """The record of a comparison; nothing is written yet."""
    recorded = {item.name: getattr(options, item.name) for item in fields(options) if item.name != "run_dir"}
    job = jobs_of(options)[0]
    plan = make_plan(model.settings, model.name, job.concept, job_options(model, options, job, {}))
    facts = record_of(model, plan, [], None).facts  # with the content of the user's images
    return RunRecord(folder, command, recorded, options.seed, str(model.device), facts, resume)


@dataclass(frozen=True)
class Erasure:
    """A job with its options, and what they resolve to.

    Args:
        stored: The record in its run folder, of an erasure with these options; None if there is none.
    """

    job: Job
    options: EraseOptions
    plan: Plan
    folder: Path
    stored: Mapping[str, Any] | None

    @property
    def done(self) -> bool:
        """Whether it needs not be made again."""
        return self.stored is not None and self.stored["status"] == "done"

    @property
    def delta(self) -> Path:
        """Where its delta is, or will be."""
        return self.folder.with_name(f"{self.folder.name}.salun.safetensors")


def erasure_of(model: Model, options: CompareOptions, job: Job, tuned: Mapping[str, Any], folder: Path) -> Erasure:
    """A job with its options, and what is stored of it.

    Args:
        tuned: Values of a search.
        folder: Of the comparison.

    Raises:
        ConfigError: The options cannot work, or the job's folder holds something else.
    """
    chosen = job_options(model, options, job, tuned)
    plan = make_plan(model.settings, model.name, job.concept, chosen)
    place = folder / "jobs" / job.name
    return Erasure(job, chosen, plan, place, _stored(model, plan, place))


def _stored(model: Model, plan: Plan, place: Path) -> dict[str, Any] | None:
    """The record of an erasure in its folder; None if there is none."""
    shown = f"jobs/{place.name}"
    if place.is_symlink():
        raise foreign(shown, "it is a link")
    try:
        check_links(place)
        if not os.path.lexists(place / "run.json"):
            return None
        stored = read_run(place)
        record_of(model, plan, [], place).check_resumes(stored)
    except DataError as error:
        raise foreign(f"{shown}/run.json", error.__cause__ or error) from error
    except ConfigError as error:
        raise foreign(shown, error.message) from error
    return stored


def foreign(name: str, why: object) -> ConfigError:
    """The error for a part of a comparison's folder that this comparison did not write. name: within the folder."""
    return ConfigError(
        f"holds {name[:100]}, which this comparison did not write: {why}",
        option="run_dir",
        advice="Remove it, and it is made again; or choose another folder",
        code="foreign-part",
    )
