"""The queue of jobs: one at a time, each in a child process, independent of any browser.

The queue's thread holds the host's GPU lock while a job runs. Jobs that had not started when the program ended start
when it runs again; the running job is cancelled and can be resumed.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, SalunError
from salun.progress import Stage

from . import job_process
from .job_events import apply_event
from .job_store import MAX_TITLE, JobStore
from .jobs import Job, is_same_request
from .limits import truncated
from .messages import to_fields

SAVE_EVERY = 5.0  # seconds between two writings of the state of a running job
MAX_OPEN = 100  # jobs that have not ended
FOREIGN = SalunError(
    "the job belongs to another folder, or has options that this page does not allow", advice="Start a new one"
)
CLOSED = SalunError("the program ended before the job did")
logger = logging.getLogger("salun")

Lease = Callable[[Job], AbstractContextManager[object]]


class QueueFull(ConfigError):
    """The queue has its maximum number of jobs."""


class Queue:
    """The jobs of one folder.

    Args:
        python: Returns the interpreter for a child process.
        gpu_lease: Entered before a child starts and left after it ended: the host's lock held, its memory freed.
        after: Called with every job that ended.
        environment: Additional environment variables of child processes.
        allowed: Whether a stored job of an earlier start may run: its file is untrusted input.

    Raises ConfigError if another program works with the folder.
    """

    def __init__(
        self,
        folder: Path,
        python: Callable[[], str] = lambda: sys.executable,
        gpu_lease: Lease = lambda job: nullcontext(),
        after: Callable[[Job], None] = lambda job: None,
        environment: Mapping[str, str] | None = None,
        allowed: Callable[[Job], bool] = lambda job: True,
    ) -> None:
        self._store = JobStore(folder)
        self.folder, self._python, self._gpu_lease, self._after = folder, python, gpu_lease, after
        self._environment, self._allowed = dict(environment or {}), allowed
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._change = threading.Condition()
        self._cancelled: set[str] = set()
        self._child: tuple[str, subprocess.Popen[str]] | None = None
        self._pace = 0.0  # seconds that the last training step of the present child took
        self._closed = False
        self._read()
        self._thread = threading.Thread(target=self._work, name="salun jobs", daemon=True)
        self._thread.start()

    def submit(self, kind: str, title: str, request: Mapping[str, Any], run: str | None = None) -> Job:
        """Put a job into the queue; an open job with the same request is returned instead (a double click is one job).

        Raises ConfigError if it cannot be written, QueueFull if too many jobs are open.
        """
        title = truncated(title, MAX_TITLE)
        with self._change:
            for other in self._jobs.values():
                if other.open and other.kind == kind and is_same_request(other.request, request):
                    return other
            n = sum(job.open for job in self._jobs.values())
            if n >= MAX_OPEN:
                raise QueueFull(f"{n} jobs are in the queue; the limit is {MAX_OPEN}", advice="Wait, or cancel a job")
            job = Job(self._store.new_id(title), kind, title, dict(request), created=time.time(), run=run)
            self._store.add(job)
            self._jobs[job.id] = job
            self._waiting.append(job.id)
            self._change.notify_all()
            return job

    def cancel(self, job_id: str) -> Job:
        """Stop a job, or remove it from the queue if it has not started."""
        with self._change:
            job = self.get(job_id)
            if not job.open:
                return job
            self._cancelled.add(job_id)
            if job.state in ("queued", "waiting"):
                if job_id in self._waiting:
                    self._waiting.remove(job_id)
                self._end(job, "cancelled")
                return job
            job.state = "stopping"
            self._save(job)
            child = self._child[1] if self._child and self._child[0] == job_id else None
        if child is not None:
            self._stop(job, child)
        return job

    def resume(self, job_id: str) -> Job:
        """A new job that resumes the run of a stopped one. Raises ConfigError if it is not resumable."""
        with self._change:
            old = self.get(job_id)
            if old.open or not old.resumable:
                raise ConfigError(f"“{old.title}” cannot be resumed")
            job = self.submit(old.kind, old.title, {**old.request, "resume": True}, old.run)
            old.resumable = False  # its run has a new job
            self._save(old)
            return job

    def get(self, job_id: str) -> Job:
        """The job of an id. Raises ConfigError for an unknown id."""
        with self._change:
            if job_id not in self._jobs:
                raise ConfigError(f"there is no job {job_id[:80]!r}", code="not-found")
            return self._jobs[job_id]

    def all(self) -> list[Job]:
        """All jobs, the latest first."""
        with self._change:
            return sorted(self._jobs.values(), key=lambda job: job.created, reverse=True)

    def remove(self, job_id: str) -> None:
        """Remove an ended job from the list. Its run folder stays."""
        with self._change:
            job = self.get(job_id)
            if job.open:
                raise ConfigError(f"“{job.title}” has not ended", advice="Cancel it first")
            del self._jobs[job_id]
            self._store.remove(job_id)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Wait until a job has ended, or for `timeout` seconds. Returns the job."""
        with self._change:
            job = self.get(job_id)
            self._change.wait_for(lambda: not job.open, timeout)
            return job

    def close(self) -> None:
        """Stop the running job and release the folder. Queued jobs stay queued for the next start of the program."""
        with self._change:
            self._closed = True
            running = [job.id for job in self._jobs.values() if job.state in ("running", "stopping")]
            self._change.notify_all()
        for job_id in running:
            self.cancel(job_id)
        self._thread.join(job_process.FINISHING)
        self._store.close()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                job = self._jobs[self._waiting.popleft()]
                job.state = "waiting"
                self._save(job)
            try:
                python = self._python()  # before the host frees anything for it
                with self._gpu_lease(job):
                    if self._begin(job):
                        self._run(job, python)
            except SalunError as error:
                self._settle(job, "failed", error)
            except Exception as error:  # the host's part failed: the queue reports it and takes the next job
                logger.exception("the job %s failed", job.id)
                self._settle(job, "failed", SalunError(f"{type(error).__name__}: {error}"))
            if job.open:  # the program ends
                return
            try:
                self._after(job)
            except Exception:
                logger.exception("after the job %s", job.id)

    def _begin(self, job: Job) -> bool:
        """Whether a job is still wanted, now that the GPU is free for it; it is running then."""
        with self._change:
            if job.open and self._closed:
                job.state = "queued"
            elif job.open:
                job.state, job.began = "running", time.time()
            self._save(job)
            return job.state == "running"

    def _run(self, job: Job, python: str) -> None:
        place = self.folder / job.id
        try:
            with (place / "log.txt").open("ab") as log:
                child = job_process.start(python, place, log, self._environment)
        except OSError as error:
            self._settle(job, "failed", SalunError(f"the job cannot be started: {error.strerror or error}"))
            return
        try:
            with self._change:
                self._child, self._pace = (job.id, child), 0.0
                stopped = job.id in self._cancelled  # since the lease began
            if stopped:
                self._stop(job, child)
            self._listen(job, child)
            code = child.wait()
        finally:
            with self._change:
                self._child = None
            job_process.end(child)
        if code:
            job_process.remove_partial_files(job)
        if job.result is not None:
            self._settle(job, "done")
        elif job.id in self._cancelled or code == 130:
            self._settle(job, "cancelled")
        elif job.error is not None:
            self._settle(job, "failed")
        else:
            self._settle(job, "failed", SalunError(job_process.failure_text(place / "log.txt", code)))

    def _listen(self, job: Job, child: subprocess.Popen[str]) -> None:
        """Apply the events of a child until it ends."""
        saved = 0.0
        trained: tuple[int, float] | None = None  # the last training step, and when it was reported
        assert child.stdout is not None
        for line in child.stdout:
            now = time.monotonic()
            with self._change:
                if job.open:  # not ended without its answer
                    apply_event(job, line)
                    job.heard = time.time()
                if job.stage != Stage.TRAINING:
                    trained = None
                elif trained is None or job.step > trained[0]:
                    if trained is not None:
                        self._pace = (now - trained[1]) / (job.step - trained[0])
                    trained = (job.step, now)
                if now - saved > SAVE_EVERY:
                    saved = now
                    self._save(job)

    def _stop(self, job: Job, child: subprocess.Popen[str]) -> None:
        job_process.ask_to_stop(child)
        threading.Thread(target=self._end_soon, args=(job, child), daemon=True).start()

    def _end_soon(self, job: Job, child: subprocess.Popen[str]) -> None:
        """End a child that does not stop by itself. Its run can be resumed from its last saved state."""
        if job_process.end_soon(child, lambda: job_process.patience(job.stage, self._pace)):
            self._settle(job, "cancelled")  # the system frees its memory meanwhile; the lease ends with the process

    def _settle(self, job: Job, state: str, error: SalunError | None = None) -> None:
        with self._change:
            if job.open:
                self._end(job, state, error)

    def _end(self, job: Job, state: str, error: SalunError | None = None) -> None:
        if error is not None or state != "failed":
            job.error = to_fields(error) if error is not None else None
        job.state, job.ended, job.left = state, time.time(), None
        job.resumable = state != "done" and job.kind == "erase" and _has_run(job)
        self._save(job)
        self._change.notify_all()

    def _save(self, job: Job) -> None:
        if job.id in self._jobs:  # not taken off the list while its process came to its end
            self._store.save(job)

    def _read(self) -> None:
        self._jobs = {job.id: job for job in self._store.read()}
        for job in sorted(self._jobs.values(), key=lambda job: job.created):
            if (job.open or job.resumable) and not self._allowed(job):
                job.state, job.error, job.resumable = "failed", to_fields(FOREIGN), False
                self._save(job)
            elif job.state in ("queued", "waiting") and self._store.can_start(job.id):
                job.state = "queued"
                self._waiting.append(job.id)
            elif job.open:  # the program ended meanwhile
                self._settle(job, "cancelled", CLOSED)


def _has_run(job: Job) -> bool:
    folder = job.options.get("run_dir")
    return folder is not None and (Path(folder) / "run.json").is_file()
