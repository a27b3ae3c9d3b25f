"""Bad input and bad luck: one clear line each, and nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import salun
from salun import files
from salun.checkpoints import safetensors_io
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ConfigError, ModelError, TrainingError
from salun.progress import Event
from salun.runs import folder as run_folder
from salun.runs import record

from . import conftest

SHORT = {**conftest.SHORT, "eval_images": 2}
ASSETS = Path(salun.__file__).parent / "assets"


def untouched(shapes: Model) -> bool:
    """Whether the model holds its files' weights."""
    original = shapes.original()
    return all(torch.equal(p.detach(), original[name]) for name, p in shapes.parameters().items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 120 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a disk up to `leave` bytes."""
    ballast = place / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(place).free - leave))
    return ballast


def test_a_disk_too_small_is_reported_before_the_work(small_disk: Path, shapes: Model) -> None:
    fill(small_disk, 20_000_000)
    with pytest.raises(ConfigError, match=r"up to 0\.\d+ GB will be written, but its disk has 0\.02 GB free"):
        salun.erase(shapes, "circle", run_dir=small_disk / "run", **SHORT)
    assert not (small_disk / "run").exists()


def test_a_disk_that_fills_up_while_saving_costs_no_training(small_disk: Path, shapes: Model, tmp_path: Path) -> None:
    ballast: list[Path] = []

    def interfere(event: Event, /) -> None:
        if event.stage == "saving" and not ballast:
            ballast.append(fill(small_disk, 1_000_000))

    with pytest.raises(ModelError, match="Free disk space"):
        salun.erase(shapes, "circle", run_dir=small_disk / "run", progress=interfere, **SHORT)
    assert untouched(shapes)
    for path in small_disk.rglob("*.safetensors"):
        safetensors_io.read_header(path)  # whole
    ballast[0].unlink()
    trained: list[int] = []
    run = salun.erase(
        shapes,
        "circle",
        run_dir=small_disk / "run",
        resume=True,
        progress=lambda event: trained.append(event.step) if event.stage == "training" and event.metrics else None,
        **SHORT,
    )
    assert not trained, "training was done before the disk was full"
    assert run.record.status == "done"


def test_a_full_disk_costs_the_state_not_the_run(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: Any) -> None:
        if "state" in path.parts and path.name.startswith("training"):
            raise ModelError(f"{path} cannot be written: no space left")
        write(path, *rest)

    write = safetensors_io.write
    monkeypatch.setattr(safetensors_io, "write", full)
    messages: list[str] = []
    run = salun.erase(
        shapes, "circle", run_dir=tmp_path, save_every=0, progress=lambda e: messages.append(e.message), **SHORT
    )
    assert any("the training state could not be saved" in line for line in messages)
    assert run.record.status == "done"


def test_a_folder_that_cannot_be_made_is_reported(shapes: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be created: .*is not a folder"):
        salun.erase(shapes, "circle", run_dir=tmp_path / "file" / "run", **SHORT)
    with pytest.raises(ModelError, match="cannot be written"):
        files.write_bytes(tmp_path / "file" / "x.json", b"{}")


CPU_FULL = (  # as torch's allocator words it on Linux
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_FULL)])
def test_out_of_memory_says_what_to_try(
    error: Exception, shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Model.predict

    def scarce(self: Model, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise error
        return predict(self, x_t, *rest)

    monkeypatch.setattr(Model, "predict", scarce)
    with pytest.raises(TrainingError, match=r"out of memory at batch_size 4. Try batch_size 2, low_vram"):
        salun.erase(shapes, "circle", run_dir=tmp_path / "run", **SHORT)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    assert "batch_size 2" in record["error"]
    assert untouched(shapes)


@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_no_number_stops_the_run(
    step: int, shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salun.diffusion.methods import salun as story

    losses, calls = story.training_losses, []

    def poisoned(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        forget, retain = losses(*arguments)
        calls.append(1)
        return forget * (float("nan") if len(calls) == step + 1 else 1.0), retain

    monkeypatch.setattr(story, "training_losses", poisoned)
    with pytest.raises(TrainingError, match="the loss is"):
        salun.erase(shapes, "circle", run_dir=tmp_path / "run", **SHORT)
    assert untouched(shapes)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_model_without_cross_attention_is_refused(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "model"))
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=96,
    ).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="no cross-attention"):
        salun.load(str(folder))


def test_nothing_is_written_into_the_models_own_folder(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "model"))
    before = sorted(p for p in folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"output .* inside the model's own folder"):
        salun.erase(str(folder), "circle", outputs=[str(folder / "unet" / "erased.safetensors")], **SHORT)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match=r"run_dir .* inside the model's own folder"):
        salun.erase(str(folder), "circle", run_dir=tmp_path / "link" / "runs" / "x", **SHORT)
    assert sorted(p for p in folder.rglob("*")) == before


def test_a_clock_that_jumps_back_changes_nothing(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = [2e9]

    def jumping() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    run = salun.erase(shapes, "circle", run_dir=tmp_path / "run", save_every=0, **SHORT)
    assert all(seconds >= 0 for seconds in run.record.timings.values())
    monkeypatch.setattr(record.time, "strftime", lambda form: "20260101-000000")
    names = []
    for _ in range(3):
        folder = run_folder.new_run_folder("circle", tmp_path)
        folder.mkdir()
        names.append(folder.name)
    assert len(set(names)) == 3


EVIL = 'a <script>alert(1)</script> \x1b[31m dog & "cat"\u202e'


def test_prompts_are_shown_escaped_in_the_report(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "model"))
    (folder / "salun.yaml").write_text(
        json.dumps({"sampling": {"resolution": 64, "steps": 2, "guidance": 3.0}}), encoding="utf-8"
    )
    run = salun.erase(
        str(folder), salun.Concept(EVIL, anchor="<b>x</b>"), run_dir=tmp_path / "run", retain_prompts=[EVIL], **SHORT
    )
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>x</b>" not in page
    assert "&lt;script&gt;" in page
    assert run.record.options["concept"] == [EVIL]


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "salun", "erase", "--concept", EVIL, "--model", "shapes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(ASSETS.parents[1])},
        check=False,
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr
    assert "\\x1b[31m" in done.stderr


def test_names_of_run_folders_are_legal_everywhere(tmp_path: Path) -> None:
    for name in (EVIL, "CON", "a/b\\c:d*e?", "..", "ünïcödé", "x" * 300, " . "):
        folder = run_folder.new_run_folder(name, tmp_path)
        assert folder.parent == tmp_path
        tail = folder.name.split("-", 2)[2]
        assert tail
        assert set(tail) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
        assert len(folder.name) < 100


def test_only_a_diffusers_folder_is_replaced(shapes: Model, tmp_path: Path) -> None:
    """A slip of the hand with --force must not cost a folder of other things."""
    treasure = tmp_path / "pictures"
    treasure.mkdir()
    (treasure / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="is not a diffusers folder"):
        salun.erase(shapes, "circle", outputs=[f"{treasure}/"], force=True, **SHORT)
    with pytest.raises(ConfigError, match="holds the run folder"):
        salun.erase(shapes, "circle", outputs=[f"{tmp_path}/out/"], run_dir=tmp_path / "out" / "run", **SHORT)
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "models" / "mine"))
    (tmp_path / "models" / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds the model itself"):
        salun.erase(str(folder), "circle", outputs=[f"{tmp_path}/models/"], force=True, **SHORT)
    for name in ("x.tmp", "x.old"):  # neighbours that are not ours
        (tmp_path / name).mkdir()
    shapes_run = salun.erase(shapes, "circle", **{**SHORT, "steps": 1, "eval_images": 0})
    shapes_run.save(f"{tmp_path}/x/")
    shapes_run.save(f"{tmp_path}/x/", force=True)
    assert (tmp_path / "x" / "model_index.json").is_file()
    assert {"x.tmp", "x.old", "pictures"} <= {p.name for p in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".x.*"))


def test_other_copies_of_the_weights_are_left_out_of_the_erased_folder(tmp_path: Path) -> None:
    """They would still hold the concept."""
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "model"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for copy in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "pruned.ckpt"):
        shutil.copyfile(weights, folder / copy)
    run = salun.erase(str(folder), "circle", run_dir=tmp_path / "run", **{**SHORT, "steps": 1, "eval_images": 0})
    written = {p.relative_to(tmp_path / "run" / "model").as_posix() for p in (tmp_path / "run" / "model").rglob("*")}
    assert "unet/diffusion_pytorch_model.safetensors" in written
    assert "vae/diffusion_pytorch_model.safetensors" in written
    assert (
        not {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "pruned.ckpt"}
        & written
    )
    assert any("not in the erased model" in note and "pruned.ckpt" in note for note in run.record.notes)


def test_a_model_left_erased_does_not_teach_the_cache_wrong(shapes: Model, tmp_path: Path) -> None:
    from salun.runs.cache import Cache

    few = {**SHORT, "steps": 1, "eval_images": 0, "lr": 1e-2}
    first = salun.erase(shapes, "circle", cache=Cache(tmp_path / "a"), **few)
    first.apply()  # and not undone
    second = salun.erase(shapes, "circle", cache=Cache(tmp_path / "b"), **few)
    assert first.mask == second.mask
    assert untouched(shapes)


@pytest.mark.parametrize(
    "text", ["- a list", "sampling: [1]", "detector: 5", "sampling: {steps: .inf}", "a: &x 1\nb: *x"]
)
def test_an_untrusted_salun_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    from salun.errors import SalunError

    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "model"))
    (folder / "salun.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SalunError, match=r"salun\.yaml"):
        salun.load(str(folder))
