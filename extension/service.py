"""The operations of the page and the HTTP API, whose input is untrusted: it is checked and confined here."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from salun.diffusion.eval_options import SETS
from salun.errors import ConfigError
from salun.options import MASKS
from salun.runs.folder import STATE, exclusive_lock

from . import environment
from .host import Host
from .inputs import IMAGE_FOLDERS, Inputs
from .job_queue import Queue
from .jobs import Job
from .models import Models
from .paths import confined_file
from .requests import Requests
from .runs import DELTA, Runs

PAGES = {"evaluate": "eval.html", "attack": "attack.html"}  # kind of job → its page
logger = logging.getLogger("salun")


class Service:
    """The jobs, runs and models of one host.

    `requests` starts jobs, which `queue` holds; `runs`, `models` and `inputs` (masks and images) can be chosen in
    forms. The methods are operations on existing jobs and runs.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.runs = Runs(host)
        self.models = Models(host, self.runs)
        self.inputs = Inputs(host.data, self.runs)
        self.queue = Queue(
            host.data / "jobs", host.python, host.gpu_lease, host.changed, host.environment(), self._may_run
        )
        self.requests = Requests(host, self.queue, self.runs, self.models, self.inputs)

    def _may_run(self, job: Job) -> bool:
        """Whether a job that was read from a file writes only in the host's folders, with options of a form."""
        homes = [home for home in (self.host.data, self.host.checkpoints(), self.host.loras()) if home is not None]
        real = [Path(os.path.realpath(home)) for home in homes]
        targets = [*job.outputs, job.options.get("run_dir")]
        if (Path(job.request.get("target") or "") / "run.json").is_file():  # of PAGES, which write there
            targets.append(job.request["target"])
        paths = [Path(os.path.realpath(path)) for path in targets if path]
        within = all(any(home in path.parents for home in real) for path in paths)
        return within and not job.options.get("allow_pickle") and not job.options.get("models_dir")

    def history(self) -> list[dict[str, Any]]:
        """All runs' summaries, the latest first."""
        return self.runs.summaries({job.run for job in self.queue.all() if job.open})

    def choices(self) -> dict[str, list[str]]:
        """Option → the names that a form offers for it; "" for none."""
        models, folders = list(self.models.all()), self.inputs.image_folders()
        return {
            "model": models,
            "against": ["", *models],
            "mask": ["", *MASKS, *self.inputs.mask_names()],
            **{name: ["", *folders] for name in IMAGE_FOLDERS},
            "prompts": self.inputs.prompt_files(),
            "sets": list(SETS),
        }

    def options_of(self, run: str) -> dict[str, Any]:
        """The options of a run as a form shows them, to be loaded again."""
        return self.inputs.options_of(run, {place: title for title, place in self.models.all().items()})

    def preview(self, job: str, name: str) -> Path:
        """A preview image of a job."""
        if name not in self.queue.get(job).previews:
            raise ConfigError(f"there is no preview {name[:80]!r}", code="not-found")
        return confined_file(name, self.queue.folder / job)

    def evaluation(self, job: str) -> Path:
        """The page of an evaluation or of attacks."""
        evaluated = self.queue.get(job)
        if "evaluation" not in self.offers(evaluated):
            raise ConfigError(f"there is no evaluation {job[:80]!r}", code="not-found")
        return confined_file(PAGES[evaluated.kind], self.queue.folder / job)

    # stopped and finished jobs

    def remove(self, job_id: str) -> None:
        """Remove an ended job from the list, and delete its run's training state, which nothing else would delete.

        Raises ConfigError for an open job, and while another process uses its run folder.
        """
        job = self.queue.get(job_id)
        state = self._state(job)
        if state is None:
            self.queue.remove(job_id)
            return
        with exclusive_lock(state.parent):
            self.queue.remove(job_id)
            if job.resumable:
                shutil.rmtree(state, ignore_errors=True)
            if state.exists():
                logger.warning("%s could not be removed", state)

    def kept_bytes(self, job: Job) -> int:
        """Size in bytes of a stopped job's training state."""
        state = self._state(job)
        try:
            return sum(file.stat().st_size for file in state.iterdir()) if state is not None else 0
        except OSError:  # its process is still ending
            return 0

    def _state(self, job: Job) -> Path | None:
        """The folder of a stopped job's training state, if there is one."""
        if not job.resumable or job.run is None:
            return None
        try:
            place = self.runs.get(job.run) / STATE
        except ConfigError:  # its folder is gone
            return None
        return place if place.is_dir() and not place.is_symlink() else None

    def resume(self, run: str) -> Job:
        """Resume a stopped run. Raises ConfigError if it has no resumable job in the list."""
        self.runs.get(run)
        job = next((job for job in self.queue.all() if job.run == run and job.resumable), None)
        if job is None:
            raise ConfigError(f"{run} cannot be resumed: it is finished, or its job was removed from the list")
        return self.queue.resume(job.id)

    def offers(self, job: Job) -> list[str]:
        """The operations on the result of a job: "use", "undo", "lora", "diff", "delta", "sample", "evaluation"."""
        if job.state != "done":
            return []
        loads = ["use"] if self.host.checkpoints() is not None else []  # `salun ui` does not generate images
        if job.kind in ("stack", "undo"):
            return loads
        if job.kind in PAGES:
            return ["evaluation"] if (self.queue.folder / job.id / PAGES[job.kind]).is_file() else []
        if job.kind == "erase" and job.run and (self.runs.folder / job.run / DELTA).is_file():
            return [*loads, "undo", "lora", "diff", "delta", "sample"]
        return []

    def use(self, run: str) -> str:
        """Make the host use the erased checkpoint of a run. Returns a message."""
        return self._use(self.runs.checkpoint(run))

    def use_result(self, job_id: str) -> str:
        """Make the host use the checkpoint that a job wrote. Returns a message."""
        job = self.queue.get(job_id)
        if "use" not in self.offers(job):
            raise ConfigError(f"“{job.title}” wrote no checkpoint")
        return self.use(str(job.run)) if job.kind == "erase" else self._use(Path(job.request["output"]))

    def undo_result(self, job_id: str) -> str:
        """Return to the base of an erasure: make the host use it. If the base is missing, or there is no host, queue a
        job that writes it again, byte-identical, from the erased checkpoint and the delta. Returns a message.
        """
        job = self.queue.get(job_id)
        if "undo" not in self.offers(job):
            raise ConfigError(f"“{job.title}” has nothing to undo")
        run = str(job.run)
        base = Path(str(self.runs.options(run).get("model")))
        if self.host.checkpoints() is not None and str(base) in self.models.all().values():
            return f"{self._use(base)} The erased checkpoint stays in the list."
        return f"Queued: “{self.requests.undo(run, run).title}”."

    def _use(self, path: Path) -> str:
        self._require_finished()
        return self.host.use(path)

    def set_up(self) -> str:
        """Make an environment for the jobs, in the background. Returns a message."""
        self._require_finished()
        return environment.set_up(self.host)

    def _require_finished(self) -> None:
        """Raises ConfigError while a job is open, also one that waits for the GPU: the operation would wait for it."""
        job = next((job for job in self.queue.all() if job.open), None)
        if job is not None:
            raise ConfigError(f"“{job.title}” has not ended", advice="Wait for it, or cancel it")
