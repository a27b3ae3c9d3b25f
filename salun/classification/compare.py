"""A comparison: several methods with several seeds, each compared with Retrain, and the table of the results.

A job's result is a small file in the run folder's `jobs/` (see `jobs.py`), so that a comparison that was stopped at any
moment resumes with the jobs that are left. Original models and Retrain models come from the cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from salun.classification.data import ImageData, data_of
from salun.classification.experiment import ExperimentSetup, facts_of, setup_of
from salun.classification.jobs import Job, JobRunner, Kind, ResultStore
from salun.classification.models import new_model, weights_digest
from salun.classification.plan import forget_of
from salun.classification.search import check_search, merged, next_round, of_one_seed, rounds, with_value
from salun.classification.splits import make_split, with_forget
from salun.classification.stages import comparison_stages
from salun.classification.table import Results, table_of, tables_of
from salun.classification.unlearn_options import NOT_COMPARED, CompareOptions, UnlearnOptions
from salun.compute.device import pick_device
from salun.display import shown
from salun.errors import ConfigError
from salun.evaluation.retrain_verdict import verdict_on_comparison
from salun.methods import METHODS
from salun.options import MASKS
from salun.progress import Event, Progress, Stage
from salun.report.classification import comparison_page
from salun.runs.cache import Cache
from salun.runs.record import RunRecord


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method, and a mask or density other than its default (None: the default)."""

    name: str
    method: str
    mask: str | None = None
    density: float | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison. metrics: see `table_of`."""

    metrics: dict[str, Any]
    record: RunRecord


def variant_of(text: str) -> Variant:
    """METHOD[/MASK][@DENSITY]. Raises ConfigError for anything else, or a mask for a method that has none."""
    match = re.fullmatch(r"([a-z0-9-]+)(?:/([a-z-]+))?(?:@([0-9.e-]+))?", text.strip().lower())
    if match is None or match[1] not in METHODS["classification"] or match[1] == "retrain":
        known = ", ".join(name for name in METHODS["classification"] if name != "retrain")
        raise ConfigError(
            f"has {text!r}, but must have METHOD, METHOD/MASK or METHOD@DENSITY with METHOD one of {known}",
            option="methods",
        )
    method, mask = METHODS["classification"][match[1]], match[2]
    if mask is not None and (not method.takes_mask or mask not in MASKS):
        why = f"must be one of {', '.join(MASKS)}" if method.takes_mask else f"the method {method.title} has none"
        raise ConfigError(f"has {text!r} with the mask {mask}, but {why}", option="methods")
    try:
        density = None if match[3] is None else float(match[3])
    except ValueError as error:
        raise ConfigError(f"has {text!r}, but {match[3]} is not a number", option="methods") from error
    if density is not None and (not 0 < density <= 1 or (mask or method.mask) == "full"):
        raise ConfigError(
            f"has {text!r}, but a density must be above 0, at most 1, and of a mask that is not full", option="methods"
        )
    return Variant(match[0], match[1], mask, density)


def variants_of(options: CompareOptions) -> list[Variant]:
    """The rows of the table, in order; by default of all methods that fit the forget set.

    options: as of `with_class_named`. Raises ConfigError for an invalid or repeated variant.
    """
    of_class = (options.forget or "").startswith("class:")
    others = [
        name
        for name, method in METHODS["classification"].items()
        if name not in ("retrain", "salun") and (of_class or not method.whole_classes)
    ]
    variants = [variant_of(text) for text in options.methods or ["salun", *others]]
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"has {twice} twice", option="methods")
    return variants


def jobs_of(options: CompareOptions, variants: Sequence[Variant]) -> dict[Kind, list[Job]]:
    """All jobs by kind, except for later rounds of the search: a Retrain for each seed (and one of another seed, for
    the noise floor), the first round of each search, and each unlearning, whose searched value is filled in later.
    """
    base = {item.name: getattr(options, item.name) for item in fields(UnlearnOptions)}
    base |= dict.fromkeys(("mask", "lr")) | {"retrain": "no", "search": False}
    seeds = range(options.seed, options.seed + options.seeds)
    jobs: dict[Kind, list[Job]] = {"retrain": [], "again": [], "search": [], "unlearn": []}
    for seed in seeds:
        job_options = UnlearnOptions(**{**base, "method": "ft", "seed": seed, "epochs": None})
        jobs["retrain"].append(Job(f"retrain-{seed}", "retrain", "retrain", job_options))
        if options.noise_floor:
            jobs["again"].append(Job(f"again-{seed}", "again", "retrain", job_options))
    for seed in seeds:
        for variant in variants:
            changes: dict[str, Any] = {"method": variant.method, "mask": variant.mask, "seed": seed}
            if variant.density is not None:
                changes["density"] = variant.density
            if not METHODS["classification"][variant.method].trains:
                changes["epochs"] = None
            job_options = UnlearnOptions(**{**base, **changes})
            name = f"{re.sub('[/@]', '-', variant.name)}-{seed}"
            jobs["unlearn"].append(Job(name, "unlearn", variant.name, job_options))
            if options.search and seed - options.seed < options.search_seeds:
                jobs["search"].append(Job(f"search-{name}", "search", variant.name, job_options))  # without values yet
    return jobs


def settings_of(
    options: CompareOptions, jobs: Mapping[Kind, Sequence[Job]], cache: Cache, data: ImageData
) -> dict[str, ExperimentSetup]:
    """variant → its setting at the first seed. Raises ConfigError before any job runs if options cannot work."""
    settings = {
        job.variant: setup_of(job.options, cache, data) for job in jobs["unlearn"] if job.options.seed == options.seed
    }
    for setting in settings.values() if options.search else ():
        check_search(setting.options, setting.data, setting.split)
    return settings


def with_class_named(options: CompareOptions, data: ImageData) -> CompareOptions:
    """The options with what to forget, a class by its name, where they give its number. Raises as `with_forget`."""
    split = make_split(data, options.test_share, options.validation_share, options.split_seed)
    return replace(options, forget=with_forget(split, data, forget_of(options, data), options.seed).forgetting)


_NO_SEARCH = {"chosen": 0}  # for a method whose option is not searched


def compare(
    options: CompareOptions | None = None,
    *,
    progress: Progress | None = None,
    run_dir: Path | str | None = None,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.classification.compare",
    executor: Executor | None = None,
    **given: Any,
) -> Comparison:
    """Unlearn by several methods with several seeds, and compare each with Retrain.

    given: fields of `CompareOptions`, over `options`. run_dir: gets `jobs/`, `report.html` and `run.json`. resume:
    continue the unfinished comparison in run_dir. executor: runs the jobs in place of `workers` processes, see
    `JobRunner`, such as dask's `Client(…).get_executor(pure=False)` on several machines. With several workers, a Python
    script that calls this needs the usual `if __name__ == "__main__":`, as its processes are spawned. A method that
    diverges at some seeds is reported with the remaining seeds. One that fails at every seed, or for which the search
    finds no value, gets a row with the reason. Raises SalunError, `Cancelled` if `progress` does.
    """
    options = CompareOptions(**{**asdict(options or CompareOptions()), **given})
    cache = cache or Cache.of_user()
    if resume and run_dir is None:
        raise ConfigError("needs the run folder of the comparison", option="resume", advice="Set {run_dir}")
    data = data_of(options)
    options = with_class_named(options, data)
    variants = variants_of(options)
    jobs = jobs_of(options, variants)
    checked = settings_of(options, jobs, cache, data)
    first = next(iter(checked.values()))
    folder = Path(run_dir) if run_dir is not None else None
    recorded = {name: value for name, value in asdict(options).items() if name not in NOT_COMPARED}
    recorded["methods"] = [variant.name for variant in variants]
    facts = {**facts_of(first.options, first.data, first.split), "weights": _fresh_weights(first)}
    record = RunRecord(folder, command, recorded, options.seed, str(first.data.device), facts, resume)
    with shown(progress) as progress, record.running():
        store = ResultStore(folder / "jobs" if folder is not None else None, record, len(data.classes))
        stages = comparison_stages(options, [(setting.options, setting.split) for setting in checked.values()])
        progress(Event(Stage.PLANNING, stages=stages))
        with JobRunner(store, cache, data, workers_of(options), progress, executor) as runner:
            with record.stage(Stage.RETRAINING):
                exact = runner.done(jobs["retrain"], Stage.RETRAINING)
                again = runner.done(jobs["again"], Stage.RETRAINING)
            with record.stage(Stage.SEARCHING):
                searched = _searched(runner, jobs["search"], checked)
            with record.stage(Stage.UNLEARNING):
                todo = [job for job in jobs["unlearn"] if searched.get(job.variant, _NO_SEARCH)["chosen"] is not None]
                done = runner.done([_with(job, searched.get(job.variant)) for job in todo], Stage.UNLEARNING)
        unlearned = _with_failed_searches(jobs["unlearn"], done, searched)
        results = {v.name: _by_seed(jobs["unlearn"], unlearned, v.name) for v in variants}
        exact_results, floor = _by_seed(jobs["retrain"], exact), _by_seed(jobs["again"], again)
        record.metrics = _metrics_of(results, exact_results, searched, variants, floor)
        record.notes = first.notes + store.notes
        record.notes += _failures({"Retrain": exact_results, "Retrain of another seed": floor, **results})
        if folder is not None:
            rows = {name: _resolved(setting) for name, setting in checked.items()}
            page = {**record.as_json(), "status": "done"}, tables_of(record.metrics), rows, results, exact_results
            comparison_page(*page, data.classes).save(folder / "report.html")
    return Comparison(record.metrics, record)


def _metrics_of(
    results: Mapping[str, Results],
    exact: Results,
    searched: Mapping[str, Mapping[str, Any]],
    variants: Sequence[Variant],
    floor: Results,
) -> dict[str, Any]:
    """The table, and the verdict on it."""
    table = table_of(results, exact, searched, {variant.name: title_of(variant) for variant in variants}, floor)
    verdict = verdict_on_comparison(table)
    return {**table, "verdict": verdict.as_json() if verdict is not None else None}


def _searched(
    runner: JobRunner, first: Sequence[Job], settings: Mapping[str, ExperimentSetup]
) -> dict[str, dict[str, Any]]:
    """variant → the result of its search. All variants search at the same time, round by round; a round of a variant
    tries the same values at all of its seeds.
    """
    searching = {name: rounds(settings[name].options) for name in dict.fromkeys(job.variant for job in first)}
    values = {name: next(steps) for name, steps in searching.items()}
    searches: dict[str, dict[str, Any]] = {}
    round_number = 0
    while values:
        jobs = {job: jobs_of_round(job, values[job.variant], round_number) for job in first if job.variant in values}
        results = runner.done([each for group in jobs.values() for each in group], Stage.SEARCHING)
        for name in values:
            seeds = [of_one_seed([results[each.name] for each in jobs[job]]) for job in jobs if job.variant == name]
            searches[name] = merged(seeds, searches.get(name))
        next_rounds = {
            name: next_round(searching[name], searches[name]) for name in values if "error" not in searches[name]
        }
        values = {name: group for name, group in next_rounds.items() if group}
        round_number += 1
    return searches


def jobs_of_round(job: Job, values: Sequence[float], number: int) -> list[Job]:
    """The jobs that try these values at a search's seed: one for each, so that a killed one loses no other's training.

    One for all of a method that does not train: its trials are short, and share what they count.
    """
    if not METHODS["classification"][job.options.method].trains:
        return [replace(job, name=f"{job.name}-{number}", values=tuple(values))]
    return [replace(job, name=f"{job.name}-{number}-{i}", values=(value,)) for i, value in enumerate(values)]


def _with_failed_searches(
    jobs: Sequence[Job], done: Mapping[str, dict[str, Any]], searched: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The results of all jobs, those of variants for which the search found no value with that reason."""
    return {
        job.name: done.get(job.name) or {"error": f"the search found no value ({searched[job.variant]['remark']})"}
        for job in jobs
    }


