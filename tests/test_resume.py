"""Killed or stopped, a run goes on where it was and ends with the bytes that it would have ended with."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import salun
from salun.diffusion.estimate import preview
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.errors import Cancelled, ConfigError
from salun.masking.mask import Mask
from salun.progress import Event
from salun.runs.cache import Cache, size_of
from salun.runs.record import RunRecord

from . import conftest

SHORT = {**conftest.SHORT, "eval_images": 2}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but those that hold times."""
    changing = {"run.json", "report.html", "log.txt", ".lock"}
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in changing
    }


def stopping_at(stage: str, step: int) -> Any:
    def progress(event: Event, /) -> None:
        if (event.stage, event.step) == (stage, step):
            raise Cancelled("stopped")

    return progress


@pytest.fixture(scope="module")
def whole(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an erasure that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    salun.erase(shapes, "circle", run_dir=folder, **SHORT)
    return folder


@pytest.mark.parametrize(
    ("stage", "step"),
    [("sampling", 8), ("images before", 6), ("saliency", 2), ("frozen targets", 3), ("training", 3), ("saving", 2)],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    stage: str, step: int, shapes: Model, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=tmp_path, progress=stopping_at(stage, step), **SHORT)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["status"] == "cancelled"
    steps: list[int] = []

    def listen(event: Event, /) -> None:
        if event.stage == "training" and not event.message:
            steps.append(event.step)

    run = salun.erase(shapes, "circle", run_dir=tmp_path, resume=True, progress=listen, **SHORT)
    assert contents(tmp_path) == contents(whole)
    assert [row["step"] for row in run.history] == list(range(1, SHORT["steps"] + 1))
    if stage in ("training", "saving"):
        assert steps == list(range(step + 1, SHORT["steps"] + 1)) if stage == "training" else not steps
    assert run.record.resumed == 1


def test_a_host_is_asked_at_every_sampler_step(shapes: Model, tmp_path: Path) -> None:
    """A batch can take minutes on a large model: stopping must not wait for its end."""
    asked: list[int] = []

    def count(event: Event, /) -> None:
        if event.stage == "sampling":
            asked.append(event.step)
            if len(asked) == 5:
                raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", seed=77, progress=count, cache=Cache(tmp_path), **{**SHORT, "sampling_steps": 6})
    assert asked == [0] * 5  # within the first batch
    assert not Cache(tmp_path).entries()


def test_resuming_nothing_begins(shapes: Model, whole: Path, tmp_path: Path) -> None:
    salun.erase(shapes, "circle", run_dir=tmp_path / "new", resume=True, **SHORT)
    assert contents(tmp_path / "new") == contents(whole)


def test_a_folder_belongs_to_one_run(shapes: Model, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a finished run"):
        salun.erase(shapes, "circle", run_dir=whole, resume=True, **SHORT)
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=tmp_path, progress=stopping_at("training", 2), **SHORT)
    with pytest.raises(ConfigError, match=r"unfinished run \(cancelled\).*resume"):
        salun.erase(shapes, "circle", run_dir=tmp_path, **SHORT)
    with pytest.raises(ConfigError, match="steps was 4 and is 5"):
        salun.erase(shapes, "circle", run_dir=tmp_path, resume=True, **{**SHORT, "steps": 5})
    with pytest.raises(ConfigError, match="run_dir"):
        salun.erase(shapes, "circle", resume=True, **SHORT)


def test_a_run_resumes_with_its_model_and_images_at_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What identifies them is their content: a path may be relative, and a disk may move."""
    (tmp_path / "a").mkdir()
    shutil.copytree(Path(salun.__file__).parent / "assets" / "shapes", tmp_path / "a" / "shapes")
    options: dict[str, Any] = {**SHORT, "eval_images": 0, "cache": Cache(tmp_path / "cache")}
    model = str(tmp_path / "a" / "shapes")

    def copy_run(event: Event, /) -> None:
        if (event.stage, event.step) == ("training", 3):
            shutil.copytree(tmp_path / "whole", tmp_path / "run")

    salun.erase(model, "circle", run_dir=tmp_path / "whole", save_every=0, progress=copy_run, **options)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    run = salun.erase("./shapes", "circle", run_dir=tmp_path / "run", resume=True, **options)
    assert run.record.resumed == 1
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_fingerprint_has_hashes_in_place_of_paths() -> None:
    def fingerprint(model: str, mask: str, **hashes: str) -> str:
        facts = {name.removesuffix("_hash"): value for name, value in hashes.items()}
        return RunRecord(None, "", {"model": model, "mask": mask}, 0, "cpu", facts).fingerprint

    assert fingerprint("a.safetensors", "full", model_hash="12") == fingerprint("/b/a.ckpt", "full", model_hash="12")
    assert fingerprint("a.safetensors", "full", model_hash="12") != fingerprint("a.safetensors", "full", model_hash="3")
    assert fingerprint("a", "random", mask_hash="") != fingerprint("a", "full", mask_hash=""), "no path, no hash"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["log.txt", "state", ".lock", "run.json"])
def test_a_run_is_not_written_through_a_link_in_its_folder(name: str, shapes: Model, tmp_path: Path) -> None:
    """A folder that somebody else made may have a link in it, to a file or folder of the user's."""
    other = tmp_path / "other"
    if name == "state":
        other.mkdir()
    else:
        other.write_text("{}", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(other)
    with pytest.raises(ConfigError, match="run"):
        salun.erase(shapes, "circle", run_dir=tmp_path / "run", resume=True, **SHORT)
    assert not list(other.iterdir()) if name == "state" else other.read_text(encoding="utf-8") == "{}"


@pytest.fixture(scope="module")
def with_mask(shapes: Model, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an erasure that was stopped once its mask was saved."""
    folder = tmp_path_factory.mktemp("with_mask") / "run"
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=folder, progress=stopping_at("frozen targets", 1), **SHORT)
    return folder


@pytest.mark.parametrize("summary", ["", "7", "{}", '{"warnings": 1, "mode": "saliency"}', "[" * 5_000])
def test_a_saved_mask_with_other_notes_is_found_anew(
    summary: str, shapes: Model, with_mask: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(with_mask, tmp_path / "run")
    path = run / "state" / "mask.safetensors"
    expected = path.read_bytes()
    saved = Mask.load(path)
    Mask(saved.bits, saved.shapes, {**saved.metadata, "summary": summary}).save(path)
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=run, resume=True, progress=stopping_at("frozen targets", 1), **SHORT)
    assert path.read_bytes() == expected


def test_resume_with_another_model_is_reported_in_short_also_by_a_dry_run(shapes: Model, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=tmp_path, progress=stopping_at("sampling", 8), **SHORT)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    preview("shapes", "circle", EraseOptions(**SHORT), [], tmp_path, resume=True)
    record["facts"] |= {"model": "a" * 64, "parts": "b" * 64, "prompts": "c" * 64}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError) as real:
        salun.erase("shapes", "circle", run_dir=tmp_path, resume=True, **SHORT)
    with pytest.raises(ConfigError) as dry:
        preview("shapes", "circle", EraseOptions(**SHORT), [], tmp_path, resume=True)
    assert str(real.value) == str(dry.value)
    assert ("prompts was cccccccccccc… and is" in str(dry.value), "parts" in str(dry.value)) == (True, False)
    assert not re.search("[0-9a-f]{13}", str(dry.value).replace(str(tmp_path), ""))


def test_two_runs_do_not_share_a_folder(shapes: Model, tmp_path: Path) -> None:
    def intrude(event: Event, /) -> None:
        if event.stage == "sampling":
            with pytest.raises(ConfigError, match="in use by another run"):
                salun.erase(shapes, "red", run_dir=tmp_path, resume=True, **SHORT)
            raise Cancelled("seen")

    with pytest.raises(Cancelled, match="seen"):
        salun.erase(shapes, "red", run_dir=tmp_path, progress=intrude, **SHORT)


def test_a_state_saved_at_every_step_is_taken_up(shapes: Model, whole: Path, tmp_path: Path) -> None:
    """As a killed process leaves it: the state of step 2, while step 3 was under way."""
    kept = tmp_path / "kept"

    def copy_state(event: Event, /) -> None:
        if (event.stage, event.step) == ("training", 3):
            shutil.copytree(tmp_path / "run", kept)

    salun.erase(shapes, "circle", run_dir=tmp_path / "run", save_every=0, progress=copy_state, **SHORT)
    assert json.loads((kept / "run.json").read_text(encoding="utf-8"))["status"] == "running"
    trained: list[int] = []
    salun.erase(
        shapes,
        "circle",
        run_dir=kept,
        resume=True,
        save_every=1,
        progress=lambda e: trained.append(e.step) if e.stage == "training" and e.metrics else None,
        **SHORT,
    )
    assert trained == [4], "the state of step 3 was there: nothing is trained twice"
    assert contents(kept) == contents(whole)


def test_without_its_samples_a_run_samples_the_same_again(shapes: Model, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        salun.erase(
            shapes, "circle", run_dir=tmp_path, progress=stopping_at("training", 3), cache=Cache(tmp_path, 0), **SHORT
        )
    salun.erase(shapes, "circle", run_dir=tmp_path, resume=True, cache=Cache(tmp_path, 0), **SHORT)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Two of the fifty that `tools/kill.py` is for: one within the sampling, one within the training."""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).resolve().parents[1] / "tools" / "kill.py")
    assert spec is not None and spec.loader is not None
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    assert kill.main(2, seed=189, folder=tmp_path) == 0


def test_an_output_written_before_the_stop_is_recognised_and_another_is_not(shapes: Model, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"run_dir": tmp_path / "run", "outputs": [str(tmp_path / "x.salun.safetensors")]}
    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", progress=stopping_at("training", 3), **arguments, **SHORT)
    (tmp_path / "x.salun.safetensors").write_bytes(b"a file of the user's, made in between")
    with pytest.raises(ConfigError, match="already exists"):
        salun.erase(shapes, "circle", resume=True, **arguments, **SHORT)
    (tmp_path / "x.salun.safetensors").unlink()
    first = salun.erase(shapes, "circle", resume=True, **arguments, **SHORT)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    again = salun.erase(shapes, "circle", resume=True, **arguments, **SHORT)  # killed after it had written
    assert first.record.outputs[0]["sha256"] == again.record.outputs[0]["sha256"]


class TestCache:
    """Latents are sampled once for the same model, prompts, seeds and sampler."""

    def sampled(self, shapes: Model, cache: Cache, concept: str = "circle", **options: Any) -> int:
        """Runs until all is sampled, and counts the batches that were not in the cache."""
        before = len(cache.entries())
        with pytest.raises(Cancelled):
            salun.erase(shapes, concept, cache=cache, progress=stopping_at("saliency", 1), **{**SHORT, **options})
        return len(cache.entries()) - before

    def test_a_second_run_samples_nothing_anew(self, shapes: Model, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        assert self.sampled(shapes, cache) == 4  # forget, anchor, retain, pictures before
        assert self.sampled(shapes, cache, lr=1e-3, density=0.1) == 0
        assert self.sampled(shapes, cache, retain_latents=9) == 1
        assert self.sampled(shapes, cache, seed=1) == 4
        assert self.sampled(shapes, cache, "red") == 4

    def test_an_entry_cut_short_or_altered_is_made_again(self, shapes: Model, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        assert self.sampled(shapes, cache) == 4
        sound = contents(tmp_path)
        for i, (path, _, _) in enumerate(cache.entries()):
            content = path.read_bytes()
            path.write_bytes(content[:-7] if i % 2 else content[:-1] + bytes([content[-1] ^ 1]))
        assert all(content != sound[name] for name, content in contents(tmp_path).items())
        assert self.sampled(shapes, cache) == 0
        assert contents(tmp_path) == sound

    def test_the_limit_holds_and_the_longest_unused_go_first(self, tmp_path: Path) -> None:
        import os

        import torch

        cache = Cache(tmp_path, limit=10_000)
        for i in range(8):
            cache.put(f"{i:064x}", {"x": torch.full((500,), float(i))})
            os.utime(cache._path(f"{i:064x}"), (i, i))
            cache.get(f"{0:064x}")  # used all the time
        assert sum(size for _, size, _ in cache.entries()) <= 10_000
        assert cache.get(f"{0:064x}") is not None
        assert cache.get(f"{1:064x}") is None
        kept = cache.get(f"{7:064x}")
        assert kept is not None
        assert kept["x"][0] == 7

    def test_no_limit_no_file(self, tmp_path: Path) -> None:
        import torch

        Cache(tmp_path, limit=0).put("a" * 64, {"x": torch.ones(3)})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("text", "size"), [("0", 0), ("500MB", 500_000_000), ("2.5 gb", 2_500_000_000)])
    def test_sizes_are_read_as_people_write_them(self, text: str, size: int) -> None:
        assert size_of(text) == size

    @pytest.mark.parametrize("text", ["", "much", "-1", "5 apples"])
    def test_other_sizes_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="SALUN_CACHE_SIZE"):
            size_of(text)
