"""Class-conditional models: labels in place of prompts, in pixel space and with a VAE, and their training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import salun
from cli.main import app
from salun.classification.experiment import train
from salun.diffusion.attack import attack, with_defaults
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.data.images import encode_folder
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluate import evaluate
from salun.diffusion.model.class_conditional import ClassModel
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.train import Average, network_of, scheduler_config, train_class_model, training_images
from salun.diffusion.train_options import ClassTrainOptions, presets
from salun.errors import Cancelled, ConfigError, DataError, ModelError, SalunError
from salun.progress import Stage
from salun.runs.cache import Cache

from .conftest import short_of

UNET: dict[str, Any] = {
    "sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "num_class_embeds": 11,
}  # fmt: skip
FEW: dict[str, Any] = {
    "steps": 2, "forget_latents": 4, "retain_latents": 8, "eval_images": 2, "sampling_steps": 2, "batch_size": 2,
}  # fmt: skip
TINY: dict[str, Any] = {
    "steps": 3, "batch_size": 8, "width": 8, "widths": "1,2", "attention": "1", "samples_every": 0, "seed": 4,
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    """A UNet2DModel of ten classes with random weights, as a diffusers folder."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(**{**UNET, **changes}).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of DiT-XL-2-256, smaller."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dit")
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip
    DiTPipeline(network, vae, DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["id2label"] = {str(i): f"kind {i}, kind number {i}" for i in range(10)}  # as the published folder has
    index["id2label"]["9"] = "kind 8, another kind 8"  # so do ImageNet's two cranes
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    config = folder / "transformer" / "config.json"
    old = json.loads(config.read_text(encoding="utf-8")) | {"_class_name": "Transformer2DModel"}
    config.write_text(json.dumps(old), encoding="utf-8")
    return folder


def diffusers_network(folder: Path) -> Any:
    from diffusers import DiTTransformer2DModel, UNet2DModel

    part = "unet" if (folder / "unet").is_dir() else "transformer"
    return {"unet": UNet2DModel, "transformer": DiTTransformer2DModel}[part].from_pretrained(folder / part)


# -- labels as prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "dit"])
def test_a_label_gives_what_diffusers_gives_for_it_and_the_empty_prompt_is_the_null_label(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A network that learned the variance too gives twice as many channels, of which the first half counts."""
    folder: Path = request.getfixturevalue(kind)
    model = salun.load(str(folder), device="cpu")
    assert isinstance(model, ClassModel)
    x_t, t = (
        torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([5, 500, 900]),
    )
    with torch.no_grad():
        mine = model.predict(x_t, t, model.encode([model.labels[3], model.labels[7], ""]))
        theirs = diffusers_network(folder)(x_t, t, class_labels=torch.tensor([3, 7, 10])).sample
    assert torch.equal(mine, theirs[:, : model.latent_channels])


def test_a_vector_in_place_of_a_label_has_a_gradient_and_the_tables_row_gives_the_label(dit: Path) -> None:
    model = salun.load(str(dit), device="cpu")
    assert isinstance(model, ClassModel) and len(model.tables) == 2
    rows = [table[[3]].clone().requires_grad_(True) for table in model.token_embeddings]
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([100, 800])
    label = model.predict(x_t, t, model.encode([model.labels[3]] * 2))
    vector = model.predict(x_t, t, model.encode_tokens([[-1], [3]], rows))
    assert torch.allclose(vector, label, atol=1e-6)
    with model.configured(EraseOptions(gradient_checkpointing=True)):
        again = model.predict(x_t, t, model.encode_tokens([[-1], [-1]], rows))
        model.predict(x_t, t, model.encode(["", ""]))  # between the pass and its recomputation
        gradients = torch.autograd.grad(again.square().sum(), rows)
    assert torch.allclose(again, label, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    with pytest.raises(ConfigError, match="takes one label"):
        model.encode_tokens([[1, 2]])


def test_gray_pixels_are_shown_as_three_equal_channels_and_read_back(pixels: Path) -> None:
    model = salun.load(str(pixels), device="cpu")
    x_0 = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    images = model.decode(x_0)
    assert images.shape == (1, 16, 16, 3) and (images[..., 0] == images[..., 2]).all()
    assert torch.allclose(model.encode_images(images).cpu(), x_0, atol=1 / 127)


@pytest.mark.parametrize("name", ["2", "class:2", "class: 2"])
def test_a_class_is_named_by_its_label_or_number_and_its_anchor_is_the_next_one(pixels: Path, name: str) -> None:
    model = salun.load(str(pixels), device="cpu")
    plan = make_plan(model.settings, model.name, name, EraseOptions(anchor=["class:9"] if ":" in name else []))
    assert [(c.name, c.anchor) for c in plan.concepts] == [("2", "9" if ":" in name else "3")]
    assert {p.text for p in plan.prompts.concepts[0].forget} == {"2"}
    assert {p.text for p in plan.prompts.retain} == set("013456789")
    assert plan.options.scope == "full"


def test_labels_have_the_names_of_a_file_or_of_dits_index(pixels: Path, dit: Path, tmp_path: Path) -> None:
    names = [*(f"kind {i}" for i in range(8)), "kind 8 (8)", "kind 8 (9)"]
    assert salun.load(str(dit), device="cpu").labels == names  # type: ignore[attr-defined]
    folder = Path(shutil.copytree(pixels, tmp_path / "named"))
    (folder / "labels.txt").write_text("".join(f"animal {i}\n" for i in range(10)), encoding="utf-8")
    index = folder / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("DDPM", "DDIM"), encoding="utf-8")
    model = salun.load(str(folder), device="cpu")
    plan = make_plan(model.settings, model.name, "class:3", EraseOptions())
    assert plan.concepts[0].name == "animal 3"


# -- erasing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "dit"])
def test_an_erased_folder_is_the_model_that_diffusers_loads_and_its_delta_gives_it_too(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    run = salun.erase(str(folder), "class:3", run_dir=tmp_path / "run", progress=salun.silent, **FEW)
    assert run.mask.selected > 0 and run.record.metrics["retain_change"]["value"] > 0
    erased = tmp_path / "run" / "model"
    before, after = diffusers_network(folder).state_dict(), diffusers_network(erased).state_dict()
    for name, tensor in before.items():
        changed = (tensor != after[name]).view(-1)
        assert not (changed & ~run.mask.dense(name).view(-1)).any(), f"{name} changed outside the mask"
    model = salun.load(str(folder), device="cpu")
    delta = salun.Delta.load(tmp_path / "run" / "delta.salun.safetensors")
    made = delta.apply(model.original())
    assert all(torch.equal(made[name], after[name]) for name in made)
    undone = delta.undo({**model.original(), **made})
    assert all(torch.equal(undone[name], before[name]) for name in undone)
    if kind == "dit":
        from diffusers import DiTPipeline

        def drawn(pipeline: Any) -> np.ndarray:
            pipeline.set_progress_bar_config(disable=True)
            noise = torch.Generator().manual_seed(0)
            images: np.ndarray = pipeline([3], 1.0, noise, num_inference_steps=2, output_type="np").images
            return images

        original = DiTPipeline.from_pretrained(folder)
        images = drawn(original)
        original.transformer.load_state_dict(made, strict=False)
        assert not np.array_equal(images, drawn(original))
        assert np.allclose(drawn(DiTPipeline.from_pretrained(erased)), drawn(original), rtol=0, atol=1e-5)


def test_two_classes_are_forgotten_in_a_run_that_was_stopped(pixels: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if event.stage == Stage.TRAINING and event.step == 1:
            raise Cancelled("stopped")

    few = {**FEW, "save_every": 0.0}
    with pytest.raises(Cancelled):
        salun.erase(str(pixels), ["3", "5"], run_dir=tmp_path / "run", progress=stop, **few)
    run = salun.erase(str(pixels), ["3", "5"], run_dir=tmp_path / "run", resume=True, progress=salun.silent, **few)
    whole = salun.erase(str(pixels), ["3", "5"], progress=salun.silent, **few)
    assert [concept.name for concept in run.plan.concepts] == ["3", "5"]
    assert set(run.record.metrics["per_concept"]) == {"3", "5"}
    assert all(torch.equal(tensor, whole.erased[name]) for name, tensor in run.erased.items())


def test_images_are_named_by_folders_of_labels_and_those_without_a_label_are_left_out(
    pixels: Path, tmp_path: Path
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("3", "4", "4", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        picture.save(tmp_path / "images" / name / f"{rng.integers(10**6)}.png")
    found = encode_folder(salun.load(str(pixels), device="cpu"), tmp_path / "images", cache=Cache(tmp_path / "cache"))
    assert found.captions == ["3", "4", "4", None]
    assert "4 made gray, as the model's images are" in "\n".join(found.notes)
    color = salun.load(str(written(tmp_path / "color", in_channels=3, out_channels=3)), device="cpu")
    again = encode_folder(color, tmp_path / "images", cache=Cache(tmp_path / "cache"))
    assert again.latents.shape[1] == 3 and "made gray" not in "\n".join(again.notes)
    messages: list[str] = []
    options = {**FEW, "retain_latents": 0, "anchor_share": 0.0, "retain_images": str(tmp_path / "images")}
    salun.erase(str(pixels), "3", progress=lambda event: messages.append(event.message), **options)
    assert "1 retain images skipped: their captions name what is to be erased" in messages
    assert any("1 retain images skipped: neither their folder's name" in message for message in messages)


def test_other_methods_attacks_and_evaluation_work_on_labels(pixels: Path, tmp_path: Path) -> None:
    """Of a network with random weights nothing is detected; of `digits` another test has attacks."""
    for method in ("esd", "erasediff", "leco"):
        few = short_of(method, **FEW)
        run = salun.erase(str(pixels), "3", run_dir=tmp_path / method, progress=salun.silent, method=method, **few)
        assert run.plan.options.scope == "full" and run.mask.selected > 0
    found = evaluate(str(tmp_path / "esd"), EvalOptions(n=2, sampling_steps=2)).as_json()
    assert found["sets"]["concept"]["n"] == 2
    with pytest.raises(DataError, match="'a cat' is not a label"):
        salun.load(str(pixels), device="cpu").encode(["a cat"])
    hardened = salun.erase(str(pixels), "3", progress=salun.silent, harden=2, **FEW)
    assert {"adversarial", "forget", "retain"} <= set(hardened.history[0])


# -- what is refused --------------------------------------------------------------------------------------------------


def _config(change: dict[str, Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")

    return apply


def _pipeline(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(path.read_text(encoding="utf-8").replace("DDPMPipeline", name), encoding="utf-8")

    return apply


def _labels(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "labels.txt").write_text(text, encoding="utf-8") and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (None, {"concept": "class:10"}, r"'class:10' is not in the vocabulary .*class: 0, 1"),
        (None, {"concept": "3", "anchor": ["cat"]}, "'cat' is not in the vocabulary"),
        (None, {"concept": "3", "method": "uce"}, "uce, which edits cross-attention"),
        (None, {"concept": "3", "method": "fmn"}, "fmn, which edits cross-attention"),
        (None, {"concept": "3", "scope": "xattn"}, "scope is 'xattn', which selects no parameter"),
        (None, {"concept": "3", "outputs": ["x.safetensors"]}, "class-conditional models are diffusers folders"),
        (None, {"concept": "3", "outputs": ["x.lora.safetensors"]}, "class-conditional models are diffusers folders"),
        (None, {"concept": "3", "negative_prompt": "blurry"}, "negative_prompt does not apply"),
        (_labels("a\nb\n"), {"concept": "3"}, "names 2 classes, but its network takes 10"),
        (_labels("a\n" * 10), {"concept": "3"}, "the class 'a', which is there twice"),
        (_labels("".join(f"{i}\n" for i in range(11))), {"concept": "3"}, "none is left for the null label"),
        (_config({"num_class_embeds": None}), {"concept": "3"}, "without class embeddings"),
        (_config({"num_class_embeds": "11"}), {"concept": "3"}, "has '11' class embeddings"),
        (
            _pipeline("ConsistencyModelPipeline"),
            {"concept": "3"},
            "is a ConsistencyModelPipeline; salun supports",
        ),
        (_config({"sample_size": None}), {"concept": "3"}, "has no sample_size"),
        (_config({"class_embed_type": "timestep"}), {"concept": "3"}, "class_embed_type 'timestep'"),
        (
            _config({"in_channels": 4, "out_channels": 4}),
            {"concept": "3"},
            "4 channels; salun supports pixels of 1 or 3",
        ),
        (_config({"out_channels": 5}), {"concept": "3"}, "1 input and 5 output channels"),
        (_config({"time_embedding_type": "fourier"}), {"concept": "3"}, "time_embedding_type 'fourier'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_reported_in_one_line(
    damage: Callable[[Path], None] | None, options: dict[str, Any], message: str, pixels: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pixels, tmp_path / "model"))
    if damage is not None:
        damage(folder)
    concept = options.pop("concept")
    outputs = [str(tmp_path / name) for name in options.pop("outputs", [])] or None
    with pytest.raises(SalunError, match=message):
        salun.erase(str(folder), concept, outputs=outputs, progress=salun.silent, **{**FEW, **options})


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    options = ClassTrainOptions(**TINY, save_every=0, dropout=0.1)
    whole = train_class_model(options, tmp_path / "whole", progress=salun.silent)
    assert [row["step"] for row in whole.history] == [1, 2, 3]

    def stop(event: salun.Event, /) -> None:
        if event.stage == "training" and event.step == 2:
            raise Cancelled("stopped")

    torch.rand(5)  # whatever was drawn before
    with pytest.raises(Cancelled):
        train_class_model(options, tmp_path / "parts", progress=stop)
    parts = train_class_model(options, tmp_path / "parts", resume=True, progress=salun.silent)
    assert parts.history == whole.history
    assert whole.folder is not None and parts.folder is not None
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (whole.folder / file).read_bytes() == (parts.folder / file).read_bytes()
    assert (tmp_path / "whole" / "samples.png").stat().st_size > 1000
    model = salun.load(str(whole.folder), device="cpu")
    assert model.settings.sampling.resolution == 16 and model.settings.recipe.steps == 120


def test_the_average_follows_the_weights_and_is_taken_once_a_step() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average, expected = Average(network, 0.9), network.weight.detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            network.weight.fill_(float(step))
        average.take(step)
        average.take(step)  # as when a step is taken again
        expected += (1 - min(0.9, (1 + step) / (10 + step))) * (step - expected)
    assert torch.allclose(average.weights["weight"], expected)


def test_a_class_that_is_left_out_is_in_no_batch_and_keeps_its_label() -> None:
    images, _ = training_images(ClassTrainOptions(without=["class:3"]).resolved()[0])
    every, _ = training_images(ClassTrainOptions().resolved()[0])
    assert set(images.labels.tolist()) == {*range(10)} - {3} and set(every.labels.tolist()) == {*range(10)}
    assert images.images.shape[1:] == (1, 16, 16) and images.classes == tuple("0123456789")
    assert len(every.labels) - len(images.labels) == int((every.labels == 3).sum())
    for without, message in ((["x"], "is 'x', but the classes are 0, 1"), ([*"012345678"], "fewer than two classes")):
        with pytest.raises(ConfigError, match=message):
            training_images(ClassTrainOptions(without=without).resolved()[0])


def test_the_authors_saliency_guidance_is_on_the_scale_of_their_loss() -> None:
    """(1 + w)·ε(c) − w·ε(∅) with w = 2 is ε(∅) + 3·(ε(c) − ε(∅)), which their sampler calls 3."""
    papers = [each["recipes_paper"]["object"] for each in presets()["models"].values()]
    digits = salun.load("digits", device="cpu").settings
    assert [paper["guidance"] for paper in papers] == [2, 2, 2] and digits.paper_recipes["object"].guidance == 2
    assert presets()["models"]["cifar10"]["sampling"]["guidance"] == 3


def test_the_cosine_schedule_is_that_of_its_paper() -> None:
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s)·π/2): half of the signal's power is left in the middle."""
    from salun.diffusion.model.schedule import schedule_of

    options = ClassTrainOptions().resolved()[0]
    bars = schedule_of(scheduler_config(options), "x").alphas_cumprod  # type: ignore[attr-defined]
    t = np.array([0, 250, 500, 750, 990])
    f = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert bars[torch.from_numpy(t)].numpy() == pytest.approx(f, abs=2e-3)
    network = network_of(options, 3, 10)
    assert network.config.num_class_embeds == 11 and network.config.in_channels == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "1,x"}, "widths is '1,x', but must be whole numbers"),
        ({"widths": "0,1"}, "widths is 0,1, but must be 1 to 8 numbers"),
        ({"width": 20}, "width is 20, but must be a multiple of 8"),
        ({"attention": "5"}, "attention is 5, but there are 3 levels"),
        ({"image_size": 18}, "image_size is 18, but 3 levels need a multiple of 4"),
    ],
    ids=str,
)
def test_numbers_of_a_network_that_cannot_be_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassTrainOptions(**options).resolved()


