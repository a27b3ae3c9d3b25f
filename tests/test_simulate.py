"""What an erasure needs is known without its weights, its device, or its time: by its steps on fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun.diffusion import estimate
from salun.diffusion import simulate as simulation
from salun.diffusion.estimate import preview
from salun.diffusion.model.loading import describe
from salun.diffusion.model.sketch import sketched
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.simulate import Needs, losses_of, masked_optimizer, simulate, training_data
from salun.errors import ConfigError
from salun.masking.training import take_step
from salun.progress import Stage
from salun.runs.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def needs_of(name: str, device: torch.device = GPU, cache: Cache | None = None, **options: Any) -> Needs:
    spec = describe(name)
    plan = make_plan(spec.settings, spec.name, "nudity", EraseOptions(resolution=64, **options))
    return simulate(spec, plan, device, torch.bfloat16, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


def test_other_numbers_of_steps_need_no_simulation_of_their_own(
    hollow: Callable[[str], str], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held for each step is added: the targets of 4 forget and 4 retain samples."""
    few = needs_of(hollow("sd1"), cache=cache, batch_size=4, steps=5)
    monkeypatch.setattr(simulation, "_simulated", lambda *_: pytest.fail("it was simulated again"))
    many = needs_of(hollow("sd1"), cache=cache, batch_size=4, steps=9, lr=1e-3)
    assert many.cpu - few.cpu == (9 - 5) * (4 + 4) * (4 * 64 * 64) * 4  # the small VAE does not shrink
    assert many.peak == few.peak


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_no_step_of_an_erasure_reads_a_value(family: str, hollow: Callable[..., str]) -> None:
    """Of the published models' shapes: sampling, saliency and training run where reading raises an error."""
    needs = needs_of(hollow(family, "true"), batch_size=4)
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
    ratio = needs_of(hollow("sd1"), batch_size=4, low_vram=True, mask="saliency-ratio")
    assert ratio.cpu > offloaded.cpu  # further sums


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
