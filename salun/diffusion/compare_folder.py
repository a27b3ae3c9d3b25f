"""What a comparison's folder holds of it already: each erasure is a run folder of its own in `jobs/`.

The folder may be untrusted input: what is read from it is checked, and what another run made is rejected, so that no
table mixes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from salun.diffusion.compare_jobs import Job, job_options, jobs_of, plans_of
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.context import record_of
from salun.diffusion.fit import as_recorded
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.errors import ConfigError, DataError
from salun.runs.folder import check_links
from salun.runs.reading import read_run
from salun.runs.record import RunRecord


def comparison_record(
    model: Model, options: CompareOptions, folder: Path, command: str = "", resume: bool = False
) -> RunRecord:
    """The record of a comparison; nothing is written yet."""
    recorded = {item.name: getattr(options, item.name) for item in fields(options) if item.name != "run_dir"}
    (plan,) = plans_of(model, options, jobs_of(options)[:1])
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
    stored = _stored(place)
    if stored is not None:
        try:
            plan = make_plan(model.settings, model.name, job.concept, as_recorded(chosen, stored["options"]))
            record_of(model, plan, [], place).check_resumes(stored)
        except ConfigError as error:
            raise foreign(f"jobs/{place.name}", error.message) from error
    return Erasure(job, chosen, plan, place, stored)


def _stored(place: Path) -> dict[str, Any] | None:
    """The record of an erasure in its folder; None if there is none."""
    shown = f"jobs/{place.name}"
    if place.is_symlink():
        raise foreign(shown, "it is a link")
    try:
        check_links(place)
        if not os.path.lexists(place / "run.json"):
            return None
        return read_run(place)
    except DataError as error:
        raise foreign(f"{shown}/run.json", error.__cause__ or error) from error
    except ConfigError as error:
        raise foreign(shown, error.message) from error


def foreign(name: str, why: object) -> ConfigError:
    """The error for a part of a comparison's folder that this comparison did not write. name: within the folder."""
    return ConfigError(
        f"holds {name[:100]}, which this comparison did not write: {why}",
        option="run_dir",
        advice="Remove it, and it is made again; or choose another folder",
        code="foreign-part",
    )
