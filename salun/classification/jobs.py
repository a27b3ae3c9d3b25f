"""A comparison's jobs: what one is, how they are done by processes side by side, and the small files that keep results.

A result is written whole or not at all. A job that fails is a result, too: it says why, and ends nothing but itself.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from salun.classification.data import ImageData, load_data
from salun.classification.experiment import (
    ExperimentSetup,
    OutOfMemory,
    enough_memory,
    forget,
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
    """One piece of work. options: as for `unlearn`. name: of its file. values: those that a search is to try."""

    name: str
    kind: Kind
    variant: str
    options: UnlearnOptions
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class ResultStore:
    """The results there are, by job, in a folder, which may be untrusted input; None keeps none.

    classes: how many the data set has. notes: of files that are not valid results, one line each.
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
        """A job's result, None if there is none of these very options, or memory did not suffice for it.

        None, with a note, for a file that is not valid: its job is run again.
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
        """Keep it."""
        if self.folder is not None:
            text = json.dumps({"key": self.key(job), "options": asdict(job.options), "result": result})
            write_bytes(self.folder / f"{job.name}.json", (text + "\n").encode())


class JobRunner:
    """Gets jobs done, by several processes or here, and counts them for the progress. A context manager: at its end the
    processes stop at their next step, and are waited for.
    """

    def __init__(
        self, store: ResultStore, cache: Cache, data: ImageData, workers: int, progress: Progress, total: int
    ) -> None:
        self.store, self.cache, self.data, self.workers, self.progress = store, cache, data, workers, progress
        self.count, self.total = 0, total  # the total grows with the rounds of a search
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(workers, context, _begin, (self._stop,)) if workers > 1 else None

    def __enter__(self) -> JobRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def done(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """job name → result, of all of them."""
        results = {}
        for job in jobs:
            result = self.store.get(job)
            if result is not None:
                results[job.name] = result
        self.count += len(results)
        todo = [job for job in jobs if job.name not in results]
        for job, result in self._in_turn(todo) if self._pool is None else self._side_by_side(self._pool, todo):
            self.store.put(job, result)
            results[job.name] = result
            self.count += 1
            self.progress(Event(Stage.COMPARING, self.count, self.total, message=_line(job, result)))
        return results

    def _in_turn(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            yield job, run_job(job, self.cache, self.data, lambda event: self.progress(Event(Stage.COMPARING)))

    def _side_by_side(self, pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """As they end."""
        with _unheard_by_children():
            running = {pool.submit(_in_worker, job, self.cache): job for job in jobs}
        left = set(running)
        try:
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                self.progress(Event(Stage.COMPARING))
                for future in ended:
                    yield running[future], future.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the comparison was killed, perhaps because memory ran out",
                advice="Use {resume} with fewer {workers}",
            ) from error


def _line(job: Job, result: Mapping[str, Any]) -> str:
    who = f"{job.variant}, seed {job.options.seed}"
    if "error" in result:
        return f"{who}: {result['error']}"
    if job.kind == "search":
        return f"{who}: searched {len(result['tried'])} values of {result['option']} in {result['seconds']:.0f} s"
    again = "again, " if job.kind == "again" else ""
    return f"{who}: {again}" + ", ".join(f"{name} {result[name]['value']:.1f}" for name in ("UA", "RA", "TA", "MIA"))


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Processes that are started within inherit that SIGINT is blocked: until `_begin` it would end their imports."""
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
    """Of a worker process: one thread, deaf to Ctrl-C (the first process hears it), and gone when the first one is."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _in_worker(job: Job, cache: Cache) -> dict[str, Any]:
    def heard(event: Event, /) -> None:
        if _stop.is_set():
            raise Cancelled("stopped")

    options = job.options
    data = _loaded(options.data, options.image_size, options.image_column, options.label_column)
    return run_job(job, cache, data, heard)


_loaded = lru_cache(maxsize=1)(load_data)  # of a worker process, which lives as long as one comparison


def run_job(job: Job, cache: Cache, data: ImageData, progress: Progress) -> dict[str, Any]:
    """One job's result; {"error": why} for one that cannot be done, with "retry" where another time it may be. On a CPU
    by one thread, so that the bits do not depend on the number of workers.
    """
    threads = torch.get_num_threads()
    try:
        setting = setup_of(job.options, cache, data)
        if setting.data.images.device.type == "cpu":
            torch.set_num_threads(1)
        with deterministic_kernels(setting.options.deterministic), enough_memory():
            return WORK[job.kind](job, setting, progress)
    except Cancelled:
        raise
    except OutOfMemory as error:
        return {"error": f"{error}, or fewer workers", "retry": True}
    except SalunError as error:
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
