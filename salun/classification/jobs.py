"""The jobs of a comparison, the worker processes that run them, and the small files that store their results.

A result is written atomically. A job that fails has a result, too, with the reason; the other jobs continue.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from salun.classification.data import ImageData, arguments_of, load_data
from salun.classification.experiment import (
    ExperimentSetup,
    forget,
    memory_errors,
    metrics_of,
    open_record,
    setup_of,
)  # fmt: skip
from salun.classification.masks import layers_of
from salun.classification.metrics import evaluate_classifier
from salun.classification.results import check_result
from salun.classification.search import trials
from salun.classification.unlearn_options import UnlearnOptions
from salun.compute.device import deterministic_kernels
from salun.errors import Cancelled, SalunError, TrainingError
from salun.files import write_bytes
from salun.methods import METHODS
from salun.progress import Event, Progress, Stage
from salun.runs.cache import Cache
from salun.runs.record import INPUTS, RunRecord
from salun.untrusted import read_json

Kind = Literal["retrain", "again", "search", "unlearn"]
ANOTHER = 1_000_000  # between a seed and that of its other Retrain


@dataclass(frozen=True)
class Job:
    """One unit of work. options: as for `unlearn`. name: of its result's file. values: to try in a search."""

    name: str
    kind: Kind
    variant: str
    options: UnlearnOptions
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class ResultStore:
    """Results by job in a folder, which may be untrusted input; without a folder nothing is stored.

    classes: of the data set, a count. notes: one line for each file that is not a valid result.
    """

    folder: Path | None
    record: RunRecord
    classes: int
    notes: list[str] = field(default_factory=list)

    def key(self, job: Job) -> str:
        """What a result depends on: the job's options, data, split and fresh model (`facts`), versions, device."""
        facts = {**self.record.facts, "device": self.record.device}
        options = {
            name: value for name, value in asdict(job.options).items() if name not in INPUTS or name not in facts
        }
        versions = {k: v for k, v in self.record.versions.items() if k != "platform"}
        text = json.dumps([job.kind, options, job.values, facts, versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, job: Job) -> dict[str, Any] | None:
        """A job's stored result; None if none has exactly these options, or it failed for want of memory.

        None, with a note, for an invalid file, whose job is run again.
        """
        if self.folder is None:
            return None
        try:
            stored = read_json(self.folder / f"{job.name}.json")
            if not isinstance(stored, dict) or not isinstance(stored.get("result"), dict):
                raise ValueError("it must be an object with a result")
            result: dict[str, Any] = stored["result"]
            if stored.get("key") != self.key(job) or result.get("retry"):
                return None
            check_result(
                job.kind, result, self.classes, METHODS["classification"][job.options.method].tunes, job.values
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self.notes.append(f"jobs/{job.name}.json was not a valid result ({why}), so its job was run again")
            return None
        return result

    def put(self, job: Job, result: Mapping[str, Any]) -> None:
        """Store a job's result."""
        if self.folder is not None:
            text = json.dumps({"key": self.key(job), "options": asdict(job.options), "result": result})
            write_bytes(self.folder / f"{job.name}.json", (text + "\n").encode())


class JobRunner:
    """Runs jobs, in worker processes or in this one, and counts them for the progress. A context manager: at its end
    the processes stop after their current step and are joined.

    Args:
        progress: Gets an event for each job; the steps of a stage are its jobs, and the values that they try.
        executor: Runs the jobs in place of processes of this runner's own, and stays open: at the end jobs that wait
            are cancelled, and those that run are not stopped. Its workers need salun, the data's folder and the cache
            by the same paths, and one thread each.
    """

    def __init__(
        self,
        store: ResultStore,
        cache: Cache,
        data: ImageData,
        workers: int,
        progress: Progress,
        executor: Executor | None = None,
    ) -> None:
        self.store, self.cache, self.data, self.workers, self.progress = store, cache, data, workers, progress
        self.stage, self.counts, self.restored = Stage.PLANNING, Counter[Stage](), Counter[Stage]()
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._given, self._pool = executor is not None, executor
        if executor is None and workers > 1:
            self._pool = ProcessPoolExecutor(workers, context, _begin, (self._stop,))

    def __enter__(self) -> JobRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._pool is not None and not self._given:
            self._pool.shutdown(cancel_futures=True)

    def done(self, jobs: Sequence[Job], stage: Stage) -> dict[str, dict[str, Any]]:
        """Run the jobs that have no result yet. Returns job name → result."""
        results, total = {}, self.counts[stage] + sum(map(_steps, jobs))
        for job in jobs:
            result = self.store.get(job)
            if result is not None:
                results[job.name] = result
                self.restored[stage] += _steps(job)
                self.counts[stage] += _steps(job)
        self.stage = stage
        self._report(total)
        todo = [job for job in jobs if job.name not in results]
        for job, result in self._in_turn(todo) if self._pool is None else self._in_workers(self._pool, todo):
            self.store.put(job, result)
            results[job.name] = result
            self.counts[stage] += _steps(job)
            self.progress(Event(stage, message=_line(job, result)))
            self._report(total)
        return results

    def _report(self, total: int) -> None:
        self.progress(Event(self.stage, self.counts[self.stage], total, restored=self.restored[self.stage]))

    def _in_turn(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            yield job, run_job(job, self.cache, self.data, lambda event: self.progress(Event(self.stage)))

    def _in_workers(self, pool: Executor, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Jobs with their results, as they finish."""
        with _sigint_blocked_in_children():
            running = {pool.submit(_in_worker, job, self.cache): job for job in jobs}
        left = set(running)
        try:
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                self.progress(Event(self.stage))
                for future in sorted(ended, key=lambda future: future.exception() is not None):  # failures last
                    yield running[future], future.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the comparison was killed, perhaps because memory ran out",
                advice="Use {resume} with fewer {workers}",
            ) from error
        except (SalunError, KeyboardInterrupt):
            raise
        except Exception as error:  # an executor's own, such as of a worker that is lost
            if not self._given:
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise TrainingError(
                f"a worker of the executor failed ({type(error).__name__}: {reason})",
                advice="Use {resume}: finished jobs are not repeated",
            ) from error
        finally:
            for future in left:
                future.cancel()


def _steps(job: Job) -> int:
    """Of the progress: the values that a search tries, or 1."""
    return len(job.values) or 1


def _line(job: Job, result: Mapping[str, Any]) -> str:
    who = f"{job.variant}, seed {job.options.seed}"
    if "error" in result:
        return f"{who}: {result['error']}"
    if job.kind == "search":
        return f"{who}: searched {len(result['tried'])} values of {result['option']} in {result['seconds']:.0f} s"
    again = "again, " if job.kind == "again" else ""
    return f"{who}: {again}" + ", ".join(f"{name} {result[name]['value']:.1f}" for name in ("UA", "RA", "TA", "MIA"))


@contextmanager
def _sigint_blocked_in_children() -> Iterator[None]:
    """Within, started processes inherit a blocked SIGINT: it would interrupt their imports before `_begin`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_stop: Any = None


def _begin(stop: Any) -> None:
    """Set up a worker process: it ignores Ctrl-C, which its parent handles, and exits when its parent does."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _in_worker(job: Job, cache: Cache) -> dict[str, Any]:
    def check_stop(event: Event, /) -> None:
        if _stop is not None and _stop.is_set():
            raise Cancelled("stopped")

    options = job.options
    data = _loaded(*arguments_of(options))
    return run_job(job, cache, data, check_stop)


_loaded = lru_cache(maxsize=1)(load_data)  # of a worker process, which lives as long as one comparison


def run_job(job: Job, cache: Cache, data: ImageData, progress: Progress) -> dict[str, Any]:
    """A job's result; {"error": reason} if it fails, with "retry" if a later attempt may succeed. On a CPU it uses one
    thread, so that results are byte-identical for any number of workers.
    """
    threads = torch.get_num_threads()
    try:
        setting = setup_of(job.options, cache, data)
        if setting.data.device.type == "cpu":
            torch.set_num_threads(1)
        with deterministic_kernels(setting.options.deterministic), memory_errors():
            return WORK[job.kind](job, setting, progress)
    except Cancelled:
        raise
    except SalunError as error:
        if error.code == "out-of-memory":
            return {"error": f"{error}, or fewer workers", "retry": True}
        return {"error": str(error)}
    finally:
        torch.set_num_threads(threads)


def _retrain(job: Job, setting: ExperimentSetup, progress: Progress) -> dict[str, Any]:
    original = setting.original(progress)
    exact = setting.retrained(progress)
    before = {**evaluate_classifier(setting.task(original, progress)), "RTE": {"value": original.seconds}}
    return {**metrics_of(setting.task(exact, progress)), "RTE": {"value": exact.seconds}, "original": before}


def _again(job: Job, setting: ExperimentSetup, progress: Progress) -> dict[str, Any]:
    exact = setting.retrained(progress, (setting.options.seed + ANOTHER) % 2**63)
    return {**evaluate_classifier(setting.task(exact, progress)), "RTE": {"value": exact.seconds}}


def _search(job: Job, setting: ExperimentSetup, progress: Progress) -> dict[str, Any]:
    return trials(setting.task(setting.original(progress), progress), job.values)


def _unlearn(job: Job, setting: ExperimentSetup, progress: Progress) -> dict[str, Any]:
    task = setting.task(setting.original(progress), progress)
    record = open_record(setting)
    seconds = forget(task, record)
    layers = layers_of(task.mask) if task.mask is not None else {}
    return {**metrics_of(task), "RTE": {"value": seconds}, "mask": record.mask, "layers": layers}


WORK: dict[Kind, Callable[[Job, ExperimentSetup, Progress], dict[str, Any]]] = {
    "retrain": _retrain,
    "again": _again,
    "search": _search,
    "unlearn": _unlearn,
}