def test_colors_in_a_folder_are_trained_on_by_the_other_choices(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    others = {"prediction_type": "epsilon", "noise": "linear", "flip": True, "channels_last": True, "image_size": 16}
    options = ClassTrainOptions(**{**TINY, **others, "data": str(tmp_path / "data"), "grad_clip": 1.0})
    done = train_class_model(options, tmp_path / "run", progress=salun.silent)
    assert all(np.isfinite(row["denoise"]) for row in done.history)
    model = salun.load(str(tmp_path / "run" / "model"), device="cpu")
    assert (model.latent_shape, model.labels) == ((3, 16, 16), ["cat", "dog"])  # type: ignore[attr-defined]
    assert model.schedule.prediction_type == "epsilon"


def test_a_training_in_bf16_averages_and_writes_float32(tmp_path: Path) -> None:
    """And a classifier judges samples of the classes that were trained."""
    train(data="digits", train_epochs=4, run_dir=tmp_path / "classifier", progress=salun.silent)
    judge: dict[str, Any] = {"classifier": f"class:{tmp_path / 'classifier'}", "judged": 2, "without": ["class:3"]}
    options = ClassTrainOptions(**TINY, **judge, dtype="bf16")
    done = train_class_model(options, tmp_path / "run", progress=salun.silent)
    assert done.folder is not None
    metrics = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["accuracy"]["n"] == metrics["frechet"]["n"] == 9 * 2 and metrics["frechet"]["value"] > 0
    assert metrics["accuracy_on_data"]["value"] > 60 > metrics["accuracy"]["value"]
    with pytest.raises(DataError, match="cannot be used"):
        train_class_model(ClassTrainOptions(**TINY, classifier=str(tmp_path)), progress=salun.silent)
    weights = diffusers_network(done.folder).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values()), "rounded to bf16"


