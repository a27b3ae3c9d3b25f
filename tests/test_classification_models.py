"""Classifiers: the published sizes, the same weights for the same seed, files that are checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from salun.classification.data import ImageData, load_data
from salun.classification.models import Facts, load_model, new_model, save_model, stock_model
from salun.classification.originals import given_original
from salun.classification.splits import Split, make_split
from salun.errors import DataError, ModelError
from salun.formats import tensorfile

TRAINING = {"model": "small", "train_epochs": 1, "train_lr": 0.1, "train_batch_size": 8, "augment": "none"}


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


@pytest.mark.parametrize(("name", "size"), [("resnet18", 11_173_962), ("vgg16-bn", 14_728_266)])
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


def facts(split: Split, **changes: object) -> Facts:
    told = {"architecture": "small", "channels": 1, "classes": tuple("0123456789"), "role": "original"}
    return Facts(**{**told, "base": split.base, "training": TRAINING, **changes})  # type: ignore[arg-type]


def test_a_model_outlives_its_file_and_equal_models_are_equal_bytes(split: Split, tmp_path: Path) -> None:
    model = new_model("small", 1, 10, seed=3)
    for name in ("a", "b"):
        save_model(tmp_path / f"{name}.safetensors", model, facts(split))
    again, told = load_model(tmp_path / "a.safetensors")
    assert told == facts(split)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_files_that_hold_no_classifier_are_refused(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, {"w": torch.zeros(2)})
    with pytest.raises(ModelError, match="holds no classifier"):
        load_model(path)
    save_model(path, new_model("small", 1, 9, seed=0), facts(split))
    with pytest.raises(ModelError, match="damaged: its weights do not fit small"):
        load_model(path)
    tensorfile.write(path, {"w": torch.zeros(2)}, {"format": "salun-classifier-1", "classes": "["})
    with pytest.raises(ModelError, match="damaged: its header"):
        load_model(path)


def test_an_original_that_does_not_fit_the_data_is_refused(digits: ImageData, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    nine, letters = tuple("012345678"), tuple("abcdefghij")
    for changes, kind, message in (
        ({"classes": nine}, ModelError, "knows 9 classes, but digits has 10"),
        ({"classes": letters}, ModelError, "has a class 'a' where digits has '0'"),
        ({"channels": 3}, ModelError, "takes pictures of 3 channels, digits has 1"),
        ({"role": "unlearned"}, ModelError, "is no original but unlearned"),
        ({"base": "other"}, DataError, "was trained on another split"),
    ):
        told = facts(split, **changes)  # type: ignore[arg-type]
        save_model(path, new_model("small", told.channels, len(told.classes), seed=0), told)
        with pytest.raises(kind, match=message):
            given_original(str(path), digits, split)
    save_model(path, new_model("small", 1, 10, seed=0), facts(split))
    assert given_original(str(path), digits, split).facts == facts(split)


def test_a_transformers_classifier_takes_our_pictures(
    vit: Path, digits: ImageData, split: Split, tmp_path: Path
) -> None:
    found = given_original(str(vit), digits, split)
    x = digits.pictures(torch.arange(3))  # grey, 8×8: made colour, 16×16
    with torch.no_grad():
        logits = found.model.eval()(x)
    assert logits.shape == (3, 10)
    assert "is not known" in found.notes[0]
    save_model(tmp_path / "x.safetensors", found.model, found.facts)
    again, _ = load_model(tmp_path / "x.safetensors")  # needs the folder no more
    with torch.no_grad():
        assert torch.equal(again.eval()(x), logits)


def test_a_pretrained_body_gets_a_new_head(vit: Path) -> None:
    trained, classes = stock_model(str(vit))
    one, two = (new_model(str(vit), 3, n, seed=1) for n in (10, 7))
    body = "model.vit.embeddings.cls_token"
    assert len(classes) == 10
    assert torch.equal(one.state_dict()[body], trained.state_dict()[body])
    assert not torch.equal(one.state_dict()["model.classifier.weight"], trained.state_dict()["model.classifier.weight"])
    assert two.state_dict()["model.classifier.weight"].shape[0] == 7


def test_models_that_are_not_there_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="give small, resnet18, vgg16-bn"):
        new_model("resnet19", 3, 10, seed=0)
    with pytest.raises(ModelError, match="cannot be loaded"):
        stock_model(str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install salun\[timm\]"):
        new_model("timm:resnet18", 3, 10, seed=0)


def test_a_timm_model_is_one_like_the_others() -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # a torchvision made for another torch raises the latter
        pytest.skip("timm is not installed")
    made = [new_model("timm:resnet10t", 1, 10, seed=s).state_dict() for s in (0, 0, 1)]
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])
    assert any(not torch.equal(made[0][k], made[2][k]) for k in made[0])
    with pytest.raises(ModelError, match="timm cannot make 'no-such-model'"):
        new_model("timm:no-such-model", 1, 10, seed=0)
