"""Two processes of accelerate's launcher do what one does on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, torch
from torch import nn
from torch.nn import functional as F
from salun.mask import Mask
from salun.processes import current
from salun.saliency import scores_from_losses
from salun.training import TrainingSettings, fine_tune, step_generator

who = current()
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
    return F.cross_entropy(module(x), y), module(x).square().mean()

mask = Mask.from_scores(scores_from_losses(parameters, saliency(), processes=who), 0.3)
trained = fine_tune(parameters, mask, losses, TrainingSettings(8, 1e-2, 0.5), processes=who)
if who.rank == 0:
    mask.save(sys.argv[1] + ".mask")
    torch.save(trained.masters, sys.argv[1] + ".masters")
"""


@pytest.mark.slow
def test_two_processes_find_the_mask_and_weights_of_one(tmp_path: Path) -> None:
    from salun.mask import Mask

    script = tmp_path / "job.py"
    script.write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, prefix in (("one", []), ("two", launch)):
        command = [sys.executable, *prefix, str(script), str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240)
    one, two = (Mask.load(tmp_path / f"{name}.mask") for name in ("one", "two"))
    assert one == two  # of so few scores none lies within a rounding of the threshold
    ours, theirs = (torch.load(tmp_path / f"{name}.masters", weights_only=True) for name in ("one", "two"))
    for name, master in ours.items():
        torch.testing.assert_close(theirs[name], master, atol=1e-5, rtol=1e-4)  # float32 sums in another order
