"""Methods × seeds beside Retrain: one job each, in processes side by side, and the table that comes of them.

A job's result is a small file in the run folder's `jobs/`, written whole or not at all, so that a comparison that was
stopped at any moment goes on with the jobs that are left. Originals and Retrains come from the cache.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from salun.cache import Cache
from salun.classification.data import ImageData, load_data
from salun.classification.experiment import Setting, figures_of, forget, opened, setting_of
from salun.classification.masks import layers_of
from salun.classification.methods import METHODS
from salun.classification.metrics import judge
from salun.classification.models import new_model
from salun.classification.options import METHODS as NAMES
from salun.classification.options import NOT_COMPARED, CompareOptions, UnlearnOptions
from salun.classification.search import merged, search, with_value
from salun.classification.table import table_of, tables_of
from salun.classification.task import Task, cross_entropy, minimise, retain_batches
from salun.device import kernels, pick_device
from salun.errors import Cancelled, ConfigError, TrainingError
from salun.formats.tensorfile import write_bytes
from salun.mask import Mask
from salun.options import MASKS
from salun.progress import Event, Progress, silent
from salun.report.classification import comparison_page
from salun.run_record import RunRecord

Kind = Literal["retrain", "search", "unlearn"]


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method, and a mask or density other than its own (None: its own)."""

    name: str
    method: str
    mask: str | None = None
    density: float | None = None


@dataclass(frozen=True)
class Job:
    """One piece of work. options: as for `unlearn`. name: of its file."""

    name: str
    kind: Kind
    variant: str
    options: UnlearnOptions


@dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison. metrics: see `table_of`."""

    metrics: dict[str, Any]
    record: RunRecord


def variant_of(text: str) -> Variant:
    """METHOD[/MASK][@DENSITY]. Raises ConfigError for anything else, or a mask for a method that has none."""
    found = re.fullmatch(r"([a-z0-9-]+)(?:/([a-z]+))?(?:@([0-9.e-]+))?", text.strip().lower())
    if found is None or found[1] not in METHODS or found[1] == "retrain":
        known = ", ".join(name for name in NAMES if name != "retrain")
        raise ConfigError(f"--methods {text}: must be METHOD, METHOD/MASK or METHOD@DENSITY, METHOD one of {known}")
    method, mask = METHODS[found[1]], found[2]
    if mask is not None and (method.mask is None or mask not in MASKS):
        why = f"the method {method.title} has none" if method.mask is None else f"must be one of {', '.join(MASKS)}"
        raise ConfigError(f"--methods {text}: the mask {mask}: {why}")
    try:
        density = None if found[3] is None else float(found[3])
    except ValueError as error:
        raise ConfigError(f"--methods {text}: {found[3]} is no density") from error
    if density is not None and (not 0 < density <= 1 or (mask or method.mask or "saliency") == "full"):
        raise ConfigError(f"--methods {text}: a density is above 0 and at most 1, of a mask that is not full")
    return Variant(found[0], found[1], mask, density)


def variants_of(options: CompareOptions) -> list[Variant]:
    """The rows of the table, in order. Raises ConfigError for a variant that is none, or is named twice."""
    others = [name for name in NAMES if name not in ("retrain", "salun")]
    found = [variant_of(text) for text in options.methods or ["salun", *others]]
    names = [variant.name for variant in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--methods {twice} is named twice")
    return found


def jobs_of(options: CompareOptions, variants: Sequence[Variant]) -> dict[Kind, list[Job]]:
    """All jobs but for the values that the search is to find: one Retrain a seed, searches, unlearnings."""
    base = {item.name: getattr(options, item.name) for item in fields(UnlearnOptions)}
    base |= dict.fromkeys(("mask", "lr")) | {"retrain": "no", "search": False}
    seeds = range(options.seed, options.seed + options.seeds)
    jobs: dict[Kind, list[Job]] = {"retrain": [], "search": [], "unlearn": []}
    for seed in seeds:
        own = UnlearnOptions(**{**base, "method": "ft", "seed": seed, "epochs": None})
        jobs["retrain"].append(Job(f"retrain-{seed}", "retrain", "retrain", own))
    for seed in seeds:
        for variant in variants:
            told: dict[str, Any] = {"method": variant.method, "mask": variant.mask, "seed": seed}
            if variant.density is not None:
                told["density"] = variant.density
            if METHODS[variant.method].epochs is None:
                told["epochs"] = None
            own = UnlearnOptions(**{**base, **told})
            name = f"{re.sub('[/@]', '-', variant.name)}-{seed}"
            jobs["unlearn"].append(Job(name, "unlearn", variant.name, own))
            if options.search and seed - options.seed < options.search_seeds:
                jobs["search"].append(Job(f"search-{name}", "search", variant.name, own))
    return jobs


def compare(
    options: CompareOptions | None = None,
    *,
    progress: Progress = silent,
    run_dir: Path | str | None = None,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.classification.compare",
    **given: Any,
) -> Comparison:
    """Unlearn by several methods with several seeds, and put them beside Retrain.

    given: fields of `CompareOptions`, over `options`. run_dir: gets `jobs/`, `report.html` and `run.json`. resume: go
    on with the unfinished comparison in run_dir. With several workers, a Python script that calls this needs the usual
    `if __name__ == "__main__":`, as its processes are started afresh. A method that comes apart at some seeds is told
    with those it did not. Raises SalunError, `Cancelled` if `progress` does.
    """
    options = CompareOptions(**{**asdict(options or CompareOptions()), **given})
    variants, cache = variants_of(options), cache or Cache.of_user()
    if resume and run_dir is None:
        raise ConfigError("--resume needs the --run-dir of the comparison to go on with")
    jobs = jobs_of(options, variants)
    data = load_data(options.data, options.image_size, options.image_column, options.label_column)
    checked = {job.variant: setting_of(job.options, cache, data) for job in jobs["unlearn"][: len(variants)]}
    if options.search and not all(len(setting.split.validation) for setting in checked.values()):
        raise ConfigError("--search compares with validation pictures: raise --validation-share, or take --no-search")
    first = next(iter(checked.values()))
    folder = Path(run_dir) if run_dir is not None else None
    told = {name: value for name, value in asdict(options).items() if name not in NOT_COMPARED}
    told["methods"] = [variant.name for variant in variants]
    facts = {"data": first.data.digest, "base split": first.split.base}
    record = RunRecord(folder, command, told, options.seed, str(first.data.images.device), facts, resume)
    with record.running():
        ledger = Ledger(folder / "jobs" if folder is not None else None, record)
        total = sum(len(some) for some in jobs.values())
        with Desk(ledger, cache, data, workers_of(options), progress, total) as desk:
            with record.stage("retraining"):
                exact = desk.done(jobs["retrain"])
            with record.stage("searching"):
                found = desk.done(jobs["search"])
            chosen = {v.name: merged([found[j.name] for j in jobs["search"] if j.variant == v.name]) for v in variants}
            todo = [_with(job, chosen[job.variant]) for job in jobs["unlearn"]]
            with record.stage("unlearning"):
                unlearned = desk.done(todo)
        results = {v.name: {j.options.seed: unlearned[j.name] for j in todo if j.variant == v.name} for v in variants}
        beside = {job.options.seed: exact[job.name] for job in jobs["retrain"]}
        titles = {v.name: title_of(v) for v in variants}
        record.data["metrics"] = table_of(results, beside, chosen if options.search else {}, titles)
        record.data["notes"] = _failures(results)
        if folder is not None:
            rows = {name: _resolved(setting) for name, setting in checked.items()}
            done = {**record.data, "status": "done"}
            page = comparison_page(done, tables_of(record.data["metrics"]), rows, results, beside, data.classes)
            page.save(folder / "report.html")
    return Comparison(record.data["metrics"], record)


def preview(
    options: CompareOptions, *, run_dir: Path | None = None, cache: Cache | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """What `compare` would do, and about how long it would take: nothing is written.

    The time is counted from one epoch on 512 pictures at most, as if nothing were in the cache. Raises as `compare`.
    """
    variants, cache = variants_of(options), cache or Cache.of_user()
    jobs = jobs_of(options, variants)
    data = load_data(options.data, options.image_size, options.image_column, options.label_column)
    settings = [setting_of(job.options, cache, data) for job in jobs["unlearn"][: len(variants)]]
    first = settings[0]
    each = seconds_of_a_picture(first, progress)
    train, kept = len(first.split.train), len(first.split.retain)
    assert first.options.train_epochs is not None
    seconds = each * first.options.train_epochs * (train + kept) * options.seeds
    searches = options.search_seeds if options.search else 0
    for setting in settings:  # those that do not train read each picture about thrice
        passes = (setting.options.epochs or 3) * train
        seconds += each * passes * (options.seeds + searches * len(METHODS[setting.options.method].factors))
    workers = workers_of(options)
    told = {}
    for kind, some in jobs.items():
        folder = run_dir / "jobs" if run_dir is not None else None
        there = [job for job in some if folder is not None and (folder / f"{job.name}.json").is_file()]
        told[kind] = {"all": len(some), "done": len(there)}
    return {
        "methods": [variant.name for variant in variants],
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "forget": len(first.split.forget),
        "train": train,
        "jobs": told,
        "workers": workers,
        "device": str(first.data.images.device),
        "seconds": seconds / workers,
    }


def seconds_of_a_picture(setting: Setting, progress: Progress) -> float:
    """How long one picture takes in training, on this machine now."""
    fresh = partial(new_model, setting.options.model or "", setting.data.channels, len(setting.data.classes), 0)
    model = fresh().to(setting.data.images.device)
    task = Task(model, setting.data, setting.split.unforgotten(), setting.options, fresh)
    rows = task.split.retain[: min(512, 4 * task.size)]
    task.split = replace(task.split, retain=rows)
    task.mask = Mask.full(task.parameters)
    minimise(task, retain_batches(task), cross_entropy(task), epochs=1, lr=1e-6)  # the first is slower than the rest
    began = time.perf_counter()
    minimise(task, retain_batches(task), cross_entropy(task), epochs=1, lr=1e-6)
    progress(Event("timing"))
    return (time.perf_counter() - began) / len(rows)


def title_of(variant: Variant) -> str:
    """How the table calls a variant."""
    parts = [variant.mask or "", f"density {variant.density:g}" if variant.density is not None else ""]
    told = ", ".join(part for part in parts if part)
    return METHODS[variant.method].title + (f" ({told})" if told else "")


def workers_of(options: CompareOptions) -> int:
    """How many processes: what is asked for, else one a core that this process may use, one on a GPU."""
    if options.workers is not None:
        return options.workers
    if pick_device(options.device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolved(setting: Setting) -> dict[str, Any]:
    """What the page says of a variant."""
    method = METHODS[setting.options.method]
    return {"method": method.title, "mask": setting.options.mask, "density": setting.options.density}


def _with(job: Job, chosen: Mapping[str, Any] | None) -> Job:
    if chosen is None:
        return job
    return replace(job, options=with_value(job.options, chosen["option"], chosen["chosen"]))


def _failures(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    return [
        f"{name}, seed {seed}: {result['error']}"
        for name, some in results.items()
        for seed, result in some.items()
        if "error" in result
    ]


@dataclass(frozen=True)
class Ledger:
    """The results there are, by job, in a folder; None keeps none."""

    folder: Path | None
    record: RunRecord

    def key(self, job: Job) -> str:
        """What a result depends on: the job's options, the data, the versions, the device."""
        facts = {**self.record.data["facts"], "device": self.record.data["device"]}
        versions = {k: v for k, v in self.record.data["versions"].items() if k != "platform"}
        text = json.dumps([job.kind, asdict(job.options), facts, versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, job: Job) -> dict[str, Any] | None:
        """A job's result, None if there is none of these very options."""
        if self.folder is None:
            return None
        try:
            kept = json.loads((self.folder / f"{job.name}.json").read_text(encoding="utf-8"))
            result: dict[str, Any] | None = kept["result"] if kept["key"] == self.key(job) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result

    def put(self, job: Job, result: Mapping[str, Any]) -> None:
        """Keep it."""
        if self.folder is not None:
            text = json.dumps({"key": self.key(job), "options": asdict(job.options), "result": result})
            write_bytes(self.folder / f"{job.name}.json", (text + "\n").encode())


class Desk:
    """Gets jobs done, by several processes or here, and counts them for the progress. A context manager: at its end the
    processes stop at their next step, and are waited for.
    """

    def __init__(
        self, ledger: Ledger, cache: Cache, data: ImageData, workers: int, progress: Progress, total: int
    ) -> None:
        self.ledger, self.cache, self.data, self.workers, self.progress = ledger, cache, data, workers, progress
        self.count, self.total = 0, total
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(workers, context, _begin, (self._stop,)) if workers > 1 else None

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def done(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """job name → result, of all of them."""
        results = {}
        for job in jobs:
            kept = self.ledger.get(job)
            if kept is not None:
                results[job.name] = kept
        self.count += len(results)
        todo = [job for job in jobs if job.name not in results]
        for job, result in self._in_turn(todo) if self._pool is None else self._side_by_side(self._pool, todo):
            self.ledger.put(job, result)
            results[job.name] = result
            self.count += 1
            self.progress(Event("comparing", self.count, self.total, message=_line(job, result)))
        return results

    def _in_turn(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            yield job, run_job(job, self.cache, self.data, lambda event: self.progress(Event("comparing")))

    def _side_by_side(self, pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """As they end."""
        running = {pool.submit(_in_worker, job, self.cache): job for job in jobs}
        left = set(running)
        try:
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                self.progress(Event("comparing"))
                for future in ended:
                    yield running[future], future.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the comparison was ended from outside, for want of memory perhaps: go on with --resume "
                "and fewer --workers"
            ) from error


def _line(job: Job, result: Mapping[str, Any]) -> str:
    who = f"{job.variant}, seed {job.options.seed}"
    if "error" in result:
        return f"{who}: {result['error']}"
    if job.kind == "search":
        return f"{who}: searched {len(result['tried'])} values of {result['option']} in {result['seconds']:.0f} s"
    return f"{who}: " + ", ".join(f"{name} {result[name]['value']:.1f}" for name in ("UA", "RA", "TA", "MIA"))


_stop: Any = None


def _begin(stop: Any) -> None:
    """Of a worker process: one thread, deaf to Ctrl-C (the first process hears it), and gone when the first one is."""
    import signal

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
    """One job's result; {"error": why} for a training that came apart. On a CPU by one thread, so that the bits do not
    depend on the number of workers.
    """
    threads = torch.get_num_threads()
    setting = setting_of(job.options, cache, data)
    try:
        if setting.data.images.device.type == "cpu":
            torch.set_num_threads(1)
        with kernels(setting.options.deterministic):
            return WORK[job.kind](setting, progress)
    except TrainingError as error:
        return {"error": str(error)}
    finally:
        torch.set_num_threads(threads)


def _retrain(setting: Setting, progress: Progress) -> dict[str, Any]:
    original = setting.original(progress)
    exact = setting.retrained(progress)
    before = {**judge(setting.task(original, progress)), "RTE": {"value": original.seconds}}
    return {**figures_of(setting.task(exact, progress)), "RTE": {"value": exact.seconds}, "original": before}


def _search(setting: Setting, progress: Progress) -> dict[str, Any]:
    return search(setting.task(setting.original(progress), progress))[1]


def _unlearn(setting: Setting, progress: Progress) -> dict[str, Any]:
    task = setting.task(setting.original(progress), progress)
    record = opened(setting)
    seconds = forget(task, record)
    layers = layers_of(task.mask) if task.mask is not None else {}
    return {**figures_of(task), "RTE": {"value": seconds}, "mask": record.data["mask"], "layers": layers}


WORK: dict[Kind, Callable[[Setting, Progress], dict[str, Any]]] = {
    "retrain": _retrain,
    "search": _search,
    "unlearn": _unlearn,
}