def test_classes_that_no_model_could_have_are_reported_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from salun.classification import data

    odd = data.EMBEDDED["digits"]()
    monkeypatch.setitem(data.EMBEDDED, "digits", lambda: replace(odd, classes=("crane",) * 10))
    with pytest.raises(ConfigError, match="the class 'crane', which is there twice"):
        train_class_model(ClassTrainOptions(**TINY), progress=salun.silent)
    alike = (*(f"kind {i}" for i in range(8)), "crane", "crane ")  # which a file of labels gives back as one
    monkeypatch.setitem(data.EMBEDDED, "digits", lambda: replace(odd, classes=alike))
    with pytest.raises(ConfigError, match="the class 'crane', which is there twice"):
        train_class_model(ClassTrainOptions(**TINY), progress=salun.silent)


@pytest.mark.slow
def test_the_embedded_digits_forget_one_and_attacks_and_evaluation_judge_it(tmp_path: Path) -> None:
    few = {"steps": 40, "batch_size": 8, "lr": 1e-3, "forget_latents": 32, "retain_latents": 64, "eval_images": 24}
    run = salun.erase("digits", "class:3", run_dir=tmp_path / "run", progress=salun.silent, **few)
    metrics = run.record.metrics
    assert metrics["ua"]["value"] > 80 and metrics["ra_after"]["value"] > 90
    assert metrics["ua_before"]["value"] < 5 and metrics["ra_before"]["value"] > 95
    names = ["quantize", "inversion+steps=4+start=anchor", "prompt-search+timesteps=1+iterations=1"]
    made = attack(str(tmp_path / "run"), AttackOptions(attack=names, n=4, images=4, control=True)).as_json()
    results = {(each["attack"], each["side"]): each for each in made["attacks"]}
    assert results[names[0], "original"]["asr"]["value"] > 90 and results[names[1], "erased"]["asr"] is not None
    assert "takes one label" in results[names[2], "erased"]["error"]
    usual = with_defaults(AttackOptions(), salun.load("digits", device="cpu")).attack
    assert "inversion" in usual and not {"ring-a-bell", "prompt-search", "embedding-search"} & set(usual)
    classifier = tmp_path / "classifier"
    train(data="digits", train_epochs=10, run_dir=classifier, progress=salun.silent)
    found = evaluate(str(tmp_path / "run"), EvalOptions(n=24, detector=["attribute", f"class:{classifier}"])).metrics
    first, second = found.values()
    assert (first["detector"]["name"], second["detector"]["name"]) == ("attribute", "class")
    for metric in ("ua", "ra_before", "ra_after"):
        assert first[metric]["value"] == pytest.approx(second[metric]["value"], abs=10), "two classifiers agree"


