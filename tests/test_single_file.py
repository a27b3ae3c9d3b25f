"""Single files: loaded with nothing but themselves, erased from, written back, and turned into folders and back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import salun
from salun.__main__ import main
from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.families.registry import FAMILIES
from salun.checkpoints.locate import ASSETS
from salun.checkpoints.pickled import as_safetensors
from salun.checkpoints.single_file import open_unet
from salun.delta import commands as deltas
from salun.diagnostics.inspect import inspect
from salun.diffusion.data.latents import sample_images
from salun.diffusion.model.clip_tokenizer import clip_tokenizer
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import ModelOptions
from salun.diffusion.output import erased_tensors
from salun.errors import ConfigError, ModelError
from salun.masking.mask import Mask
from salun.runs.cache import Cache
from tools.checkpoints import make

from .test_families import make as make_folder

QUICK: dict[str, Any] = {
    "steps": 2, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 0, "lr": 1e-3,
    "resolution": 64, "sampling_steps": 2,
}  # fmt: skip
V = ("a picture of a cat", "")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a small checkpoint of a family, once for the same arguments."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(family: str, **keywords: Any) -> Path:
        key = repr((family, sorted(keywords.items())))
        if key not in made:
            made[key] = make(folder / f"{len(made)}-{family}.safetensors", family, **keywords)
        return made[key]

    return get


def predictions(model: Model) -> torch.Tensor:
    """What a model makes of a prompt: text encoders, UNet and VAE all have a part in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.latent_channels, 8, 8, generator=generator)
    seen = model.predict(x, torch.tensor([10, 900]), model.encode(V))
    return torch.cat([seen.flatten(), torch.from_numpy(model.decode(x)).float().flatten()])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return safetensors_io.raw_bytes(tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_erased_file_shows_what_the_erasure_showed(family: str, file: Callable[..., Path], tmp_path: Path) -> None:
    """erase → file → reload: the same pictures, other tensors byte for byte, and nothing outside the mask moved."""
    source = file(family, dtype="fp16", ema=True, metadata={"made by": "a stranger"})
    before = source.read_bytes()
    target = tmp_path / "erased.safetensors"
    model = salun.load(str(source), device="cpu")
    run = salun.erase(model, "golf ball", run_dir=tmp_path / "run", outputs=[str(target)], **QUICK)
    run.apply()
    seen = predictions(model)
    run.undo()
    assert source.read_bytes() == before
    torch.testing.assert_close(predictions(salun.load(str(target), device="cpu")), seen, rtol=0, atol=0)
    old, new = load_file(source), load_file(target)
    dropped = {name for name in old if name.startswith(keymap.EMA)}
    assert dropped
    assert set(new) == set(old) - dropped
    header = safetensors_io.read_header(target)
    assert header.listed == [n for n in safetensors_io.read_header(source).listed if n not in dropped]
    assert header.metadata["made by"] == "a stranger"
    assert header.metadata["salun.concept"] == "golf ball"
    ours = keymap.unet_from_ldm(old)
    changed = {name for name in new if not torch.equal(bits(old[name]), bits(new[name]))}
    assert changed
    for name in changed:
        assert old[name].dtype == new[name].dtype == torch.float16
        differs = old[name].view(torch.int16) != new[name].view(torch.int16)
        assert not torch.any(differs & ~run.mask.dense(ours[name]))
    rounding = run.record.rounding
    assert 0 < rounding["changed"] <= run.mask.selected
    assert rounding["changed"] - rounding["lost_to_rounding"] == run.delta.changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_a_file_ends_with_a_file_a_delta_and_a_note_of_what_was_skipped(
    family: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    run = salun.erase(str(file(family, ema=True)), "golf ball", run_dir=tmp_path, **{**QUICK, "device": "cpu"})
    assert {"model.safetensors", "delta.salun.safetensors", "mask.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    assert any("EMA" in note for note in run.record.notes)
    delta = salun.Delta.load(tmp_path / "delta.salun.safetensors")
    base, erased = open_unet(file(family, ema=True)), open_unet(tmp_path / "model.safetensors")
    for name, tensor in delta.apply(base).items():
        assert torch.equal(bits(tensor), bits(erased[name]))
    for name, tensor in delta.undo(erased).items():
        assert torch.equal(bits(tensor), bits(base[name]))
    deltas.apply(str(base.path), f"{tmp_path}/delta.salun.safetensors", f"{tmp_path}/again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == erased.path.read_bytes()  # metadata and all


def test_ema_copies_are_kept_when_asked_to(file: Callable[..., Path], tmp_path: Path) -> None:
    source, target = file("sd1", ema=True), tmp_path / "x.safetensors"
    salun.erase(str(source), "golf ball", outputs=[str(target)], run_dir=tmp_path / "run", keep_ema=True, **QUICK)
    assert safetensors_io.read_header(target).names == safetensors_io.read_header(source).names


@pytest.mark.parametrize(("family", "dtype"), [("sd1", "fp32"), ("sd1", "bf16"), ("sd2", "mixed"), ("sdxl", "fp16")])
def test_a_file_and_the_folder_made_of_it_are_one_model(
    family: str, dtype: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    """single file → folder → single file: the same predictions, and the tensors' own bits."""
    source = file(family, dtype=dtype)
    model = salun.load(str(source), device="cpu")
    expected = predictions(model)
    run = salun.erase(model, "golf ball", **{**QUICK, "lr": 1e-30})  # too small for any rounding to keep
    assert not run.delta.changed
    run.save(f"{tmp_path / 'folder'}/")
    again = salun.load(str(tmp_path / "folder"), device="cpu")
    assert again.settings.sampling.resolution == model.settings.sampling.resolution
    torch.testing.assert_close(predictions(again), expected, rtol=0, atol=0)
    assert again.base_hash == model.base_hash
    salun.erase(again, "golf ball", **{**QUICK, "lr": 1e-30}).save(tmp_path / "back.safetensors")
    torch.testing.assert_close(
        predictions(salun.load(str(tmp_path / "back.safetensors"), device="cpu")), expected, rtol=0, atol=0
    )
    old, new = load_file(source), load_file(tmp_path / "back.safetensors")
    parts = (keymap.UNET, keymap.VAE, *(encoder.layouts[0].prefix for encoder in FAMILIES[family].text))
    shared = [n for n in old if n in new and n.startswith(parts)]
    assert len(shared) > 0.9 * len(new)
    unused = ".resblocks.23." if family == "sd2" else "-"  # its last layer, which a folder does not hold
    for name in shared:
        assert unused in name or torch.equal(bits(old[name]), bits(new[name])), name
    assert not [n for n in old if n.startswith(parts) and n not in new and "logit_scale" not in n
                and "position_ids" not in n and not (family == "sd2" and "text_projection" in n)]  # fmt: skip


def test_a_folder_becomes_a_file_for_hosts(tmp_path: Path) -> None:
    """What only its folder knows (heads, norm groups, its own words) comes back by --components."""
    for pipeline, prediction in (("StableDiffusionPipeline", "v_prediction"), ("StableDiffusionXLPipeline", "epsilon")):
        folder = make_folder(tmp_path / pipeline, pipeline, prediction, torch.float16)
        model = salun.load(str(folder), device="cpu")
        target = tmp_path / f"{pipeline}.safetensors"
        run = salun.erase(model, "golf ball", **QUICK)
        run.save(target)
        run.apply()
        again = salun.load(str(target), device="cpu", components=str(folder))
        assert again.schedule.prediction_type == prediction
        torch.testing.assert_close(predictions(again), predictions(model), rtol=0, atol=0)


def test_the_embedded_model_as_a_single_file_is_erased_and_judged_like_its_folder(
    shapes: Model, tmp_path: Path
) -> None:
    options = {**QUICK, "eval_images": 4, "resolution": None, "seed": 5, "forget_latents": 8, "retain_latents": 8}
    first = salun.erase(shapes, "circle", **options)
    nothing = salun.erase(shapes, "circle", **{**options, "lr": 1e-30, "eval_images": 0})
    nothing.save(tmp_path / "shapes.safetensors")
    again = salun.load(str(tmp_path / "shapes.safetensors"), device="cpu", components="shapes")
    assert again.base_hash == shapes.base_hash
    second = salun.erase(again, "circle", **options)
    assert second.metrics["ua"] == first.metrics["ua"]
    assert second.delta.result_hash == first.delta.result_hash
    pictures = sample_images(again, ["one red circle, plain style"], [7])
    assert (pictures == sample_images(shapes, ["one red circle, plain style"], [7])).all()


def test_loading_needs_no_network(file: Callable[..., Path]) -> None:
    """Every socket is refused, and so is the hub's cache: configs and vocabulary come with the package."""
    code = """
import socket, sys
def refuse(*a, **k): raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import salun
for path in sys.argv[1:]:
    print(salun.load(path, device="cpu").encode(["a cat"]).hidden.shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(file(family)) for family in FAMILIES)], capture_output=True, text=True,
        check=False, env={**os.environ, "HF_HOME": "/nonexistent", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.split() == ["77"] * len(FAMILIES), done.stderr


def test_clips_words_are_numbered_as_the_published_encoders_know_them() -> None:
    """Ids as OpenAI's tokenizer gives them for this sentence; the vocabulary has 49,408 words."""
    tokenizer = clip_tokenizer("!")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello, World!").input_ids == [49406, 3306, 267, 1002, 256, 49407]  # “!” is no padding here
    assert tokenizer.pad_token_id == 0
    assert clip_tokenizer("<|endoftext|>").pad_token_id == 49407


def test_an_erasure_that_the_files_format_cannot_hold_is_reported_loudly(
    file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1e-7 on weights of about 0.1 in fp16, whose last place is 6e-5."""
    options = {**QUICK, "lr": 1e-7}
    run = salun.erase(str(file("sd1", dtype="fp16")), "golf ball", run_dir=tmp_path / "api", **options)
    rounding = run.record.rounding
    assert rounding["lost_to_rounding"] > 0.9 * rounding["changed"] > 0
    assert "larger lr" in rounding["warning"]
    assert "larger lr" in (tmp_path / "api" / "report.html").read_text(encoding="utf-8")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    target = tmp_path / "elsewhere" / "x.safetensors"
    where = ["--model", str(file("sd1", dtype="fp16")), "--run-dir", str(tmp_path / "cli"), "--device", "cpu"]
    where += ["--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["salun", "erase", "--concept", "golf ball", *where, *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code in (0, None), printed.err
    assert printed.out.startswith("warning: ")
    places = dict(line.split(":", 1) for line in printed.out.splitlines() if ":" in line)
    assert places["Model"].strip() == str(target), printed.out  # where it is, as asked for


def test_inspect_says_whether_a_model_can_be_erased_from(file: Callable[..., Path], tmp_path: Path) -> None:
    def verdict(path: Path, **options: Any) -> str:
        return str(inspect(str(path), ModelOptions(**options))["verdict"])

    assert verdict(file("sdxl")) == "salun can erase from it"
    assert verdict(file("sd1", text=False)).endswith("with components that give what is missing")
    whole = salun.load(str(file("sd1")), device="cpu")
    salun.erase(whole, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{tmp_path}/parts/")
    assert verdict(tmp_path / "parts") == "salun can erase from it"
    assert verdict(file("sd1", text=False), components=str(tmp_path / "parts")) == "salun can erase from it"
    weights = tmp_path / "parts" / "text_encoder" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert "truncated" in verdict(tmp_path / "parts")
    assert "truncated" in verdict(file("sd1", text=False), components=str(tmp_path / "parts"))
    assert verdict(file("sd1"), components=str(tmp_path / "parts")) == "salun can erase from it"  # that is not needed
    unet = tmp_path / "parts" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    save_file({n: t for n, t in tensors.items() if n != "conv_norm_out.bias"}, unet)
    assert "lacks conv_norm_out.bias" in verdict(tmp_path / "parts")
    tensors["conv_norm_out.bias"][0] = float("inf")
    save_file(tensors, unet)
    assert "NaN or infinity" in verdict(tmp_path / "parts")


@pytest.mark.parametrize(
    ("steps", "message"),
    [([0.0, 0.0], "changed no weight"), ([1e-7, 1e-7], "so nothing is erased"), ([1e-7, 1e-2], None)],
)
def test_how_much_of_an_erasure_the_rounding_leaves_is_judged(steps: list[float], message: str | None) -> None:
    original = {"w": torch.full((2,), 0.1, dtype=torch.float16)}
    mask = Mask.from_dense({"w": torch.ones(2, dtype=torch.bool)})
    _, found = erased_tensors(original, mask, {"w": original["w"].float() + torch.tensor(steps)})
    assert message in found["warning"] if message else found["warning"] is None


@pytest.mark.parametrize("missing", ["vae", "text"])
def test_what_a_file_lacks_comes_from_components_or_is_asked_for(
    missing: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    whole = salun.load(str(file("sd1")), device="cpu")
    salun.erase(whole, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{tmp_path}/parts/")
    part = file("sd1", **{missing: False})
    with pytest.raises(ModelError, match="components"):
        salun.load(str(part), device="cpu")
    lent = salun.load(str(part), device="cpu", components=str(tmp_path / "parts"))
    torch.testing.assert_close(predictions(lent), predictions(whole), rtol=0, atol=0)
    salun.erase(lent, "golf ball", **QUICK).save(f"{tmp_path}/out/")
    salun.load(str(tmp_path / "out"), device="cpu")


def test_untrusted_components_carry_no_file_of_the_users_along(file: Callable[..., Path], tmp_path: Path) -> None:
    whole = salun.load(str(file("sd1")), device="cpu")
    parts = tmp_path / "parts"
    salun.erase(whole, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{parts}/")
    (tmp_path / "secret").write_text("the user's", encoding="utf-8")
    for place in ("vae/LICENSE.key", "tokenizer/id_rsa"):
        (parts / place).symlink_to(tmp_path / "secret")
    lent = salun.load(str(file("sd1", vae=False)), device="cpu", components=str(parts))
    run = salun.erase(lent, "golf ball", outputs=[f"{tmp_path}/out/"], run_dir=tmp_path / "run", **QUICK)
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "config.json" in names and not names & {"LICENSE.key", "id_rsa"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert any("links out of" in note and "id_rsa" in note for note in run.record.notes)
    (parts / "vae" / "config.json").rename(tmp_path / "private")
    (parts / "vae" / "config.json").symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match="is a link out of"):
        salun.load(str(file("sd1", vae=False)), device="cpu", components=str(parts))


def test_components_need_no_unet_of_their_own(file: Callable[..., Path], tmp_path: Path) -> None:
    whole = salun.load(str(file("sd1")), device="cpu")
    salun.erase(whole, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{tmp_path}/parts/")
    (tmp_path / "parts" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    lent = salun.load(str(file("sd1", text=False)), device="cpu", components=str(tmp_path / "parts"))
    torch.testing.assert_close(predictions(lent), predictions(whole), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_made_of_a_file_has_the_names_that_every_version_of_transformers_reads(
    family: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    """As on the hub: `text_model.…`, and a tokenizer of vocab.json and merges.txt."""
    model = salun.load(str(file(family)), device="cpu")
    salun.erase(model, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{tmp_path}/folder/")
    for number in range(len(model.text_encoders)):
        part = f"text_encoder{'_2' if number else ''}"
        names = safetensors_io.read_header(tmp_path / "folder" / part / "model.safetensors").names
        assert {name.split(".")[0] for name in names} == {"text_model", *(["text_projection"] if number else [])}
        words = tmp_path / "folder" / part.replace("text_encoder", "tokenizer")
        assert {p.name for p in words.iterdir()} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert all(
        name.startswith("text_model.")
        for name in safetensors_io.read_header(ASSETS / "shapes" / "text_encoder" / "model.safetensors").names
    )


def test_parts_of_a_folder_may_be_variants_and_shards_each_in_its_own_way(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    shutil.copytree(ASSETS / "shapes", tmp_path / "mixed")
    for kind, part, variant, size in (
        (UNet2DConditionModel, "unet", "fp16", "3MB"),
        (CLIPTextModel, "text_encoder", "bf16", "400KB"),
    ):
        module = kind.from_pretrained(ASSETS / "shapes" / part)
        shutil.rmtree(tmp_path / "mixed" / part)
        module.save_pretrained(tmp_path / "mixed" / part, variant=variant, max_shard_size=size)
        assert len(list((tmp_path / "mixed" / part).glob(f"*.{variant}-*-of-*.safetensors"))) > 1
    mixed, plain = (salun.load(str(p), device="cpu") for p in (tmp_path / "mixed", ASSETS / "shapes"))
    torch.testing.assert_close(predictions(mixed), predictions(plain), rtol=0, atol=0)
    run = salun.erase(mixed, "circle", outputs=[f"{tmp_path}/erased/"], run_dir=tmp_path / "run", **QUICK)
    run.apply()
    again = salun.load(str(tmp_path / "erased"), device="cpu")
    torch.testing.assert_close(predictions(again), predictions(mixed), rtol=0, atol=0)
    assert {p.name for p in (tmp_path / "erased" / "unet").iterdir()} == {
        p.name for p in (tmp_path / "mixed" / "unet").iterdir()
    }


def in_the_hubs_cache(cache: Path, repo: str, *left_out: str) -> None:
    """`shapes` as the hub's client keeps a model that it has fetched, or fetched in part."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(ASSETS / "shapes", folder / "snapshots" / ("0" * 40))
    for name in left_out:
        (folder / "snapshots" / ("0" * 40) / name).unlink()


def test_a_model_in_the_hubs_cache_is_taken_from_there_only_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Callable[..., Path]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    in_the_hubs_cache(tmp_path, "someone/whole")
    in_the_hubs_cache(tmp_path, "someone/part", "unet/diffusion_pytorch_model.safetensors")
    assert salun.load("someone/whole", device="cpu").family.name == "sd1"
    with pytest.raises(ModelError, match="could not be downloaded"):
        salun.load("someone/part", device="cpu")
    target = tmp_path / "shapes.safetensors"
    salun.erase("shapes", "circle", **{**QUICK, "lr": 1e-30}).save(target)
    assert salun.load(str(target), device="cpu", components="someone/part").family.name == "sd1"


def test_missing_tokenizer_is_reported_before_loading(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of a folder that is not there."""
    shutil.copytree(ASSETS / "shapes", tmp_path / "mute")
    for path in (tmp_path / "mute" / "tokenizer").iterdir():
        if path.name == "vocab.json":
            path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        salun.load(str(tmp_path / "mute"), device="cpu")
    assert "has no tokenizer" in inspect(str(tmp_path / "mute"))["verdict"]
    shutil.rmtree(tmp_path / "mute" / "tokenizer")
    with pytest.raises(ModelError, match="has no tokenizer"):
        salun.load(str(tmp_path / "mute"), device="cpu")


def test_half_a_vae_or_a_text_encoder_without_words_counts_as_none(file: Callable[..., Path], tmp_path: Path) -> None:
    whole = salun.load(str(file("sd1")), device="cpu")
    salun.erase(whole, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{tmp_path}/parts/")
    tensors = {
        name: tensor
        for name, tensor in load_file(file("sd1")).items()
        if "first_stage_model.encoder" not in name and (FAMILIES["sd1"].text[0].layouts[0].prefix not in name)
    }
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match="components"):
        salun.load(str(tmp_path / "half.safetensors"), device="cpu")
    lent = salun.load(str(tmp_path / "half.safetensors"), device="cpu", components=str(tmp_path / "parts"))
    torch.testing.assert_close(predictions(lent), predictions(whole), rtol=0, atol=0)


def test_a_low_rank_output_says_what_it_holds_and_no_file_says_where_the_model_lay(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    outputs = [f"{tmp_path}/x.lora.safetensors", f"{tmp_path}/x.safetensors", f"{tmp_path}/x.salun.safetensors"]
    run = salun.erase(str(file("sd1")), "golf ball", outputs=outputs, run_dir=tmp_path / "run", **QUICK)
    assert any("x.lora.safetensors holds" in note and "energy" in note for note in run.record.notes)
    for output in outputs:
        metadata = safetensors_io.read_header(Path(output)).metadata
        assert metadata["salun.model"] == file("sd1").name
        assert str(file("sd1").parent) not in str(metadata)
    assert str(file("sd1").parent) not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_unwritable_output_is_reported_before_loading(file: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[str] = []
    (tmp_path / "file").write_text("no folder")
    for place in (f"{tmp_path}/file/x.safetensors", "/proc/x.safetensors"):
        with pytest.raises(ConfigError, match=r"not a folder|cannot be written|free"):
            salun.erase(
                str(file("sd1")), "golf ball", outputs=[place], progress=lambda e: seen.append(e.stage), **QUICK
            )
    assert not {"sampling", "training"} & set(seen)


def test_components_of_another_family_are_rejected(file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"family sd1, but .* of sd2"):
        salun.load(str(file("sd2")), device="cpu", components="shapes")
    with pytest.raises(ConfigError, match="single files"):
        salun.load("shapes", device="cpu", components="shapes")


def test_prediction_type_comes_from_the_first_source_that_has_it(file: Callable[..., Path], tmp_path: Path) -> None:
    def of(path: Path, **options: Any) -> str:
        return salun.load(str(path), device="cpu", **options).schedule.prediction_type

    assert of(file("sd2", prediction="v_prediction")) == "v_prediction"  # by the spread of a bias
    assert of(file("sd2", prediction="v_prediction"), prediction_type="epsilon") == "epsilon"
    named = file("sd2", prediction="v_prediction", metadata={"modelspec.prediction_type": "epsilon"})
    assert of(named) == "epsilon"
    lender = tmp_path / "lender"  # v-prediction, which says nothing of a file that speaks for itself
    plain = salun.load(str(file("sd2", prediction="v_prediction")), device="cpu")
    salun.erase(plain, "golf ball", **{**QUICK, "lr": 1e-30}).save(f"{lender}/")
    assert of(named, components=str(lender)) == "epsilon"
    assert of(file("sd2"), components=str(lender)) == "v_prediction"  # this one says nothing: the lender before a guess
    assert of(file("sd2"), components=str(lender), prediction_type="epsilon") == "epsilon"
    marked = file("sdxl", prediction="v_prediction", marks=("ztsnr",))
    model = salun.load(str(marked), device="cpu")
    assert model.schedule.prediction_type == "v_prediction"
    assert model.schedule.alphas_cumprod[-1] == 0
    assert salun.load("shapes", device="cpu", prediction_type="v_prediction").schedule.prediction_type == "v_prediction"


def test_old_files_with_shorter_names_of_the_text_encoder_are_read(file: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(file("sd1"))
    prefix = FAMILIES["sd1"].text[0].layouts[0].prefix
    renamed = {n.replace(f"{prefix}text_model.", prefix): t for n, t in tensors.items()}
    safetensors_io.write(tmp_path / "old.safetensors", renamed)
    old = salun.load(str(tmp_path / "old.safetensors"), device="cpu")
    torch.testing.assert_close(predictions(old), predictions(salun.load(str(file("sd1")), device="cpu")))


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_by_its_name_where_hosts_keep_theirs(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salun.checkpoints.locate import find

    comfy, webui, extra = tmp_path / "ComfyUI", tmp_path / "webui", tmp_path / "elsewhere" / "sd"
    for place, name in (
        (comfy / "models" / "checkpoints" / "anime", "One.safetensors"),
        (webui / "models" / "Stable-diffusion", "Two.safetensors"),
        (extra, "Three.safetensors"),
    ):
        place.mkdir(parents=True)
        (place / name).write_bytes(file("sd1").read_bytes())
    (comfy / "extra_model_paths.yaml").write_text(
        f"a111:\n  base_path: {tmp_path / 'elsewhere'}\n  checkpoints: |\n    sd\n    nowhere\n  vae: models/VAE\n",
        encoding="utf-8",
    )
    dirs = [str(comfy), str(webui)]
    assert find("one", dirs)[0].name == "One.safetensors"
    assert find("anime/One.safetensors", dirs)[0].name == "One.safetensors"
    assert find("Two.safetensors", dirs)[0].name == "Two.safetensors"
    assert find("three", dirs)[0].name == "Three.safetensors"
    monkeypatch.setenv("SALUN_MODELS_DIR", str(webui))
    assert find("two")[0].name == "Two.safetensors"
    (webui / "models" / "Stable-diffusion" / "one.safetensors").write_bytes(file("sd1").read_bytes())
    with pytest.raises(ModelError, match=r"2 checkpoints.*anime.One\.safetensors.*one\.safetensors"):
        find("one", dirs)
    with pytest.raises(ModelError, match=r"four\.safetensors does not exist"):
        find("four.safetensors", dirs)
    with pytest.raises(ConfigError, match="not a folder"):
        find("one", [str(tmp_path / "nothing")])
    for strange in ("~nobody-of-this-name/x.safetensors", "x" * 5000, "nul\0", ""):
        with pytest.raises(ModelError):
            find(strange)
    (webui / "models" / "Stable-diffusion" / "linked").symlink_to(comfy / "models" / "checkpoints" / "anime")
    assert find("anime/One", [str(comfy)])[0].name == "One.safetensors"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked").symlink_to(extra)  # as people share folders between their UIs
    assert find("three", [str(tmp_path / "other")])[0].name == "Three.safetensors"
    with pytest.raises(ModelError, match=f"looked in {tmp_path / 'other'}"):
        find("four", [str(tmp_path / "other")])
    monkeypatch.setenv("HOME", str(tmp_path))
    (comfy / "extra_model_paths.yaml").write_text("a:\n  base_path: ~/elsewhere\n  checkpoints: sd\n", encoding="utf-8")
    assert find("three", dirs)[0].name == "Three.safetensors"
    model = salun.load("three", device="cpu", models_dir=dirs)
    assert model.family.name == "sd1"


# -- pickles ----------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_read_only_when_allowed_and_never_run(file: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(file("sd1"))
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "old.ckpt")
    with pytest.raises(ModelError, match="allow_pickle"):
        salun.load(str(tmp_path / "old.ckpt"), device="cpu")
    model = salun.load(str(tmp_path / "old.ckpt"), device="cpu", allow_pickle=True)
    torch.testing.assert_close(
        predictions(model), predictions(salun.load(str(file("sd1")), device="cpu")), rtol=0, atol=0
    )
    torch.save({"state_dict": tensors, "trap": Trap(tmp_path / "sprung")}, tmp_path / "bad.ckpt")
    with pytest.raises(ModelError, match=r"bad\.ckpt cannot be read.*holds a \S+, not a tensor"):
        salun.load(str(tmp_path / "bad.ckpt"), device="cpu", allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


def test_a_converted_pickle_goes_by_its_own_name_and_goes_when_the_cache_is_emptied(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path / "cache"))
    torch.save({"state_dict": load_file(file("sd1"))}, tmp_path / "old.ckpt")
    made = as_safetensors(tmp_path / "old.ckpt", allowed=True)
    assert made.name == "old.safetensors"  # so that a message about it can be understood
    cache = Cache.of_user()
    assert cache.converted_files() == [(made, made.stat().st_size)]
    cache.put("ab" * 32, {"x": torch.ones(3)})
    assert made.is_file()  # whoever reads it is not to lose it to another's samples
    assert cache.clear() == 2
    assert not made.exists()


def test_a_trainers_own_state_in_a_pickle_does_no_harm(file: Callable[..., Path], tmp_path: Path) -> None:
    """The published v1 checkpoints keep their trainer's state under a class of pytorch_lightning as the key."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patched.setitem(sys.modules, name, module)
        state = {"callbacks": {module.ModelCheckpoint: {"best_model_score": torch.zeros(1)}}}  # type: ignore[attr-defined]
        torch.save({"state_dict": load_file(file("sd1")), **state}, tmp_path / "v1.ckpt")
    assert salun.load(str(tmp_path / "v1.ckpt"), device="cpu", allow_pickle=True).family.name == "sd1"


def test_the_vocabulary_carries_its_notice() -> None:
    assert "OpenAI" in (ASSETS / "clip" / "LICENSE").read_text(encoding="utf-8")
