"""Classifiers: the published sizes, the same weights for the same seed, files that are checked."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from salun.checkpoints import safetensors_io
from salun.classification import models
from salun.classification.data import ImageData, load_data
from salun.classification.experiment import evaluate, unlearn
from salun.classification.models import (
    Preprocessing,
    Pretrained,
    WeightFileInfo,
    load_model,
    new_model,
    normalize_for,
    save_model,
    stock_model,
)  # fmt: skip
from salun.classification.originals import given_original
from salun.classification.splits import Split, make_split
from salun.errors import ConfigError, DataError, ModelError
from salun.runs.cache import Cache

TRAINING: dict[str, Any] = {
    "model": "small", "train_epochs": 1, "train_lr": 0.1, "train_batch_size": 8, "augment": "none", "momentum": 0.9,
    "weight_decay": 5e-4, "dtype": "fp32", "deterministic": True, "seed": 0,
}  # fmt: skip


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def split(digits: ImageData) -> Split:
    return make_split(digits, 0.2, 0.1, 0)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Vision Transformer of ten classes, as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "size"), [("resnet18", 11_173_962), ("resnet20", 269_722), ("vgg16-bn", 14_728_266)])
def test_the_models_have_the_sizes_known_for_cifar_10(name: str, size: int) -> None:
    model = new_model(name, 3, 10, seed=0)
    assert size_of(model) == size
    assert model.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (new_model("small", 1, 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def facts(split: Split, **changes: object) -> WeightFileInfo:
    known = {"architecture": "small", "channels": 1, "classes": tuple("0123456789"), "role": "original"}
    return WeightFileInfo(**{**known, "base": split.base, "training": TRAINING, **changes})  # type: ignore[arg-type]


def test_a_model_outlives_its_file_and_equal_models_are_equal_bytes(split: Split, tmp_path: Path) -> None:
    model = new_model("small", 1, 10, seed=3)
    for name in ("a", "b"):
        save_model(tmp_path / f"{name}.safetensors", model, facts(split))
    again, stored = load_model(tmp_path / "a.safetensors")
    assert stored == facts(split)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_files_that_hold_no_classifier_are_refused(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_io.write(path, {"w": torch.zeros(2)})
    with pytest.raises(ModelError, match="holds no classifier"):
        load_model(path)
    save_model(path, new_model("small", 1, 9, seed=0), facts(split))
    with pytest.raises(ModelError, match="damaged: its weights do not fit small"):
        load_model(path)
    safetensors_io.write(path, {"w": torch.zeros(2)}, {"format": "salun-classifier-1", "classes": "["})
    with pytest.raises(ModelError, match="damaged: an entry of its header"):
        load_model(path)


@pytest.mark.parametrize("name", ["timm:hf-hub:them/model", "timm:local-dir:/tmp", "them/model", "/tmp", "timm:../x"])
def test_a_file_can_name_no_model_that_would_be_fetched_or_opened(
    name: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> nn.Module:
        raise AssertionError(f"{name} was looked for")

    for way in ("_timm", "_transformers"):
        monkeypatch.setattr(models, way, never)
    monkeypatch.setattr(models.pretrained, "load", never)
    path = tmp_path / "x.safetensors"
    save_model(path, new_model("small", 1, 10, seed=0), facts(split, architecture=name))
    with pytest.raises(ModelError, match=r"names the model .* but a file may only name"):
        load_model(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "timm_wrapper", "architecture": "hf-hub:them/model"},
        {"model_type": "timm_wrapper", "architecture": "/tmp/model"},
        {"model_type": "vit", "backbone": "them/model"},
        {"model_type": "vit", "part": [{"use_pretrained_backbone": True}]},
        {"model_type": "vit", "auto_map": {"AutoModelForImageClassification": "them/model--code.Model"}},
    ],
)
def test_a_configuration_in_a_file_can_fetch_nothing(config: dict[str, Any], split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_model(path, new_model("small", 1, 10, seed=0), facts(split))
    stored = safetensors_io.read_header(path).metadata | {
        "config": json.dumps(config),
        "pixels": json.dumps(asdict(Preprocessing())),
    }
    safetensors_io.write(path, {"w": torch.zeros(2)}, stored)
    with pytest.raises(ModelError, match="which is not allowed in a file"):
        load_model(path)


def test_an_original_that_does_not_fit_the_data_is_refused(digits: ImageData, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    nine, letters = tuple("012345678"), tuple("abcdefghij")
    for changes, kind, message in (
        ({"classes": nine}, ModelError, "has 9 classes, but digits has 10"),
        ({"classes": letters}, ModelError, "has a class 'a' where digits has '0'"),
        ({"channels": 3}, ModelError, "takes images of 3 channels, but digits has 1"),
        ({"role": "unlearned"}, ModelError, "is an unlearned model, but must be an original"),
        ({"base": "other"}, DataError, "was trained on another split"),
        ({"training": {"lr": 1.0}}, ModelError, "training options include lr, which do not exist"),
        (
            {"training": {**TRAINING, "train_epochs": "many"}},
            ConfigError,
            "train_epochs is 'many', but must be an integer",
        ),
        ({"training": {**TRAINING, "train_epochs": -1}}, ConfigError, "train_epochs is -1, but must be at least 1"),
    ):
        info = facts(split, **changes)  # type: ignore[arg-type]
        save_model(path, new_model("small", info.channels, len(info.classes), seed=0), info)
        with pytest.raises(kind, match=message):
            given_original(str(path), digits, split)
    save_model(path, new_model("small", 1, 10, seed=0), facts(split))
    assert given_original(str(path), digits, split).facts == facts(split)


def test_a_transformers_classifier_takes_our_images(vit: Path, digits: ImageData, split: Split, tmp_path: Path) -> None:
    found = given_original(str(vit), digits, split)
    x = digits.images_of(torch.arange(3))  # grey, 8×8: made colour, 16×16
    with torch.no_grad():
        logits = found.model.eval()(x)
    assert logits.shape == (3, 10)
    assert ["is unknown" in found.notes[0], "does not name" in found.notes[1], len(found.notes)] == [True, True, 3]
    save_model(tmp_path / "x.safetensors", found.model, found.facts)
    again, _ = load_model(tmp_path / "x.safetensors")  # needs the folder no more
    with torch.no_grad():
        assert torch.equal(again.eval()(x), logits)


def processed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model with an image processor."""
    shutil.copytree(folder, to)
    (to / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def test_a_transformers_classifier_sees_images_as_its_processor_makes_them(
    vit: Path, digits: ImageData, split: Split, tmp_path: Path
) -> None:
    """Against pictures made by hand: colour, 32×32, the middle 16×16 of them, (x − mean) / std of each channel."""
    folder = processed(
        vit, tmp_path / "vit", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.125], resample=3,
        size={"height": 32, "width": 32}, do_center_crop=True, crop_size={"height": 16, "width": 16},
    )  # fmt: skip
    found = given_original(str(folder), digits, split)
    assert len(found.notes) == 2  # the processor's numbers are known
    rows = torch.arange(3)
    grey = (digits.images[rows] / 255).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.5, 0.25, 0.125]))
    large = nn.functional.interpolate((grey - mean) / std, (32, 32), mode="bicubic", antialias=True)
    assert isinstance(found.model, Pretrained)
    with torch.no_grad():
        wanted = found.model.model.eval()(pixel_values=large[:, :, 8:24, 8:24]).logits
        logits = found.model(normalize_for(found.model, digits).images_of(rows))
        save_model(tmp_path / "x.safetensors", found.model, found.facts)
        again, _ = load_model(tmp_path / "x.safetensors")
        kept = again.eval()(normalize_for(again, digits).images_of(rows))
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(kept, logits)


