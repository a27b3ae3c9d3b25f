"""A comparison: methods × concepts × seeds on one model, with the same samples and originals, as one table.

Each erasure is a run folder of its own in `jobs/`, so that a comparison that was stopped resumes with what is left.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from salun.delta.delta import Delta
from salun.diffusion.attack import attack_compared
from salun.diffusion.compare_jobs import (
    Job,
    attack_options,
    job_options,
    job_stages,
    jobs_of,
    plans_of,
    search_jobs,
    search_stages,
)
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.compare_table import Result, cells_of, score_of, table_of
from salun.diffusion.context import open_run, record_of
from salun.diffusion.erase import erase, unlearn
from salun.diffusion.eval_models import Compared
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept
from salun.display import shown
from salun.errors import Cancelled, ConfigError, SalunError
from salun.files import write_bytes
from salun.methods import METHODS
from salun.options import from_mapping
from salun.progress import Event, Progress, Stage, in_jobs
from salun.report.methods import comparison_page
from salun.runs.cache import Cache
from salun.runs.record import RunRecord
from salun.untrusted import read_json_object

FACTOR, TRIALS = 3.0, 5  # of a search: from one value to the next, and values at most


@dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison. table: see `table_of`."""

    table: dict[str, Any]
    record: RunRecord


def compare(
    options: CompareOptions,
    *,
    model: Model | None = None,
    progress: Progress | None = None,
    run_dir: Path | str,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.diffusion.compare",
) -> Comparison:
    """Erase each concept by each method with each seed, and put the results side by side.

    Args:
        options: `concept` names concepts that are erased one at a time.
        model: Loaded; by default the one that the options name.
        run_dir: Gets `jobs/`, `compare.csv`, `report.html` and `run.json`.
        resume: Continue the unfinished comparison in run_dir.

    Raises:
        ConfigError: An option cannot work; checked for every method before the first erasure.
        Cancelled: From `progress`.
    """
    variants, jobs, searches = options.variants, jobs_of(options), search_jobs(options)
    model, folder = model or load_with(options.model or "shapes", options), Path(run_dir)
    cache = cache or Cache.of_user()
    plans = plans_of(model, options, jobs)
    stages = [*search_stages(plans_of(model, options, searches)), *job_stages(options, plans)]
    recorded = {item.name: getattr(options, item.name) for item in fields(options) if item.name != "run_dir"}
    facts = record_of(model, plans[0], [], None).facts  # with the content of the user's images
    record = RunRecord(folder, command, recorded, options.seed, str(model.device), facts, resume)
    with shown(progress) as progress, record.running():
        parts = in_jobs(progress, stages, resumed=record.resumed > 0)
        tuned = _searched(model, options, searches, folder, parts, cache)
        results = []
        for i, (job, part) in enumerate(zip(jobs, parts, strict=True), len(searches) + 1):
            part(Event(Stage.COMPARING, message=f"{i} of {len(stages)}: {job.name}"))
            results.append(_done(model, options, job, tuned.get(job.variant.name, {}), folder, part, cache))
        record.metrics = table_of(variants, results)
        record.notes += [f"{result.job}: {result.error}" for result in results if result.error]
        record.more["searched"] = tuned
        write_bytes(folder / "compare.csv", _csv(results).encode())
        images = {concept: _images(record, results, folder / "jobs", concept) for concept in options.concept}
        page = comparison_page({**record.as_json(), "status": "done"}, cells_of(record.metrics), images)
        page.save(folder / "report.html")
    return Comparison(record.metrics, record)


def _done(
    model: Model,
    options: CompareOptions,
    job: Job,
    tuned: Mapping[str, Any],
    folder: Path,
    progress: Progress,
    cache: Cache,
) -> Result:
    """The result of one erasure, which is made unless it is there already."""
    place = folder / "jobs" / job.name
    chosen = job_options(model, options, job, tuned)
    record = read_part(place / "run.json")
    if record.get("status") != "done":
        place.parent.mkdir(parents=True, exist_ok=True)
        delta = f"{place}.salun.safetensors"
        try:
            erase(
                model, job.concept, chosen, progress=progress, run_dir=place, outputs=[delta], resume=True, cache=cache,
            )  # fmt: skip
        except Cancelled:
            raise
        except SalunError as error:
            return Result(job.name, job.variant.name, job.concept, job.seed, error=str(error))
        record = read_part(place / "run.json")
    plan = make_plan(model.settings, model.name, job.concept, chosen)
    attacks = _attacked(model, options, job, plan.options, f"{place}.salun.safetensors", progress)
    try:
        attribute = plan.subjects[0].attribute
        return Result.of(job.name, job.variant.name, job.concept, job.seed, record, attribute, attacks)
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(place) from error


