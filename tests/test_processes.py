"""Two processes of accelerate's launcher do what one does on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import atexit, os, sys, torch
from torch import nn
from torch.nn import functional as F
from salun.masking.mask import Mask
from salun.compute.processes import current_processes
from salun.masking.saliency import scores_from_losses
from salun.masking.optimizers import adam
from salun.masking.training import TrainingSettings, constant, train
from salun.randomness import step_generator

@atexit.register  # before the group is there, so that it is called after the group is closed
def alone_again():
    if len(os.listdir("/proc/self/task")) > 1:  # a thread of the group that outlives Python may abort the process
        os._exit(7)

who = current_processes()
assert who.count == int(sys.argv[2])
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
parameters = dict(module.named_parameters())

def share(step):
    x = torch.randn(12, 6, generator=step_generator(0, step))
    y = torch.randint(3, (12,), generator=step_generator(1, step))
    return x[who.rank :: who.count], y[who.rank :: who.count]

def saliency():
    for step in range(5):
        x, y = share(step)
        yield -F.cross_entropy(module(x), y), len(x)

def losses(step):
    x, y = share(step)
    return {"forget": F.cross_entropy(module(x), y), "retain": module(x).square().mean()}

mask = Mask.from_scores(scores_from_losses(parameters, saliency(), processes=who), 0.3)
settings = TrainingSettings(8, constant(1e-2), adam("adam", 1e-2, parameters), {"retain": 0.5})
trained = train(parameters, mask, losses, settings, processes=who)
if who.rank == 0:
    mask.save(sys.argv[1] + ".mask")
    torch.save(trained.masters, sys.argv[1] + ".masters")
"""


FEW = """
from salun.__main__ import main
from salun.diffusion import probe

probe.MANY, probe.OTHERS = 16, 8  # images; more take longer
main()
"""

# without a GPU `--multi_gpu` starts as many processes, which then meet through gloo; `--cpu` would start one
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
def test_an_erasure_by_two_processes_is_that_of_one(tmp_path: Path) -> None:
    from salun.masking.mask import Mask

    root, program = str(Path(__file__).resolve().parents[1]), tmp_path / "few.py"
    program.write_text(FEW, encoding="utf-8")
    job = ["erase", "--concept", "circle", "--until", "ua>=0.1", "--steps", "6"]
    job += ["--batch-size", "4", "--forget-latents", "8"]
    job += ["--low-vram"]  # samples one at a time, so that there are many batches to share out
    job += ["--retain-latents", "8", "--eval-images", "4", "--sampling-steps", "4", "--device", "cpu", "--json"]
    said = {}
    for name, prefix in (("one", []), ("two", LAUNCH)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "SALUN_CACHE": str(tmp_path / name)}
        command = [sys.executable, *prefix, str(program), *job, "--run-dir", f"run-{name}"]
        done = subprocess.run(
            command, check=False, env=environment, cwd=tmp_path, timeout=400, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout)
    one, two = (Mask.load(tmp_path / f"run-{name}" / "mask.safetensors") for name in said)
    assert one.selected == two.selected
    assert one.jaccard(two) >= 0.9999  # float32 sums in another order move a few scores across the threshold
    ours, theirs = (record["losses"] for record in said.values())
    assert theirs == [pytest.approx(row, rel=1e-2, abs=1e-4) for row in ours]
    figures = [record["metrics"]["ra_after"]["value"] for record in said.values()]
    assert abs(figures[0] - figures[1]) <= 100 / 24 * 2  # two of the 24 attributes seen, at most
    assert [said[name]["facts"]["processes"] for name in said] == ["1", "2"]
    assert len(list((tmp_path / "run-two").glob("report.html"))) == 1


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, *LAUNCH, "-m", "salun", "erase", "--concept", "circle", "--batch-size", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        command, check=False, env=environment, cwd=tmp_path, timeout=200, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "--batch-size is 3, but must be divisible by the number of processes (2)" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_find_the_mask_and_weights_of_one(tmp_path: Path) -> None:
    from salun.masking.mask import Mask

    script = tmp_path / "job.py"
    script.write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for name, prefix in (("one", []), ("two", LAUNCH)):
        command = [sys.executable, *prefix, str(script), str(tmp_path / name), str((len(prefix) and 2) or 1)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240)
    one, two = (Mask.load(tmp_path / f"{name}.mask") for name in ("one", "two"))
    assert one == two  # of so few scores none lies within a rounding of the threshold
    ours, theirs = (torch.load(tmp_path / f"{name}.masters", weights_only=True) for name in ("one", "two"))
    for name, master in ours.items():
        torch.testing.assert_close(theirs[name], master, atol=1e-5, rtol=1e-4)  # float32 sums in another order
