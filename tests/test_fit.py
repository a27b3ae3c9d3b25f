"""An erasure is fitted to the memory of a GPU: by its simulation, so that no GPU is needed here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salun.compute.environment import free_in_container
from salun.diffusion import context, estimate
from salun.diffusion.compare import compare
from salun.diffusion.compare_estimate import preview_comparison
from salun.diffusion.compare_jobs import job_options, jobs_of
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.context import open_run
from salun.diffusion.erase import erase
from salun.diffusion.estimate import preview
from salun.diffusion.fit import MARGIN, Fit, as_recorded, fit
from salun.diffusion.model.loading import describe, load_with
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.simulate import simulate
from salun.errors import Cancelled, ConfigError
from salun.progress import Event, Stage, silent
from salun.runs.cache import Cache
from salun.runs.reading import read_run

from .conftest import SHORT

GPU = torch.device("cuda")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "simulated")


def test_an_erasure_is_fitted_to_the_memory_of_a_device(hollow: Callable[[str], str], cache: Cache) -> None:
    """By the first options with which it fits: those that change no result come before smaller batches."""
    spec = describe(hollow("sd1"))
    plan = make_plan(spec.settings, spec.name, "nudity", EraseOptions(resolution=512))
    where = spec, plan, GPU, torch.bfloat16, cache
    free = simulate(*where).most + MARGIN
    assert fit(free, *where) == Fit({}, "")
    expected = [{"gradient_checkpointing": True}, {"low_vram": True}, {"low_vram": True, "batch_size": 4}]
    for changes in expected:
        found = fit(free - 1, *where)
        assert found.changes == changes
        needed = re.search(r"; with [\w ]+ it needs ([\d.]+) GiB", found.text)
        assert needed is not None and float(needed[1]) < free / 2**30
        changed = replace(plan.options, **changes)
        other = replace(plan, options=changed, recipe=replace(plan.recipe, batch_size=changed.batch_size))
        free = simulate(spec, other, *where[2:]).most + MARGIN
    given = fit(free - 1, *where, batch_size=8)
    assert not given.changes and "with low_vram it still needs" in given.text


def test_a_run_that_continues_has_the_options_to_which_it_was_fitted() -> None:
    fitted = {"low_vram": True, "gradient_checkpointing": False, "batch_size": 2, "steps": 7}
    assert as_recorded(EraseOptions(), fitted) == EraseOptions(low_vram=True, batch_size=2)
    assert as_recorded(EraseOptions(batch_size=4), fitted) == EraseOptions(low_vram=True, batch_size=4)
    with pytest.raises(ConfigError, match="batch_size"):
        as_recorded(EraseOptions(), {"batch_size": "many"})


def test_a_dry_run_on_a_gpu_is_fitted_to_it(
    hollow: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the plan says; the run does the same."""
    spec, cache, options = describe(hollow("sd1")), Cache(tmp_path / "cache"), EraseOptions(resolution=64, dtype="fp32")
    plan = make_plan(spec.settings, spec.name, "nudity", options)
    where = spec, plan, GPU, torch.float32, cache
    free = simulate(*where).most + MARGIN - 1
    changes = dict(fit(free, *where).changes)
    monkeypatch.setattr(estimate, "pick_device", lambda name: GPU)
    monkeypatch.setattr(estimate, "_free_memory", lambda device: free)
    monkeypatch.setattr(estimate, "load_with", lambda name, options: load_with(name, replace(options, device="cpu")))
    found = preview(hollow("sd1"), "nudity", options, [], tmp_path / "run", cache=cache)
    assert changes and changes.items() <= found["options"].items()
    assert not found["warnings"] and "to fit into the GPU's memory, the run takes" in found["notes"][-1]


def stops_in_training(event: Event) -> None:
    if event.stage is Stage.TRAINING and event.step == 2:
        raise Cancelled("stopped")


