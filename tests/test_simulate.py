"""What an erasure needs is known without its weights, its device, or its time: by its steps on fake tensors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun.diffusion import estimate
from salun.diffusion.estimate import preview
from salun.diffusion.fit import MARGIN, as_recorded, fit
from salun.diffusion.model.loading import describe, load_with
from salun.diffusion.model.sketch import sketched
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.simulate import Needs, losses_of, masked_optimizer, simulate, training_data
from salun.errors import ConfigError
from salun.masking.training import take_step
from salun.progress import Stage
from salun.runs.cache import Cache
from tools import checkpoints

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Family → a checkpoint of names and shapes, without weights."""
    folder = tmp_path_factory.mktemp("hollow")

    def make(family: str) -> str:
        path = folder / f"{family}.safetensors"
        return str(path if path.exists() else checkpoints.make(path, family, hollow=True))

    return make


def needs_of(name: str, device: torch.device = GPU, cache: Cache | None = None, **options: Any) -> Needs:
    spec = describe(name)
    plan = make_plan(spec.settings, spec.name, "nudity", EraseOptions(resolution=64, **options))
    return simulate(spec, plan, device, torch.bfloat16, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_no_step_of_an_erasure_reads_a_value(family: str, hollow: Callable[[str], str], cache: Cache) -> None:
    """Sampling, saliency and two training steps run where reading raises an error: on a GPU the host never waits."""
    needs = needs_of(hollow(family), cache=cache, batch_size=4)
    assert {Stage.SAMPLING, Stage.SALIENCY, Stage.TRAINING} <= set(needs.peak)


@pytest.mark.parametrize("read", [float, lambda t: t.nonzero(), lambda t: t[t > 0]])
def test_a_step_that_reads_a_value_is_found(read: Callable[[Tensor], Any], hollow: Callable[[str], str]) -> None:
    spec = describe(hollow("sd1"))
    plan = make_plan(spec.settings, spec.name, "nudity", EraseOptions(resolution=64, batch_size=1))

    def losses(step: int) -> dict[str, Tensor]:
        named = losses_of(model, plan, data, step)
        read(named["forget"])
        return named

    with sketched(spec, torch.float32) as model, model.configured(plan.options):
        data = training_data(model, plan)
        with masked_optimizer(model, plan, cached=False) as optimizer, pytest.raises(RuntimeError):
            take_step(optimizer, losses, 0, {})


def test_what_saves_memory_is_simulated(hollow: Callable[[str], str], cache: Cache) -> None:
    plain = needs_of(hollow("sd1"), cache=cache, batch_size=4)
    offloaded = needs_of(hollow("sd1"), batch_size=4, low_vram=True)
    assert offloaded.most < plain.most
    assert offloaded.cpu > plain.cpu > 0  # a probe of a goal holds the trained weights there


def test_an_erasure_is_fitted_to_the_memory_of_a_device(hollow: Callable[[str], str], cache: Cache) -> None:
    """By the first options with which it fits: those that change no result come before smaller batches."""
    spec = describe(hollow("sd1"))
    plan = make_plan(spec.settings, spec.name, "nudity", EraseOptions(resolution=512))
    where = spec, plan, GPU, torch.bfloat16, cache
    free = simulate(*where).most + MARGIN
    assert (fit(free, *where).text, fit(free, *where).fits) == ("", True)
    expected = [{"gradient_checkpointing": True}, {"low_vram": True}, {"low_vram": True, "batch_size": 4}]
    for changes in expected:
        found = fit(free - 1, *where)
        assert found.fits and found.changes == changes
        needed = re.search(r" needs ([\d.]+) GiB", found.text)
        assert needed is not None and float(needed[1]) < free / 2**30
        changed = replace(plan.options, **changes)
        other = replace(plan, options=changed, recipe=replace(plan.recipe, batch_size=changed.batch_size))
        free = simulate(spec, other, *where[2:]).most + MARGIN
    given = fit(free - 1, *where, batch_size=8)
    assert not given.fits and not given.changes and "with low_vram it still needs" in given.text


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
    assert not found["warnings"] and "fitted to the GPU's memory: it needs" in found["notes"][-1]


@pytest.mark.slow
def test_simulated_memory_is_what_torch_allocates() -> None:
    """The benchmark that compares them, on the bundled model: within 10 %."""
    command = [sys.executable, "benchmarks/memory.py", "--check", "digits", "--batch", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout.split()[-1].rstrip("%"))) < 10, done.stdout


def test_a_dry_run_loads_no_model_that_does_not_fit(
    hollow: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(estimate, "load_with", load)
    monkeypatch.setattr(estimate, "_free_memory", lambda device: 1)
    options = EraseOptions(resolution=64, batch_size=1)
    plan = preview(hollow("sd1"), "nudity", options, [], tmp_path / "run", cache=Cache(tmp_path / "cache"))
    assert not plan["measured"] and "still needs" in plan["warnings"][-1]
    assert 0 < plan["seconds"]["least"] < plan["seconds"]["total"] < plan["seconds"]["most"]
    with pytest.raises(ConfigError, match="resolution"):
        preview(hollow("sd1"), "nudity", EraseOptions(resolution=65), [], tmp_path / "run")


@pytest.mark.slow
def test_the_gpu_benchmark_keeps_the_parts_that_were_done(tmp_path: Path) -> None:
    """Rehearsed on the CPU at toy sizes."""
    output = tmp_path / "results.json"
    parts = ["matrix product", "SD 1.5, batch 1"]
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--output", str(output)]
    arguments = [argument for part in parts for argument in ("--only", part)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert list(results) == parts and results["SD 1.5, batch 1"]["seconds"] > 0
    cut_off = subprocess.run([*command, "--seconds", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert cut_off.returncode == 0, cut_off.stderr
    assert json.loads(output.read_text(encoding="utf-8"))["parts"] == results
