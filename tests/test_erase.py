"""An erasure end to end on the bundled model, a short one: what it promises of files, weights and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import salun
from salun import files
from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.locate import ASSETS
from salun.delta.delta import Delta
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.result import Run
from salun.errors import Cancelled, ConfigError, MaskError, ModelError
from salun.masking.mask import Mask
from salun.progress import Event

from .conftest import SHORT, SHOWN

UNET = "unet/diffusion_pytorch_model.safetensors"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def test_weights_outside_the_mask_are_bit_identical_in_the_written_file(run_folder: Path) -> None:
    before, after = load_file(ASSETS / "shapes" / UNET), load_file(run_folder / "model" / UNET)
    mask = Mask.load(run_folder / "mask.safetensors")
    assert set(before) == set(after) == set(mask)
    moved = 0
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.float16
        changed = bits(tensor) != bits(after[name])
        assert not torch.any(changed & ~mask.dense(name)), name
        moved += int(changed.sum())
    assert moved > 0.1 * mask.selected


def test_everything_else_in_the_folder_is_byte_identical(run_folder: Path) -> None:
    for source in (ASSETS / "shapes").rglob("*"):
        if (source.is_file() and source.name != Path(UNET).name) or source.parent.name == "vae":
            copy = run_folder / "model" / source.relative_to(ASSETS / "shapes")
            assert copy.is_file() == source.is_file()
            assert not source.is_file() or copy.read_bytes() == source.read_bytes(), source


def test_the_erased_folder_loads_as_a_pipeline_and_differs(run_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pictures = []
    for folder in (ASSETS / "shapes", run_folder / "model"):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        result = pipeline(
            "one red circle, plain style",
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=generator,
            output_type="np",
        )
        pictures.append(result.images[0])
    assert pictures[0].shape == (64, 64, 3)
    assert np.isfinite(pictures[1]).all()
    assert not np.array_equal(pictures[0], pictures[1])


def test_the_delta_leads_to_the_erased_file_and_back(run_folder: Path) -> None:
    base, erased = load_file(ASSETS / "shapes" / UNET), load_file(run_folder / "model" / UNET)
    delta = Delta.load(run_folder / "delta.salun.safetensors")
    applied, undone = {**base, **delta.apply(base)}, {**erased, **delta.undo(erased)}
    for name in base:
        assert torch.equal(bits(applied[name]), bits(erased[name]))
        assert torch.equal(bits(undone[name]), bits(base[name]))


def test_the_model_holds_its_own_weights_again(shapes: Model, short_run: Run) -> None:
    stored = load_file(ASSETS / "shapes" / UNET)
    for name, p in shapes.parameters().items():
        assert torch.equal(p, stored[name].float()), name
        assert not p.requires_grad
    name = next(iter(short_run.erased))
    short_run.apply()
    assert torch.equal(shapes.parameters()[name], short_run.erased[name].float())
    short_run.undo()
    assert torch.equal(shapes.parameters()[name], stored[name].float())


def test_the_record_says_what_was_done(run_folder: Path) -> None:
    record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    assert record["schema"] == 1
    assert record["status"] == "done"
    assert record["options"]["steps"] == 4
    assert record["options"]["target"] == "frozen"  # `auto` is resolved
    unset = {name for name, value in record["options"].items() if value is None}
    # nothing to resolve: no pictures, and what the model's files tell
    assert unset == {
        "forget_images", "retain_images", "detector", "clip_skip", "components", "prediction_type", "negative_prompt",
        "sampler", "until",
    }  # fmt: skip
    assert [row["step"] for row in record["losses"]] == [1, 2, 3, 4]
    assert record["mask"]["selected"] == record["mask"]["total"] // 2
    assert record["metrics"]["ua"]["n"] == 8
    assert {"ra_before", "ra_after", "per_class", "anchor", "unclassified", "frechet"} <= set(record["metrics"])
    assert {entry["kind"] for entry in record["outputs"]} == {"folder", "delta", "mask"}
    for entry in record["outputs"]:
        assert files.sha256_file(run_folder / entry["path"]) == entry["sha256"]
        assert (run_folder / entry["path"]).stat().st_size == entry["bytes"]
    assert str(run_folder) not in json.dumps({**record, "command": ""})  # paths inside are relative
    assert not list(run_folder.rglob("*.tmp"))
    assert "training:" in (run_folder / "log.txt").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_bytes(shapes: Model, run_folder: Path, tmp_path: Path) -> None:
    salun.erase(shapes, salun.Concept("circle", anchor="square"), run_dir=tmp_path / "again", seed=3, **SHOWN)
    for name in (f"model/{UNET}", "mask.safetensors", "delta.salun.safetensors", "before_after.png"):
        assert (tmp_path / "again" / name).read_bytes() == (run_folder / name).read_bytes(), name


def test_another_seed_gives_another_result(shapes: Model, short_run: Run) -> None:
    other = salun.erase(shapes, "circle", seed=4, **SHOWN)
    assert other.mask != short_run.mask


@pytest.mark.parametrize(
    "options",
    [
        {"mask": "shuffled"},
        {"mask": "saliency-ratio"},
        {"mask": "random", "density": 0.1},
        {"mask": "full"},
        {"method": "salun-soft", "density": 0.2},
        {"scope": "xattn"},
        {"target": "online", "retain_target": "noise", "anchor_share": 0.0},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_variant_trains_what_its_mask_says_and_no_more(shapes: Model, options: dict[str, object]) -> None:
    run = salun.erase(shapes, "circle", seed=1, **{**SHORT, "eval_images": 0}, **options)
    stored = load_file(ASSETS / "shapes" / UNET)
    assert run.erased
    for name, tensor in run.erased.items():
        changed = bits(stored[name]) != bits(tensor)
        assert not torch.any(changed & ~run.mask.dense(name))
        assert options.get("scope") != "xattn" or ".attn2." in name
    assert run.record.mask["mode"] == ("soft" if "method" in options else options.get("mask", "saliency"))
    assert run.metrics["ua"] is None
    assert "no evaluation images" in run.metrics["reason"]


def test_a_mask_file_is_used_as_it_is(shapes: Model, short_run: Run, run_folder: Path) -> None:
    path = run_folder / "mask.safetensors"
    again = salun.erase(shapes, salun.Concept("circle", anchor="square"), mask=str(path), seed=3, **SHOWN)
    assert again.mask == short_run.mask
    for name, tensor in short_run.erased.items():
        assert torch.equal(bits(again.erased[name]), bits(tensor))


def test_a_mask_of_another_model_is_refused(shapes: Model, run_folder: Path, tmp_path: Path) -> None:
    mask = Mask.load(run_folder / "mask.safetensors")
    Mask(mask.bits, mask.shapes, {**mask.metadata, "base_hash": "0" * 64}).save(tmp_path / "other.safetensors")
    with pytest.raises(MaskError, match="made from another model"):
        salun.erase(shapes, "circle", mask=str(tmp_path / "other.safetensors"), **SHORT)
    few = {name: mask.bits[name] for name in list(mask)[:5]}
    Mask(few, {name: mask.shapes[name] for name in few}).save(tmp_path / "few.safetensors")
    with pytest.raises(MaskError, match="not in the mask"):
        salun.erase(shapes, "circle", mask=str(tmp_path / "few.safetensors"), **SHORT)


@pytest.mark.parametrize("stage", ["sampling", "saliency", "training", "images after", "saving"])
def test_cancel_at_any_stage_leaves_no_output(shapes: Model, tmp_path: Path, stage: str) -> None:
    def stop(event: Event) -> None:
        if event.stage == stage:
            raise Cancelled

    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", run_dir=tmp_path / "run", progress=stop, **SHORT)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "cancelled"
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"run.json", "log.txt", ".lock", "state"}
    stored = load_file(ASSETS / "shapes" / UNET)
    assert all(torch.equal(p, stored[name].float()) for name, p in shapes.parameters().items())


def test_outputs_are_checked_before_hours_of_work(shapes: Model, tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    for target, message in (
        (str(taken), "already exists"),
        ("x.ckpt", r"End it in \.safetensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            salun.erase(shapes, "circle", outputs=[target], **SHORT)
    assert taken.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["run/mask.safetensors"], "reserved in the run folder"),
        (["run/state/x.safetensors"], "reserved in the run folder"),
        (["a/x.safetensors", "a/"], "another output"),
        (["x.safetensors", "./x.safetensors"], "another output"),
        (["parts/"], "which is an input"),
    ],
)
def test_outputs_never_take_the_place_of_each_other_or_of_what_is_read(
    outputs: list[str], message: str, shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        salun.erase(shapes, "circle", outputs=outputs, run_dir="run", force=True, forget_images="parts", **SHORT)
    assert (tmp_path / "parts" / "model_index.json").is_file()


def test_run_save_writes_each_format(short_run: Run, tmp_path: Path, run_folder: Path) -> None:
    short_run.save(tmp_path / "erased.safetensors")
    short_run.save(tmp_path / "circle.salun.safetensors")
    short_run.report.save(tmp_path / "report.html")
    erased = tmp_path / "erased.safetensors"
    named = keymap.unet_from_ldm(safetensors_io.read_header(erased).names)
    written, own = load_file(erased), load_file(run_folder / "model" / UNET)
    assert {name: written[theirs].tolist() for theirs, name in named.items()} == {k: t.tolist() for k, t in own.items()}
    for name in ("circle.lora.safetensors", "circle.diff.safetensors"):
        short_run.save(tmp_path / name)
        assert all(key.startswith("lora_unet_") for key in safetensors_io.read_header(tmp_path / name).names)
    assert safetensors_io.read_header(erased).metadata["salun.concept"] == "circle"
    assert (tmp_path / "circle.salun.safetensors").read_bytes() == (run_folder / "delta.salun.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        short_run.save(erased)


def test_a_folder_is_a_model_like_any_other(copy_of_shapes: Path) -> None:
    run = salun.erase(str(copy_of_shapes), "night", seed=0, **{**SHORT, "eval_images": 2})
    assert run.plan.concepts[0].anchor == "plain"
    assert run.metrics["ua"] is not None


def test_detector_that_cannot_tell_gives_no_number(copy_of_shapes: Path) -> None:
    (copy_of_shapes / "salun.yaml").unlink()
    settings = {"sampling": {"resolution": 64, "steps": 4, "guidance": 3.0}}
    (copy_of_shapes / "salun.yaml").write_text(json.dumps(settings), encoding="utf-8")
    run = salun.erase(
        str(copy_of_shapes), salun.Concept("golden retriever", anchor="cat"), **{**SHORT, "eval_images": 2}
    )
    assert run.metrics["detector"]["name"] == "self"  # and the model knows no dogs
    assert run.metrics["ua"] is None and "cannot tell" in run.metrics["reasons"]["ua"]
    assert run.metrics["anchor_gap"]["value"] > 0
    assert "cannot tell" in run.report.html


def test_a_sensitive_concept_is_blurred(copy_of_shapes: Path) -> None:
    (copy_of_shapes / "salun.yaml").write_text(
        json.dumps({"sampling": {"resolution": 64, "steps": 2, "guidance": 3.0}}), encoding="utf-8"
    )
    run = salun.erase(str(copy_of_shapes), "nudity", **{**SHORT, "eval_images": 2})
    assert run.plan.concepts[0].sensitive
    assert "Blurred" in run.report.html
    forget, retain = run.grids()
    assert forget is not None
    assert retain is not None
    tile = forget[8:136, 56:184].astype(int)
    assert np.abs(np.diff(tile, axis=0)).max() <= 8  # no edge survives: neighbours differ by a few levels at most


def test_a_nan_in_a_weight_is_reported_at_once(copy_of_shapes: Path) -> None:
    tensors = load_file(copy_of_shapes / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, copy_of_shapes / UNET)
    with pytest.raises(ModelError, match=r"conv_in\.weight is not finite"):
        salun.load(str(copy_of_shapes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "truncated"),
        ("pickle", "no safetensors weights"),
        ("pipeline", "FluxPipeline"),
        ("inpainting", "9 input channels"),
        ("index", "model_index.json is missing"),
    ],
)
def test_folders_that_cannot_be_used_say_why(copy_of_shapes: Path, damage: str, message: str) -> None:
    weights = copy_of_shapes / UNET
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif damage == "inpainting":
        config = copy_of_shapes / "unet" / "config.json"
        config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'), encoding="utf-8")
    elif damage == "pipeline":
        (copy_of_shapes / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    else:
        (copy_of_shapes / "model_index.json").unlink()
    with pytest.raises(ModelError, match=message):
        salun.load(str(copy_of_shapes))


@pytest.mark.parametrize("name", ["shape", "no/where/at/all", "./nothing", "model.ckpt"])
def test_models_that_are_not_there_say_what_would_be(name: str) -> None:
    with pytest.raises(ModelError, match=r"shapes|models_dir"):
        salun.load(name)
