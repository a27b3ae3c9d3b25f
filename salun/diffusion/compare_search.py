"""The search of a comparison with the budget `tuned`: one value for each method, by images of training prompts alone.

Every trial is stored in `search.json` when it ends, so that a search that was stopped resumes with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from salun.diffusion.compare_folder import foreign
from salun.diffusion.compare_jobs import Job, job_options, search_jobs
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.compare_table import score_of
from salun.diffusion.context import open_run
from salun.diffusion.erase import unlearn
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ConfigError, MaskError, TrainingError
from salun.files import write_bytes
from salun.methods import METHODS
from salun.progress import Event, Progress, Stage
from salun.runs.cache import Cache
from salun.untrusted import read_json_object

FACTOR, FEWEST, TRIALS = 3.0, 3, 5  # from one value to the next; values at least, and at most
MOST = 10_000.0  # of a score, a percentage that a detector's correction may take beyond 100
FILE = "search.json"


@dataclass
class Search:
    """The search of one variant, with the first concept at the first seed.

    Args:
        option: What it tries values of; center: the first of these.
        tried: Value → its score, in the order of trials.
    """

    job: Job
    option: str
    center: float
    tried: dict[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """Of the values tried, the one with the best score; of equal ones the first."""
        return max(self.tried, key=lambda value: self.tried[value])


def searched(
    model: Model, options: CompareOptions, folder: Path, key: str, parts: Iterator[Progress], cache: Cache
) -> list[Search]:
    """The searches of all variants, with the trials that are left made now; none without the budget `tuned`.

    Args:
        folder: Of the comparison.
        key: What its results depend on; trials stored with another one are not its own.
        parts: Gives a progress for each search.

    Raises:
        ConfigError: `search.json` is not of this comparison.
    """
    searches = stored_searches(model, options, folder, key)
    for search, progress in zip(searches, parts, strict=False):
        while (value := next_value(search.tried, search.center)) is not None:
            name = search.job.variant.name
            progress(Event(Stage.SEARCHING, message=f"{name}: {search.option} {value:.3g}"))
            search.tried[value] = _score(model, options, search, value, progress, cache)
            _store(folder / FILE, searches, key)
    return searches


def tuned_by(searches: Sequence[Search]) -> dict[str, dict[str, Any]]:
    """variant → the value that does best, of searches that are finished."""
    finished = (search for search in searches if next_value(search.tried, search.center) is None)
    return {search.job.variant.name: {search.option: search.best} for search in finished}


def stored_searches(model: Model, options: CompareOptions, folder: Path, key: str) -> list[Search]:
    """The searches of all variants as far as they are stored. Raises ConfigError as `searched` does."""
    searches = [_search_of(model, options, job) for job in search_jobs(options)]
    path = folder / FILE
    if not searches:
        return []
    if not path.exists() and not path.is_symlink():
        return searches
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        stored = read_json_object(path)
        if stored.get("comparison") != key:
            raise ValueError("it belongs to another model, version or set of options")
        _take(searches, stored.get("tried"))
    except (OSError, ValueError) as error:
        raise foreign(FILE, error.strerror if isinstance(error, OSError) else error) from error
    return searches


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


def _search_of(model: Model, options: CompareOptions, job: Job) -> Search:
    option = METHODS["diffusion"][job.variant.method].tunes
    assert option is not None  # of a job that is searched
    center = getattr(job_options(model, options, job, {}), option)
    return Search(job, option, float(center if center is not None else getattr(model.settings.recipe, option)))


def _take(searches: Sequence[Search], stored: Any) -> None:
    """Add stored trials, which may be untrusted input. Raises ValueError for any that the searches do not make."""
    known = {search.job.variant.name: search for search in searches}
    if not isinstance(stored, dict) or not stored.keys() <= known.keys():
        raise ValueError("it names methods that are not searched")
    for name, trials in stored.items():
        search = known[name]
        if not isinstance(trials, list):
            raise ValueError(f"the trials of {name[:60]} are not a list")
        for trial in trials:
            if not isinstance(trial, list) or [type(of) in (int, float) for of in trial] != [True, True]:
                raise ValueError(f"a trial of {name[:60]} is not a value and its score")
            value, score = map(float, trial)
            if not 0 <= score <= MOST:
                raise ValueError(f"a trial of {name[:60]} has the score {score:g}, but it must be from 0 to {MOST:g}")
            if value != next_value(search.tried, search.center):
                raise ValueError(f"a trial of {name[:60]} has {value:g}, which the search does not try next")
            search.tried[value] = score


def _store(path: Path, searches: Sequence[Search], key: str) -> None:
    tried = {search.job.variant.name: [list(pair) for pair in search.tried.items()] for search in searches}
    write_bytes(path, json.dumps({"comparison": key, "tried": tried}, indent=1).encode())


def _score(
    model: Model, options: CompareOptions, search: Search, value: float, progress: Progress, cache: Cache
) -> float:
    """How well an erasure does on images of its training prompts; one that the value makes fail scores nothing."""
    try:
        chosen = job_options(model, options, search.job, {search.option: value})
        with open_run(model, search.job.concept, chosen, progress=progress, cache=cache, command="search") as context:
            run = unlearn(replace(context, plan=context.plan.on_training_prompts()))
            return min(max(score_of(run.metrics) or 0.0, 0.0), MOST)
    except (TrainingError, MaskError, ConfigError):
        return 0.0