PROCESSORS = {
    "as ViT's": ({"image_mean": [0.5], "image_std": [0.5], "size": 224}, Preprocessing((0.5,), (0.5,), (224, 224))),
    "the shorter side": (
        {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
        Preprocessing(size=(256,), crop=(224, 224)),
    ),
    "ConvNeXt's small": (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
        Preprocessing(size=(256,), crop=(224, 224)),
    ),
    "ConvNeXt's large": ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, Preprocessing(size=(384, 384))),
    "no normalisation": ({"do_normalize": False, "image_mean": [0.5]}, Preprocessing((0.0,), (1.0,))),
    "of 255 levels": ({"do_rescale": False, "image_mean": [127.5], "image_std": [51]}, Preprocessing((0.5,), (0.2,))),
    "no size": ({"do_resize": False, "size": 224}, Preprocessing()),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_an_image_processor_says_is_understood(name: str) -> None:
    config, wanted = PROCESSORS[name]
    assert Preprocessing.of(config) == wanted


def test_a_model_of_other_classes_or_of_the_same_in_another_order_is_refused(
    vit: Path, digits: ImageData, split: Split, tmp_path: Path
) -> None:
    names = ["tench, Tinca tinca", *(f"kind {i}" for i in range(1, 10))]
    folder = tmp_path / "vit"
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fits = replace(digits, classes=("Tench", *(f"Kind_{i}" for i in range(1, 10))))
    assert len(given_original(str(folder), fits, split).notes) == 2  # nothing of names
    for classes, theirs in ((fits.classes[::-1], "tench, Tinca tinca"), (digits.classes, "tench, Tinca tinca")):
        with pytest.raises(ModelError, match=f"has a class '{theirs}' where digits has '{classes[0]}', but both"):
            given_original(str(folder), replace(digits, classes=classes), split)


def test_a_pretrained_body_gets_a_new_head(vit: Path) -> None:
    trained, classes = stock_model(str(vit))
    one, two = (new_model(str(vit), 3, n, seed=1) for n in (10, 7))
    body = "model.vit.embeddings.cls_token"
    assert len(classes) == 10
    assert torch.equal(one.state_dict()[body], trained.state_dict()[body])
    assert not torch.equal(one.state_dict()["model.classifier.weight"], trained.state_dict()["model.classifier.weight"])
    assert two.state_dict()["model.classifier.weight"].shape[0] == 7


def test_models_that_are_not_there_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="give small, resnet18, resnet20, vgg16-bn"):
        new_model("resnet19", 3, 10, seed=0)
    with pytest.raises(ModelError, match="cannot be loaded"):
        stock_model(str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r'pip install "timm>=0\.9\.12" \(the extra timm\)'):
        new_model("timm:resnet18", 3, 10, seed=0)


@pytest.mark.packages
def test_a_timm_model_is_one_like_the_others(tmp_path: Path) -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # a torchvision made for another torch raises the latter
        pytest.skip("timm is not installed")
    made = [new_model("timm:resnet10t", 1, 10, seed=s).state_dict() for s in (0, 0, 1)]
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])
    assert any(not torch.equal(made[0][k], made[2][k]) for k in made[0])
    with pytest.raises(ModelError, match="timm cannot build 'no-such-model'"):
        new_model("timm:no-such-model", 1, 10, seed=0)
    for i in range(40):
        path = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 5 * i, 200 - i)).save(path)
    options: dict[str, Any] = {"model": "timm:resnet10t", "train_epochs": 1, "epochs": 1, "device": "cpu"}
    options |= {"data": str(tmp_path / "data"), "forget": "random:0.2", "run_dir": tmp_path / "run"}
    done = unlearn(cache=Cache(tmp_path / "cache"), **options)
    assert 0 < done.record.more["moved"] <= 0.5
    assert evaluate(tmp_path / "run")["UA"] == done.metrics["UA"]