def _attacked(
    model: Model, options: CompareOptions, job: Job, used: EraseOptions, delta: str, progress: Progress
) -> dict[str, float]:
    """Attack → its ASR in percent, on the model of a finished job; attacks that fail are left out."""
    if not options.attack:
        return {}
    loaded = Delta.load(Path(delta))
    change = loaded.apply(model.original())
    compared = Compared(job.name, model, model, [Concept(job.concept)], used, change, loaded.result_hash)
    made = attack_compared(job.name, compared, attack_options(options, job.seed), progress).attacked
    return {each.chosen.text: 100 * float(each.result.shown.mean()) for each in made if each.result is not None}


def read_part(path: Path) -> dict[str, Any]:
    """A JSON object of this comparison's folder, which may be untrusted input; empty if there is none.

    Raises ConfigError for anything else.
    """
    try:
        return read_json_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise _foreign(path) from error


def _foreign(path: Path) -> ConfigError:
    what = f"holds {path.name[:60]}, which no comparison wrote"
    return ConfigError(what, option="run_dir", advice="Choose another folder")


def _searched(
    model: Model,
    options: CompareOptions,
    searches: Sequence[Job],
    folder: Path,
    parts: Iterator[Progress],
    cache: Cache,
) -> dict[str, dict[str, Any]]:
    """variant → the value that does best on the training prompts of the first concept at the first seed.

    Args:
        parts: Gives a progress for each search.
    """
    if not searches:
        return {}
    path = folder / "search.json"
    tuned = read_part(path)
    for values in tuned.values():
        from_mapping(EraseOptions, values, str(path))  # untrusted input
    for job, progress in zip(searches, parts, strict=False):
        variant = job.variant
        option = METHODS["diffusion"][variant.method].tunes
        if variant.name in tuned or option is None:
            continue
        center = getattr(job_options(model, options, job, {}), option) or getattr(model.settings.recipe, option)
        tried: dict[float, float] = {}
        while (value := next_value(tried, center)) is not None:
            chosen = job_options(model, options, job, {option: value})
            progress(Event(Stage.SEARCHING, message=f"{variant.name}: {option} {value:.3g}"))
            tried[value] = _score(model, job.concept, chosen, progress, cache)
        tuned[variant.name] = {option: max(tried, key=lambda each: tried[each])}
        write_bytes(path, json.dumps(tuned, indent=1).encode())
    return tuned


def next_value(tried: Mapping[float, float], center: float) -> float | None:
    """The next value of a search: the center, both sides of it, and on beyond the best while that is at an end.

    Args:
        tried: Value → its score, in the order of trials; more is better.

    Returns:
        None at the end of the search.
    """
    for value in (center, center / FACTOR, center * FACTOR):
        if value not in tried:
            return value
    best = max(tried, key=lambda value: tried[value])
    if len(tried) >= TRIALS or best not in (min(tried), max(tried)):
        return None
    return best * FACTOR if best == max(tried) else best / FACTOR


def _score(model: Model, concept: str, options: EraseOptions, progress: Progress, cache: Cache) -> float:
    """How well an erasure does on images of its training prompts; of one that fails, nothing."""
    try:
        with open_run(model, concept, options, progress=progress, cache=cache, command="search") as context:
            return score_of(unlearn(replace(context, plan=context.plan.on_training_prompts())).metrics) or 0.0
    except Cancelled:
        raise
    except SalunError:
        return 0.0


def _images(record: RunRecord, results: Sequence[Result], jobs: Path, concept: str) -> dict[str, bytes]:
    """Title of a method → PNG of its images of a concept at the first seed."""
    paths = {
        f"{record.metrics[each.variant]['title']}: {each.outcome}": jobs / each.job / "before_after.png"
        for each in results
        if each.concept == concept and each.seed == record.seed and not each.error
    }
    return {title: path.read_bytes() for title, path in paths.items() if path.is_file()}


def _csv(results: Sequence[Result]) -> str:
    """A row for each erasure."""
    names = list(dict.fromkeys(name for result in results for name in result.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "concept", "seed", *names, "error"])
    for each in results:
        writer.writerow([each.variant, each.concept, each.seed, *map(each.values.get, names), each.error])
    return text.getvalue()
