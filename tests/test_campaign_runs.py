"""A seeded campaign of foreign run folders: mutated records, and mutated states that training is to be resumed from."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

from salun.checkpoints import safetensors_io
from salun.diffusion.options import EraseJob
from salun.errors import Cancelled, ModelError
from salun.masking import training
from salun.masking.mask import Mask
from salun.masking.optimizers import adam
from salun.masking.training_state import StateFile
from salun.progress import Event, Progress, silent

from .campaign import Findings, in_child

RECORDS, STATES = 1_400, 500
LONG = json.dumps([{"step": i, "forget": 0.5} for i in range(1, 99)])
VALUES: list[Any] = [
    None, True, -1, 0, 7, 1e308, float("nan"), float("inf"), 10**30, "", "x", "a\0b", "\ud800", "x" * 20_000, [], {},
    [[]], {"a": 1}, ["x"] * 2_000, "../../../../etc/passwd", "done", "running", "cancelled", "shapes", "nobody/nothing",
]  # fmt: skip


def record() -> dict[str, Any]:
    """What a finished run of `salun erase` writes, in little."""
    from salun.runs.record import RunRecord

    options = {"model": "shapes", "concept": ["circle"], "output": [], "steps": 4, "density": 0.5, "anchor": ["square"]}
    found = RunRecord(None, "salun erase", {**options, "mask": "saliency"}, 0, "cpu", {"prompts": "0" * 64}).as_json()
    found["outputs"] = [{"kind": "delta", "path": "delta.salun.safetensors", "bytes": 9, "sha256": "0" * 64}]
    found["mask"] = {"mode": "saliency", "density": 0.5, "selected": 3, "total": 6, "warnings": []}
    found["losses"] = [{"step": 1, "forget": 0.5, "retain": 0.5}, {"step": 2, "forget": 0.4, "retain": 0.5}]
    return {**found, "metrics": {"ua": None, "reason": "none"}, "timings": {"training": 1.0}}


def mutated(rng: random.Random, value: Any) -> Any:
    """The record with one to three of its parts replaced, removed, or wrapped in others."""
    for _ in range(rng.randint(1, 3)):
        holder: Any = value
        while True:
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.3:
                break
            holder = holder[key]
        kind = rng.random()
        if kind < 0.15:
            del holder[key]
        elif kind < 0.3:
            for _ in range(rng.choice((1, 20, 200))):
                holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not value:
            break
    return value


def place_record(rng: random.Random, folder: Path) -> None:
    """A run.json that is mutated, cut, of random bytes, or no file at all."""
    shutil.rmtree(folder / "state", ignore_errors=True)
    target = folder / "run.json"
    if target.is_dir() and not target.is_symlink():
        target.rmdir()
    target.unlink(missing_ok=True)
    found = record()
    found["status"] = rng.choice(("done", "done", "cancelled", "running"))
    text = json.dumps(mutated(rng, found))
    kind = rng.random()
    if kind < 0.85:
        target.write_text(text, encoding="utf-8")
    elif kind < 0.90:
        target.write_bytes(text.encode()[: rng.randrange(len(text))])
    elif kind < 0.93:
        target.write_bytes(rng.randbytes(200))
    elif kind < 0.95:
        target.write_text("[" * 200_000 if rng.random() < 0.5 else '{"a":' * 5_000, encoding="utf-8")
    elif kind < 0.97:
        target.write_text(rng.choice(('{"seed": 1' + "0" * 5_000 + "}", '{"notes": [' + "[]," * 6_000_000 + "1]}")))
    elif hasattr(os, "mkfifo") and kind < 0.98:
        os.mkfifo(target)
    elif kind < 0.99:
        target.symlink_to("/dev/zero" if rng.random() < 0.5 else target)
    else:
        target.mkdir()


def evaluate(folder: Path) -> None:
    """`salun eval`, as far as it reads the folder."""
    from salun.diffusion import eval_models as module
    from salun.diffusion.eval_options import EvalOptions
    from salun.diffusion.evaluate import evaluate as run_evaluation

    def reached(*_: object) -> None:
        raise Cancelled("the model would be loaded now")

    before, module.load_with = module.load_with, reached  # type: ignore[assignment]
    try:
        with suppress(Cancelled):
            run_evaluation(str(folder), EvalOptions(n=2))
    finally:
        module.load_with = before


def resume(folder: Path) -> None:
    """`salun erase --resume`, as far as it reads the folder, and the record's own part of it."""
    from cli.resuming import recorded, unfinished
    from salun.runs.record import RunRecord

    try:
        found = unfinished(folder, True, EraseJob, {}, False)
    except typer.Exit:
        return
    options = recorded(found, folder, EraseJob, ()) if found is not None else {}
    assert not any(folder.resolve() not in Path(place).resolve().parents for place in options.get("output", []))
    assert not options.get("allow_pickle")
    again = record()
    with RunRecord(folder, "x", again["options"], 0, "cpu", again["facts"], resume=True).running():
        pass


