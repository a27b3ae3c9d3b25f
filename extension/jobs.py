"""Jobs: a queue of child processes, each with a folder that tells its state, so that nothing depends on a browser.

A job's folder holds `request.json` (what is asked), `job.json` (its state, written whole or not at all), the child's
log and its previews. The queue's thread works on one job at a time, within the host's turn. Jobs that had not begun
when the program ended go on at its next start; one that was at work is stopped, and can be resumed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from salun.errors import ConfigError, SalunError
from salun.files import recover_interrupted_write, remove_leftovers, write_bytes
from salun.runs.folder import FILES
from salun.runs.reading import read_json

from .limits import truncated
from .places import safe_name

CHILD = Path(__file__).resolve().parent
GRACE = 1.0  # seconds after a cancel until a child that has not answered is ended
LONGEST = 30.0  # seconds for a step of training to come to its end, twice as long as the last one at most
KEEPING = 120.0  # seconds for a child that has answered, or is writing its files, to come to an end
WRITING = ("saving", "writing", "exporting")  # stages of that
SAVED_EVERY = 5.0  # seconds between two writings of the state of a job at work
LOSSES = 2_000  # points of the loss plot kept
NOTES = 100  # messages of a job kept
TITLE = 200  # characters
MOST_OPEN = 100  # jobs that are not over
FOREIGN = "the job is of another folder, or asks for more than this page can: begin a new one"
OPEN = ("queued", "waiting", "running", "stopping")
logger = logging.getLogger("salun")


class QueueFull(ConfigError):
    """More jobs are in the queue than it holds."""


@dataclass
class Job:
    """What is known of a job.

    state: queued → waiting (for the host's turn) → running → done | failed | cancelled; stopping in between. fraction:
    0 … 1 of the whole, never falling. left: seconds, where known. losses: [step, forget, retain] rows. previews: names
    of pictures in the job's folder. run: the name of its run folder. resumable: whether going on with it is possible.
    """

    id: str
    kind: str
    title: str
    request: dict[str, Any]
    state: str = "queued"
    created: float = 0.0
    began: float | None = None
    ended: float | None = None
    stage: str = ""
    step: int = 0
    total: int = 0
    fraction: float = 0.0
    left: float | None = None
    losses: list[list[float]] = field(default_factory=list)
    previews: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: str | None = None
    run: str | None = None
    resumable: bool = False

    @property
    def open(self) -> bool:
        return self.state in OPEN


Turn = Callable[[Job], AbstractContextManager[object]]


class Queue:
    """The jobs of one folder.

    python: gives the interpreter of the children, when one is begun. turn: entered before a child begins and left after
    it ended: the host's lock, its memory freed and given back. after: called with every job that ended. allowed:
    whether a job of an earlier start, which the folder holds, may run: who wrote its file is not known.
    Raises ConfigError if another program works with the folder.
    """

    def __init__(
        self,
        folder: Path,
        python: Callable[[], str] = lambda: sys.executable,
        turn: Turn = lambda job: nullcontext(),
        after: Callable[[Job], None] = lambda job: None,
        environment: Mapping[str, str] | None = None,
        allowed: Callable[[Job], bool] = lambda job: True,
    ) -> None:
        import filelock

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._python, self._turn, self._after = folder, python, turn, after
        self._environment, self._allowed = dict(environment or {}), allowed
        self._alone = filelock.FileLock(folder / ".lock", thread_local=False)
        try:
            self._alone.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(f"another program works with the jobs in {folder}: close it, or name another") from error
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._change = threading.Condition()
        self._cancelled: set[str] = set()
        self._child: tuple[str, subprocess.Popen[str]] | None = None
        self._pace = 0.0  # seconds that the last step of training took, of the child at work
        self._closed = False
        self._read()
        self._thread = threading.Thread(target=self._work, name="salun jobs", daemon=True)
        self._thread.start()

    # what a host and its page call

    def submit(self, kind: str, title: str, request: Mapping[str, Any], run: str | None = None) -> Job:
        """Put a job into the queue. One that asks the same as a job not yet over is that job: a double click is one.

        Raises ConfigError if it cannot be written down, and QueueFull where too many jobs are not over: then there is
        no job.
        """
        title = truncated(title, TITLE)
        with self._change:
            for other in self._jobs.values():
                if other.open and other.kind == kind and _same(other.request, request):
                    return other
            waiting = sum(job.open for job in self._jobs.values())
            if waiting >= MOST_OPEN:
                raise QueueFull(f"{waiting} jobs are in the queue; the limit is {MOST_OPEN}. Wait, or cancel some.")
            job = Job(self._new_id(title), kind, title, dict(request), created=time.time(), run=run)
            place = self.folder / job.id
            try:
                place.mkdir()
                _write_json(place / "request.json", {**job.request, "kind": kind})
                _write_json(place / "job.json", asdict(job))
            except Exception as error:  # a full disk, what JSON has not, …
                shutil.rmtree(place, ignore_errors=True)
                raise ConfigError(f"the job cannot be kept: {error}") from error
            self._jobs[job.id] = job
            self._waiting.append(job.id)
            self._change.notify_all()
            return job

    def cancel(self, job_id: str) -> Job:
        """Stop a job, or take it out of the queue. It is over at once where it had not begun."""
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
        """A new job that goes on with the run of one that stopped. Raises ConfigError where that cannot be."""
        with self._change:
            old = self.get(job_id)
            if old.open or not old.resumable:
                raise ConfigError(f"{old.title}: there is nothing to go on with")
            job = self.submit(old.kind, old.title, {**old.request, "resume": True}, old.run)
            old.resumable = False  # its run has a new job
            self._save(old)
            return job

    def get(self, job_id: str) -> Job:
        """Raises ConfigError for an id that no job has."""
        with self._change:
            if job_id not in self._jobs:
                raise ConfigError(f"there is no job {job_id[:80]!r}")
            return self._jobs[job_id]

    def all(self) -> list[Job]:
        """Every job, the latest first."""
        with self._change:
            return sorted(self._jobs.values(), key=lambda job: job.created, reverse=True)

    def forget(self, job_id: str) -> None:
        """Take an ended job off the list. Its run's folder stays as it is."""
        with self._change:
            job = self.get(job_id)
            if job.open:
                raise ConfigError(f"{job.title} is not over: cancel it first")
            del self._jobs[job_id]
            shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is over, or as it is after `timeout` seconds."""
        with self._change:
            job = self.get(job_id)
            self._change.wait_for(lambda: not job.open, timeout)
            return job

    def close(self) -> None:
        """Stop the job at work and let the folder go. Jobs that had not begun stay in the queue, for the next start."""
        with self._change:
            self._closed = True
            at_work = [job.id for job in self._jobs.values() if job.state in ("running", "stopping")]
            self._change.notify_all()
        for job_id in at_work:
            self.cancel(job_id)
        self._thread.join(KEEPING)
        self._alone.release()

    # the thread

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
                with self._turn(job):
                    if self._begun(job):
                        self._run(job, python)
            except SalunError as error:
                self._settle(job, "failed", str(error))
            except Exception as error:  # the host's part failed: ours is to say so and go on with the next
                logger.exception("the job %s failed", job.id)
                self._settle(job, "failed", f"{type(error).__name__}: {error}")
            if job.open:  # the program ends
                return
            try:
                self._after(job)
            except Exception:
                logger.exception("after the job %s", job.id)

    def _begun(self, job: Job) -> bool:
        """Whether a job is still wanted, now that its turn has come; it is at work then."""
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
                child = self._begin(python, place, log)
        except OSError as error:
            self._settle(job, "failed", f"the job cannot be started: {error.strerror or error}")
            return
        try:
            with self._change:
                self._child, self._pace = (job.id, child), 0.0
                stopped = job.id in self._cancelled  # since its turn began
            if stopped:
                self._stop(job, child)
            self._listen(job, child)
            code = child.wait()
        finally:  # whatever fails on this side: no child goes on unheard
            with self._change:
                self._child = None
            if child.poll() is None:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):  # what was still to be written to it nobody reads
                    if pipe is not None:
                        pipe.close()
        if code:
            _clear_away(job)
        if job.result is not None:
            self._settle(job, "done")
        elif job.id in self._cancelled or code == 130:
            self._settle(job, "cancelled")
        else:
            self._settle(job, "failed", job.error or _last_lines(place / "log.txt", code))

    def _listen(self, job: Job, child: subprocess.Popen[str]) -> None:
        """Take in what a child tells until it tells no more."""
        saved = 0.0
        trained: tuple[int, float] | None = None  # the last step that was told, and when
        assert child.stdout is not None
        for text in child.stdout:
            now = time.monotonic()
            with self._change:
                if job.open:  # not ended without its answer
                    take(job, text)
                if job.stage != "training":
                    trained = None
                elif trained is None or job.step > trained[0]:
                    if trained is not None:
                        self._pace = (now - trained[1]) / (job.step - trained[0])
                    trained = (job.step, now)
                if now - saved > SAVED_EVERY:
                    saved = now
                    self._save(job)

    def _stop(self, job: Job, child: subprocess.Popen[str]) -> None:
        _ask_to_stop(child)
        threading.Thread(target=self._end_soon, args=(job, child), daemon=True).start()

    def _begin(self, python: str, place: Path, log: IO[bytes]) -> subprocess.Popen[str]:
        environment = {**os.environ, **self._environment, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)  # a host's own folders are not the child's
        apart: dict[str, Any] = (
            {"creationflags": 0x08000000}
            if sys.platform == "win32"
            else {"start_new_session": True}  # CREATE_NO_WINDOW
        )
        return subprocess.Popen(
            [python, str(CHILD), str(place)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=place,
            encoding="utf-8", errors="replace", **apart,
        )  # fmt: skip

    def _end_soon(self, job: Job, child: subprocess.Popen[str]) -> None:
        """End a child that does not stop by itself. A run survives that: it goes on from its last saved state."""
        asked = time.monotonic()
        while child.poll() is None:
            patience = KEEPING if job.stage in ("stopping", *WRITING) else GRACE
            if job.stage == "training":  # at the end of its step it hears, and saves what it has
                patience = max(GRACE, min(2 * self._pace, LONGEST))
            if time.monotonic() > asked + patience:
                break
            time.sleep(0.05)
        if child.poll() is None:
            child.kill()
            self._settle(job, "cancelled")  # the system frees its memory meanwhile; the turn ends with the process

    def _settle(self, job: Job, state: str, error: str | None = None) -> None:
        with self._change:
            if job.open:
                self._end(job, state, error)

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        job.state, job.error, job.ended, job.left = state, error, time.time(), None
        job.resumable = state != "done" and job.kind == "erase" and self._has_run(job)
        self._save(job)
        self._change.notify_all()

    @staticmethod
    def _has_run(job: Job) -> bool:
        folder = job.request.get("options", {}).get("run_dir")
        return folder is not None and (Path(folder) / "run.json").is_file()

    def _save(self, job: Job) -> None:
        if job.id not in self._jobs:  # taken off the list while its process came to its end
            return
        try:
            _write_json(self.folder / job.id / "job.json", asdict(job))
        except Exception as error:  # a full disk or a child's strange word must not end the queue
            logger.warning("the state of the job %s is not saved: %s", job.id, error)

    def _read(self) -> None:
        for file in self.folder.glob("*/job.json"):
            try:
                job = Job(**read_json(file))
                if job.id != file.parent.name or not _sound(job):
                    raise ValueError("its parts do not fit together")
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s is no job of this version: passed over (%s)", ascii(str(file)), error)
                continue
            job.title = truncated(job.title, TITLE)
            self._jobs[job.id] = job
        for job in sorted(self._jobs.values(), key=lambda job: job.created):
            if (job.open or job.resumable) and not self._allowed(job):
                job.state, job.error, job.resumable = "failed", FOREIGN, False
                self._save(job)
            elif job.state in ("queued", "waiting") and (self.folder / job.id / "request.json").is_file():
                job.state = "queued"
                self._waiting.append(job.id)
            elif job.open:  # the program ended meanwhile
                self._settle(job, "cancelled", "the program was closed before the job was over")

    def _new_id(self, title: str) -> str:
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(title, 'job')}"
        name, n = stem, 1
        while (self.folder / name).exists():
            n += 1
            name = f"{stem}-{n}"
        return name


def _sound(job: Job) -> bool:
    """Whether what was read of a file, which may be untrusted input, is of the types that this code counts on."""
    request = job.request if isinstance(job.request, dict) else {"options": None}
    options = request.get("options", {})
    texts = (job.id, job.kind, job.title, job.state, job.stage)
    return (
        isinstance(options, dict)
        and isinstance(options.get("run_dir") or "", str)
        and _texts(options.get("output") or [])
        and isinstance(request.get("output") or "", str)
        and isinstance(options.get("model") or "", str)
        and isinstance(request.get("model") or "", str)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(text or "", str) for text in (job.run, job.error))
        and all(_number(value) for value in (job.created, job.step, job.total, job.fraction))
        and all(value is None or _number(value) for value in (job.began, job.ended, job.left))
        and isinstance(job.losses, list)
        and _texts(job.previews)
        and _texts(job.notes)
        and isinstance(job.result or {}, dict)
        and isinstance(job.resumable, bool)
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def take(job: Job, text: str) -> None:
    """Take one line of a child into its job. What is no event is passed over."""
    try:
        event = json.loads(text, parse_constant=none_for)
        kind = event["event"]
    except (ValueError, KeyError, TypeError):
        return
    if kind == "stage":
        job.stage, job.step, job.total = event["stage"], event["step"], event["total"]
        job.fraction, job.left = max(job.fraction, event["fraction"]), event["left"]
        metrics = event["metrics"]
        if None not in (metrics.get("forget"), metrics.get("retain")):
            job.losses.append([job.step, metrics["forget"], metrics["retain"]])
            del job.losses[:-LOSSES]
    elif kind == "message":
        job.notes.append(truncated(event["text"]))
        del job.notes[:-NOTES]
    elif kind == "preview":
        job.previews.append(event["file"])
    elif kind == "stopping":
        job.stage = "stopping"
    elif kind == "result":
        job.result, job.fraction, job.stage = event["result"], 1.0, "done"
    elif kind == "error":
        job.error = truncated(event["text"])


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two requests ask the same, wherever they would write it. To go on with a run is asked for that run."""

    def asked(request: Mapping[str, Any]) -> Any:
        options = {k: v for k, v in request.get("options", {}).items() if k not in ("run_dir", "output")}
        run = request["options"].get("run_dir") if request.get("resume") else None
        return {**{k: v for k, v in request.items() if k != "output"}, "options": options, "resume": run}

    return bool(asked(one) == asked(other))


def _clear_away(job: Job) -> None:
    """Remove what a child that was ended has left half written beside the files it was to write."""
    options = job.request.get("options", {})
    try:
        for target in [*options.get("output", []), job.request.get("output")]:
            if target:
                recover_interrupted_write(Path(target))
        if options.get("run_dir"):
            for name in FILES:
                remove_leftovers(Path(options["run_dir"]) / name)
    except OSError as error:
        logger.warning("the job %s left something half written: %s", job.id, error)


def none_for(text: str) -> None:
    """JSON has no NaN and no infinity, Python's has."""


def _ask_to_stop(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    with suppress(OSError, ValueError):  # it ended by itself
        child.stdin.write("stop\n")
        child.stdin.flush()


def _last_lines(log: Path, code: int) -> str:
    """What to say of a child that ended without a word."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    last = f": {lines[-1][:300]}" if lines else ""
    killed = " (killed, most often because memory ran out)" if code in (-9, 137) else ""
    return f"the job's process ended with code {code}{killed}{last}"


def _write_json(path: Path, data: Any) -> None:
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode("ascii"))