def _by_seed(
    jobs: Sequence[Job], results: Mapping[str, dict[str, Any]], variant: str = "retrain"
) -> dict[int, dict[str, Any]]:
    return {job.options.seed: results[job.name] for job in jobs if job.variant == variant}


def _fresh_weights(setting: ExperimentSetup) -> str:
    """A hash of the model before training, because the options give only the name of a pretrained model."""
    options = setting.options
    model = new_model(
        options.model or "", setting.data.channels, len(setting.data.classes), options.seed, options.allow_pickle
    )
    return weights_digest(model)


def title_of(variant: Variant) -> str:
    """A variant's name in the table."""
    parts = [variant.mask or "", f"density {variant.density:g}" if variant.density is not None else ""]
    details = ", ".join(part for part in parts if part)
    return METHODS["classification"][variant.method].title + (f" ({details})" if details else "")


def workers_of(options: CompareOptions) -> int:
    """The number of processes: `workers`, else one per core that this process may use; one on a GPU."""
    if options.workers is not None:
        return options.workers
    if pick_device(options.device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolved(setting: ExperimentSetup) -> dict[str, Any]:
    """What the report shows of a variant."""
    method = METHODS["classification"][setting.options.method]
    return {"method": method.title, "mask": setting.options.mask, "density": setting.options.density}


def _with(job: Job, chosen: Mapping[str, Any] | None) -> Job:
    if chosen is None:
        return job
    return replace(job, options=with_value(job.options, chosen["option"], chosen["chosen"]))


def _failures(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    return [
        f"{name}, seed {seed}: {result['error']}"
        for name, by_seed in results.items()
        for seed, result in by_seed.items()
        if "error" in result
    ]