def train(dtype: torch.dtype, path: Path, progress: Progress) -> training.Trained:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    parameters = {name: nn.Parameter(p.detach().to(dtype)) for name, p in module.named_parameters()}

    def losses(step: int) -> dict[str, Tensor]:
        output = torch.func.functional_call(
            module, {name: p.float() for name, p in parameters.items()}, (torch.ones(8, 6),)
        )
        return {"forget": output.square().mean(), "retain": (output - 1).square().mean()}

    settings = training.TrainingSettings(4, training.constant(1e-2), adam("adam", 1e-2, parameters), {"retain": 0.5})
    state = StateFile(path, "this run")
    return training.train(parameters, Mask.random(parameters, 0.5, 0), losses, settings, progress, state=state)


def place_state(rng: random.Random, dtype: torch.dtype, path: Path) -> None:
    """The state of a run stopped after two steps, mutated in its tensors, its metadata or its bytes."""

    def stop(event: Event, /) -> None:
        if event.step == 2:
            raise Cancelled("stopped")

    path.unlink(missing_ok=True)
    with suppress(Cancelled):
        train(dtype, path, stop)
    tensors, metadata = dict(safetensors_io.tensors(path)), safetensors_io.read_header(path).metadata
    history = metadata["history"]
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(tensors))
        value, kind = tensors[name], rng.randrange(9)
        if kind == 0:
            tensors[name] = torch.zeros(rng.choice((0, 1, value.numel() + 1, 10_000)))
        elif kind == 1:
            tensors[name] = value.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.uint8)))
        elif kind == 2:
            tensors[name] = torch.full_like(value, rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38)))
        elif kind == 3:
            tensors.pop(name)
        elif kind == 4:
            tensors[rng.choice(("x", "x/master", name + "/exp_avg", name.partition("/")[0] + "/more"))] = value.clone()
        elif kind == 5:
            metadata["scale"] = rng.choice(("nan", "inf", "0", "-1", "1e400", "3", "", "0.5", "1", "65536"))
        elif kind == 6:
            metadata["history"] = json.dumps(mutated(rng, json.loads(history)))
        elif kind == 7:
            metadata["history"] = rng.choice(("", "[" * 9_000, "7", "{}", LONG))
        else:
            tensors[name] = value.reshape(-1).view(1, -1)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    safetensors_io.write(path, tensors, {k: v for k, v in metadata.items() if "\ud800" not in v})
    if rng.random() < 0.1:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])


def attack(folder: Path, numbers: range) -> Findings:
    """The first cases are records, the rest states."""
    from salun.diagnostics.inspect import inspect
    from salun.runs.reading import read_run

    found, run = Findings(folder), folder / "run"
    run.mkdir(exist_ok=True)
    Mask.from_dense({"conv_in.weight": torch.ones(2, 3, dtype=torch.bool)}).save(run / "mask.safetensors")
    safetensors_io.write(run / "delta.salun.safetensors", {"x": torch.ones(2)})
    for number in numbers:
        rng = random.Random(number)
        if number < RECORDS:
            place_record(rng, run)
            found.attempt(number, "read", lambda: read_run(run))
            found.attempt(number, "inspect", lambda: _without_delta(lambda: inspect(str(run))))
            found.attempt(number, "eval", lambda: evaluate(run))
            found.attempt(number, "resume", lambda: resume(run))
        else:
            dtype, path = rng.choice((torch.float32, torch.float16)), folder / "state.safetensors"
            place_state(rng, dtype, path)
            found.attempt(number, "train", lambda d=dtype, p=path: train(d, p, silent))  # type: ignore[misc]
    return found


def _without_delta(action: Callable[[], object]) -> None:
    """That the delta is none is not what is tested here: it is read only once the record is accepted."""
    try:
        action()
    except ModelError as error:
        if "delta.salun.safetensors" not in str(error):
            raise


@pytest.mark.slow
def test_campaign_foreign_run_folders_and_states_end_in_one_line(tmp_path: Path) -> None:
    found = in_child("tests.test_campaign_runs", tmp_path, RECORDS + STATES)
    for name, cases in {
        "read": RECORDS,
        "inspect": RECORDS,
        "eval": RECORDS,
        "resume": RECORDS,
        "train": STATES,
    }.items():
        assert 0.01 * cases < found["accepted"][name] < 0.9 * cases, name
