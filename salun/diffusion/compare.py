"""A comparison: methods × concepts × seeds on one model, with the same samples and originals, as one table.

Each erasure is a run folder of its own in `jobs/`, so that a comparison that was stopped resumes with what is left.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salun.delta.delta import Delta
from salun.diffusion.attack import attack_compared
from salun.diffusion.compare_folder import Erasure, comparison_record, erasure_of, foreign
from salun.diffusion.compare_jobs import (
    attack_options,
    job_stages,
    jobs_of,
    paper_notes,
    passes_of,
    plans_of,
    search_jobs,
    search_stages,
    with_methods,
)
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.compare_search import searched, tuned_by
from salun.diffusion.compare_table import Result, attack_cells, cells_of, table_of
from salun.diffusion.erase import erase
from salun.diffusion.eval_models import Compared
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.prompts.concepts import Concept
from salun.display import shown
from salun.errors import Cancelled, SalunError
from salun.files import sha256_file, write_bytes
from salun.progress import Event, Progress, Stage, in_jobs
from salun.report.methods import comparison_page
from salun.runs.cache import Cache
from salun.runs.reading import read_run
from salun.runs.record import RunRecord
from salun.untrusted import read_bytes

IMAGE_BYTES = 200_000_000  # of before_after.png


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
        resume: Continue the unfinished comparison in run_dir, or make what failed in a finished one again.

    Raises:
        ConfigError: An option cannot work, or run_dir holds what another comparison or nobody's wrote; both are checked
            for every method before the first erasure.
        Cancelled: From `progress`.
    """
    jobs_of(options)  # checked before a model is loaded
    model, folder = model or load_with(options.model or "shapes", options), Path(run_dir)
    options, notes = with_methods(model, options)
    jobs, searches = jobs_of(options), search_jobs(options)
    cache, plans = cache or Cache.of_user(), plans_of(model, options, jobs)
    notes += paper_notes(options, jobs, plans)
    stages = search_stages(plans_of(model, options, searches)) + job_stages(model, options, plans)
    record = comparison_record(model, options, folder, command, resume)
    with shown(progress) as progress, record.running():
        parts = in_jobs(progress, stages, resumed=record.resumed > 0)
        record.notes += notes
        tried = searched(model, options, folder, record.fingerprint, parts, cache)
        tuned = tuned_by(tried)
        record.more["searched"] = tuned
        if searches:
            record.more["tried"] = {
                each.job.variant.name: [list(pair) for pair in each.tried.items()] for each in tried
            }
        erasures = [erasure_of(model, options, job, tuned.get(job.variant.name, {}), folder) for job in jobs]
        results = []
        for i, (erasure, part) in enumerate(zip(erasures, parts, strict=True), len(searches) + 1):
            part(Event(Stage.COMPARING, message=f"{i} of {len(stages)}: {erasure.job.name}"))
            results.append(_done(model, options, erasure, part, cache))
        record.metrics = table_of(options.variants, results)
        record.notes += [f"{each.job}: {why}" for each in results for why in (each.error, *each.notes) if why]
        record.more["failed"] = [result.job for result in results if result.error]
        write_bytes(folder / "compare.csv", _csv(results).encode())
        images = {concept: _images(record, results, folder / "jobs", concept) for concept in options.concept}
        texts = cells_of(record.metrics), attack_cells(record.metrics)
        page = comparison_page({**record.as_json(), "status": "done"}, *texts, images)
        page.save(folder / "report.html")
    return Comparison(record.metrics, record)


def _done(model: Model, options: CompareOptions, erasure: Erasure, progress: Progress, cache: Cache) -> Result:
    """The result of one erasure, which is made unless it is there already."""
    job, stored = erasure.job, erasure.stored
    if not erasure.done:
        erasure.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            erase(
                model, job.concept, erasure.options, progress=progress, run_dir=erasure.folder,
                outputs=[str(erasure.delta)], force=True, resume=True, cache=cache,
            )  # fmt: skip
        except Cancelled:
            raise
        except SalunError as error:
            return Result(job.name, job.variant.name, job.concept, job.seed, error=str(error))
        stored = read_run(erasure.folder)
    assert stored is not None
    attacks, failed = _attacked(model, options, erasure, stored, progress, cache)
    try:
        result = Result.of(
            job.name, job.variant.name, job.concept, job.seed, stored, erasure.plan.subjects[0].attribute, attacks,
            passes_of(erasure.plan), sum(p.numel() for p in model.parameters().values()),
        )  # fmt: skip
        return replace(result, notes=failed)
    except KeyError as error:
        raise foreign(f"jobs/{job.name}/run.json", f"it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise foreign(f"jobs/{job.name}/run.json", error) from error


def _attacked(
    model: Model,
    options: CompareOptions,
    erasure: Erasure,
    stored: Mapping[str, Any],
    progress: Progress,
    cache: Cache,
) -> tuple[dict[str, float], list[str]]:
    """Attack → its ASR in percent, on the model of a finished job; and why others failed."""
    if not options.attack:
        return {}, []
    job, delta = erasure.job, erasure.delta
    written = [entry.get("sha256") for entry in stored["outputs"] if entry["kind"] == "delta"]
    if not delta.is_file() or [sha256_file(delta)] != written:
        raise foreign(f"jobs/{delta.name}", "it is not the delta that its run.json names")
    loaded = Delta.load(delta)
    change = loaded.apply(model.original())
    compared = Compared(
        job.name, model, model, [Concept(job.concept)], erasure.plan.options, change, loaded.result_hash
    )
    chosen = attack_options(options, job.seed)
    made = attack_compared(job.name, compared, chosen, progress, cache=cache).attacked
    rates = {each.chosen.text: 100 * float(each.result.shown.mean()) for each in made if each.result is not None}
    return rates, [f"the attack {each.chosen.text} failed: {each.error}" for each in made if each.error]


def _images(record: RunRecord, results: Sequence[Result], jobs: Path, concept: str) -> dict[str, bytes]:
    """Title of a method → PNG of its images of a concept at the first seed."""
    paths = {
        f"{record.metrics[each.variant]['title']}: {each.outcome}": jobs / each.job / "before_after.png"
        for each in results
        if each.concept == concept and each.seed == record.seed and not each.error
    }
    return {title: read_bytes(path, IMAGE_BYTES) for title, path in paths.items() if path.is_file()}


def _csv(results: Sequence[Result]) -> str:
    """A row for each erasure."""
    names = list(dict.fromkeys(name for result in results for name in result.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "concept", "seed", *names, "error"])
    for each in results:
        writer.writerow([each.variant, each.concept, each.seed, *map(each.values.get, names), each.error])
    return text.getvalue()