@pytest.mark.slow
def test_train_and_erase_from_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in {**TINY, "without": ["0"]}.items()))
    begun = ["train", "--run-dir", str(tmp_path / "t"), "--config", str(config)]
    planned = CliRunner().invoke(app, [*begun, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "10 classes, without 0; 1,2" in planned.output and "training: 3 steps of 8 images" in planned.output
    assert "time: about" in planned.output and not (tmp_path / "t").exists()
    shown = CliRunner().invoke(app, begun)
    assert shown.exit_code == 0, shown.output
    assert "--concept class:1" in shown.output, "the first class that it has"
    again = CliRunner().invoke(app, ["train", "--resume", "--run-dir", str(tmp_path / "t")])
    assert again.exit_code == 0 and "is finished" in again.output
    other = CliRunner().invoke(app, ["train", "--resume", "--run-dir", str(tmp_path / "t"), "--steps", "9"])
    assert other.exit_code != 0 and "steps 3, not 9" in str(other.exception)
    with pytest.raises(ModelError):
        salun.load(str(tmp_path / "t"))
    assert salun.load(str(tmp_path / "t" / "model")).family.name == "class"


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_batch(tmp_path: Path) -> None:
    numbers = {**TINY, "samples_every": 2, "save_every": 0}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "salun", "train"]
    command = [sys.executable, *launch, "--run-dir", str(tmp_path / "two"), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("Try it") == 1, "each process printed the result"
    one = train_class_model(ClassTrainOptions(**TINY), tmp_path / "one", progress=salun.silent)
    two = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))
    assert two["facts"]["processes"] == "2" and (tmp_path / "two" / "model").is_dir()
    for mine, theirs in zip(one.history, two["losses"], strict=True):
        assert theirs["denoise"] == pytest.approx(mine["denoise"], rel=1e-2)