def test_a_run_is_fitted_when_it_begins_and_continues_with_that(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is free then. Its record says so, and which options it takes."""
    free = [Fit({"low_vram": True}, "it needs 9 GiB of memory, and 5 are free; with low_vram it needs 4"), Fit({}, "")]
    monkeypatch.setattr(context, "_fit", lambda *_: free.pop(0))
    options, folder = EraseOptions(**SHORT, device="cpu", save_every=0), tmp_path / "run"
    with pytest.raises(Cancelled):
        erase(shapes, "circle", options, run_dir=folder, progress=stops_in_training)
    record = read_run(folder)
    assert record["options"]["low_vram"] is True
    (note,) = (each for each in record["notes"] if "memory" in each)
    assert note.startswith("to fit into the GPU's memory, the run takes low_vram: it needs 9 GiB")
    erase(shapes, "circle", options, run_dir=folder, progress=silent, resume=True)
    record = read_run(folder)
    assert record["status"] == "done" and record["options"]["low_vram"] is True
    assert any("continues with low_vram, to which it was fitted" in each for each in record["notes"])


def test_options_stay_as_given_where_that_is_asked_for(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_fit", lambda *_: Fit({"low_vram": True}, "it needs 9 GiB"))
    options = EraseOptions(**SHORT, device="cpu", as_given=True)
    with open_run(shapes, "circle", options, run_dir=tmp_path / "run", progress=silent) as opened:
        assert not opened.plan.options.low_vram
        assert opened.record.notes == ["memory may not suffice: it needs 9 GiB"]


def test_a_comparison_resumes_with_the_options_to_which_each_run_was_fitted(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_fit", lambda *_: Fit({"gradient_checkpointing": True}, "it needs 9 GiB"))
    few: dict[str, Any] = {**SHORT, "eval_images": 2, "device": "cpu", "save_every": 0}
    options = CompareOptions(concept=["circle"], methods=["salun"], seeds=1, **few)
    with pytest.raises(Cancelled):
        compare(options, model=shapes, run_dir=tmp_path, progress=stops_in_training)
    assert not preview_comparison(options, tmp_path, model=shapes)["jobs"][0]["done"]
    compare(options, model=shapes, run_dir=tmp_path, progress=silent, resume=True)
    (job,) = (tmp_path / "jobs").glob("*/run.json")
    assert read_run(job.parent)["options"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("budget", ["equal-steps", "tuned"])
def test_no_method_of_a_comparison_gets_smaller_batches_than_it_is_to_have(budget: str, shapes: Model) -> None:
    options = CompareOptions(concept=["circle"], methods=["salun", "esd", "uce"], seeds=1, budget=budget)
    for job in jobs_of(options):
        chosen = job_options(shapes, options, job, {})
        plan = make_plan(shapes.settings, "shapes", "circle", chosen)
        assert chosen.batch_size == (None if job.variant.method == "uce" else plan.recipe.batch_size)


@pytest.mark.parametrize(
    ("names", "limit", "expected"),
    [
        (("memory.max", "memory.current", "memory.stat"), "9000", [5300]),
        (("memory.max", "memory.current", "memory.stat"), "max", []),
        ([f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")], "9000", [5100]),
        ((), "", []),
    ],
)
def test_a_container_limits_memory(tmp_path: Path, names: list[str], limit: str, expected: list[int]) -> None:
    """Less what the kernel may free when memory is short."""
    stat = "anon 1\ninactive_file 300\ntotal_inactive_file 100\n"
    for name, text in zip(names, (limit, "4000", stat), strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert free_in_container(tmp_path) == expected


def test_a_soft_threshold_is_held_where_the_masters_are(hollow: Callable[[str], str]) -> None:
    """On the GPU, or with `low_vram` in CPU memory."""
    spec = describe(hollow("sd1"))

    def needs(method: str, low_vram: bool) -> tuple[int, int]:
        options = EraseOptions(resolution=64, batch_size=1, method=method, density=1.0, steps=1, low_vram=low_vram)
        found = simulate(spec, make_plan(spec.settings, spec.name, "nudity", options), GPU, torch.bfloat16)
        return found.peak[Stage.TRAINING], found.cpu

    (plain, _), (soft, _) = needs("finetune", False), needs("salun-soft", False)
    (low, held), (soft_low, soft_held) = needs("finetune", True), needs("salun-soft", True)
    assert soft - plain > soft_low - low  # what they share are the packed gradients of a soft threshold
    assert soft_held > held
