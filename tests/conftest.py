"""Shared fixtures: the bundled model, loaded once, and one short erasure on it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import salun
from salun.checkpoints.locate import ASSETS
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.result import Run
from salun.diffusion.unread import unread
from tools import checkpoints

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

SHORT = {
    "steps": 4, "batch_size": 4, "forget_latents": 8, "retain_latents": 8, "eval_images": 8, "sampling_steps": 3,
}  # fmt: skip
SHOWN = {**SHORT, "sampling_steps": 6}  # the detector tells what the samples show


def short_of(method: str, **options: Any) -> dict[str, Any]:
    """`SHORT` as far as it has an effect with a method, and these options."""
    chosen = {**SHORT, **options}
    ignored = {*unread(EraseOptions(**chosen, method=method))} & {*SHORT}
    return {name: value for name, value in chosen.items() if name not in ignored}


# files that take more than about half a minute, the longest first; the others follow
LONG = (
    "readme", "ui_browser", "resume", "classification_compare", "single_file", "jobs", "cli", "comfy_nodes", "verdict",
    "attacks", "class_models", "eval", "true_size", "fuzz", "compare", "webui_api", "processes", "memory",
    "classification_search", "until", "harden", "other_names", "packaging", "shapes",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that no process is left alone with one at the end."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests keep nothing in the user's cache and find nothing there."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SALUN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shapes() -> Iterator[Model]:
    """The bundled model. Whatever a test does with it, and however that ends, it is as before afterwards."""
    model = salun.load("shapes", device="cpu")
    before = model.settings, model.clip_skip, model.low_vram, model.attention
    yield model
    assert (model.settings, model.clip_skip, model.low_vram, model.attention) == before
    assert not model.unet.training
    assert all(torch.equal(p, model.original()[name]) for name, p in model.parameters().items())


@pytest.fixture(scope="session")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Family → a checkpoint of names and shapes, without weights; small, or of the size of the published model."""
    folder = tmp_path_factory.mktemp("hollow")

    def make(family: str, size: str = "small") -> str:
        path = folder / f"{family}-{size}.safetensors"
        return str(path if path.exists() else checkpoints.make(path, family, size=size, hollow=True))

    return make


@pytest.fixture(scope="session")
def short_run(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An erasure of a few steps: too short to forget, long enough to write everything."""
    folder = tmp_path_factory.mktemp("runs") / "circle"
    return salun.erase(shapes, salun.Concept("circle", anchor="square"), run_dir=folder, seed=3, **SHOWN)


@pytest.fixture
def run_folder(short_run: Run) -> Path:
    """The folder of `short_run`."""
    assert short_run.record.folder is not None
    return short_run.record.folder


@pytest.fixture
def little() -> torch.nn.Module:
    """A module of a few layers, the same at every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))


@pytest.fixture
def copy_of_shapes(tmp_path: Path) -> Path:
    """A folder of the bundled model's files, to be changed."""
    return Path(shutil.copytree(ASSETS / "shapes", tmp_path / "my model"))


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command `salun` with these arguments in this process, which spares its start: exit code and output."""
    from salun.__main__ import main

    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for name in ("stdout", "stderr")}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["salun", *arguments])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGINT, handler)
    printed = []
    for stream in streams.values():
        stream.flush()
        printed.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    code = ended.value.code
    return subprocess.CompletedProcess(["salun", *arguments], code if isinstance(code, int) else 0, *printed)


def change_config(folder: Path, **values: Any) -> None:
    """Set values in the config.json of a model's folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
