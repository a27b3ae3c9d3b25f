"""What a comparison would do, and how long that takes, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salun.diffusion.compare_folder import comparison_record, erasure_of
from salun.diffusion.compare_jobs import (
    USUAL_TRIALS,
    job_stages,
    jobs_of,
    paper_notes,
    plans_of,
    search_jobs,
    search_stages,
    with_methods,
)
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.compare_search import FEWEST, TRIALS, Search, next_value, stored_searches, tuned_by
from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.estimate import measured_pace, seconds_of
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import Plan
from salun.diffusion.stages import erasure_stages
from salun.methods import METHODS
from salun.progress import Event, Progress, Stage, silent


def preview_comparison(
    options: CompareOptions,
    run_dir: Path,
    *,
    model: Model | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The jobs that `compare` would do with these arguments, and their time by passes measured here.

    Nothing is written.

    Args:
        run_dir: Of the comparison; its finished jobs and trials are not counted.
        model: Loaded; by default the one that the options name.

    Returns:
        "jobs": name, method, concept, seed, steps (0: in closed form), whether it is done, and least and most seconds
        of each; "searches": variant, option, values that were tried, and least and most seconds that are left of each;
        "least" and "most" of all that is left; "notes".

    Raises what `compare` would before its first erasure.
    """
    jobs_of(options)  # checked before a model is loaded
    model = model or load_with(options.model or "shapes", options)
    options, notes = with_methods(model, options)
    listed = jobs_of(options)
    key = comparison_record(model, options, run_dir).fingerprint
    searches = stored_searches(model, options, run_dir, key)
    tuned = tuned_by(searches)
    erasures = [erasure_of(model, options, job, tuned.get(job.variant.name, {}), run_dir) for job in listed]
    plans = [erasure.plan for erasure in erasures]
    progress(Event(Stage.MEASURING, message=f"measuring this machine for {model.name}"))
    jobs: list[dict[str, Any]] = []
    with model.temporarily_trainable(), model.configured(plans[0].options):
        pace = measured_pace(model, plans[0])
    for erasure, stages in zip(erasures, job_stages(model, options, plans), strict=True):
        job, plan = erasure.job, erasure.plan
        seconds = seconds_of(batch_size_of(model), plan, stages, pace)
        jobs.append(
            {"name": job.name, "method": METHODS["diffusion"][job.variant.method].title, "concept": job.concept}
            | {"seed": job.seed, "steps": _steps(plan), "done": erasure.done}
            | {end: seconds[end] for end in ("least", "most")}
        )
    search_plans = plans_of(model, options, search_jobs(options))
    trials = [
        _trials(search, seconds_of(batch_size_of(model), plan, stages, pace))
        for search, plan, stages in zip(searches, search_plans, search_stages(search_plans), strict=True)
    ]
    left = [*trials, *(job for job in jobs if not job["done"])]
    return {
        "model": model.name, "device": str(model.device), "run_dir": str(run_dir), "jobs": jobs,
        "searches": trials, "notes": [*notes, *paper_notes(options, listed, plans)],
        "least": sum(job["least"] for job in left), "most": sum(job["most"] for job in left),
    }  # fmt: skip


def _trials(search: Search, seconds: dict[str, Any]) -> dict[str, Any]:
    """What is left of a search.

    Args:
        seconds: Of `USUAL_TRIALS` of its trials.
    """
    tried, finished = len(search.tried), next_value(search.tried, search.center) is None
    least, most = (0, 0) if finished else (max(1, FEWEST - tried), TRIALS - tried)
    return {
        "name": search.job.variant.name, "option": search.option, "tried": tried,
        "least": seconds["least"] * least / USUAL_TRIALS, "most": seconds["most"] * most / USUAL_TRIALS,
    }  # fmt: skip


def _steps(plan: Plan) -> int:
    """Training steps; 0 for a closed form."""
    return sum(cost.steps for cost in erasure_stages(plan) if cost.stage is Stage.TRAINING and cost.backward)
