"""The detector `imagenet` on timm's classifiers: random ones, in folders as on the hub, against the libraries' numbers.

They run where timm, and with it torchvision, is installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salun.errors import ConfigError, DataError
from salun.evaluation.detector import DetectorInputs, Samples, Subject, load_detector
from salun.evaluation.detectors.imagenet import CLASS
from salun.files import sha256_file

from .conftest import change_config

SEEN = Subject("tench", "english springer")
NAMES = ["n01440764", "n02102040", "n03000684"]
TEXTS = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n03000684": "chain saw, chainsaw"}


def noise(n: int, height: int = 300, width: int = 260) -> np.ndarray:
    """uint8 (n, height, width, 3), each of its own color."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 200, (n, 1, 1, 3)) + rng.integers(0, 56, (n, height, width, 3))).astype(np.uint8)


def samples(pixels: np.ndarray) -> Samples:
    return Samples(pixels, torch.zeros(len(pixels), 4, 2, 2), [""] * len(pixels))


def margins(logits: torch.Tensor) -> np.ndarray:
    """Each logit minus the largest of the others."""
    return np.array([[row[k] - np.delete(row, k).max() for k in range(len(row))] for row in logits.numpy()])


def write(folder: Path, network: torch.nn.Module, **config: Any) -> Path:
    """A folder as on the hub: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes that its config names, as timm saves it."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm") / "tiny"
    network = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    timm.models.save_for_hf(
        network, folder, model_config={"label_names": NAMES, "label_descriptions": TEXTS}, safe_serialization=True
    )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.mark.packages
def test_imagenet_by_timm_is_torchvisions_classifier_with_its_preprocessing(tmp_path: Path) -> None:
    """SalUn and ESD judge by torchvision's ResNet50_Weights.DEFAULT, which is timm's resnet50.tv2_in1k."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = models.resnet18(weights=None).eval()  # smaller, and built alike
    described = timm.get_pretrained_cfg("resnet50.tv2_in1k").to_dict()
    folder = write(tmp_path / "model", network, architecture="resnet18", num_classes=1000, pretrained_cfg=described)
    detector, pixels = load_detector(f"imagenet:{folder}", DetectorInputs([SEEN])), noise(4)
    prepare = models.ResNet50_Weights.DEFAULT.transforms()
    with torch.no_grad():
        logits = network(torch.stack([prepare(Image.fromarray(image)) for image in pixels]))
    assert detector.detect(samples(pixels)).scores[CLASS] == pytest.approx(margins(logits), abs=1e-4)
    categories = models.ResNet50_Weights.DEFAULT.meta["categories"]
    assert [label.split(",")[0] for label in detector.labels[CLASS][:3]] == categories[:3]
    target = detector.target(SEEN)
    assert target is not None and (target.label, target.anchor) == (0, 217)


@pytest.mark.packages
def test_imagenet_by_timm_takes_classes_and_preprocessing_from_the_config(saved: Path) -> None:
    import timm

    detector, pixels = load_detector(f"imagenet:{saved}", DetectorInputs([SEEN])), noise(40, 50, 40)
    assert detector.labels == {CLASS: list(TEXTS.values())}
    assert (detector.version, detector.sha256) == ("tiny", sha256_file(saved / "model.safetensors"))
    network = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network, use_test_size=True))
    with torch.no_grad():
        logits = network(torch.stack([transform(Image.fromarray(image)) for image in pixels]))
    assert detector.detect(samples(pixels)).scores[CLASS] == pytest.approx(margins(logits), abs=1e-4)
    assert logits.std(0).min() > 0.01  # the images differ


@pytest.mark.packages
def test_imagenet_by_timm_reads_the_local_cache_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    def cached(repo: str, **keywords: Any) -> str:
        calls.append((repo, keywords["local_files_only"]))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    detector = load_detector("imagenet:timm/resnet10t.some", DetectorInputs([SEEN]))
    assert calls == [("timm/resnet10t.some", True)] and detector.version == "timm/resnet10t.some"


@pytest.mark.packages
def test_imagenet_by_timm_leaves_random_numbers_as_they_were(saved: Path) -> None:
    torch.manual_seed(1)
    load_detector(f"imagenet:{saved}", DetectorInputs([SEEN]))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.packages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:them/model"}, "its architecture is 'hf-hub:them/model', which is not allowed"),
        ({"architecture": "no_such_network"}, "no model can be built from .*: Unknown model"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "its model_args is .*, which is not allowed in a file"),
        ({"model_args": {"global_pool": "../x"}}, "its global_pool is '../x', which is not allowed in a file"),
        ({"model_args": {"pretrained": True}}, "no model can be built from .*multiple values"),
        ({"model_args": {"in_chans": 1}}, "size mismatch for conv1"),
        ({"pretrained_cfg": {"input_size": [3, 10**5, 224]}}, "its input_size is .*, not 3 and two sides of 1 to 4096"),
        ({"pretrained_cfg": {"input_size": [1, 224, 224]}}, "its input_size is "),
        ({"pretrained_cfg": {"crop_pct": 1e-6}}, "its crop_pct is 1e-06, by which images become larger than 4096"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, "cannot be loaded"),
        ({"label_names": None}, "its config.json does not name its 3 classes"),
        ({"label_names": ["tench"]}, "its config.json names 1 of its 3 classes"),
        ({"num_classes": 1000, "label_names": None}, "size mismatch for fc"),
    ],
    ids=str,
)
def test_imagenet_by_timm_rejects_a_config_that_leads_elsewhere_or_fits_no_weights(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    change_config(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_detector(f"imagenet:{folder}", DetectorInputs([SEEN]))
    assert "\n" not in str(caught.value)


@pytest.mark.packages
def test_imagenet_by_timm_rejects_pickles_and_missing_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["fc.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"its weight files lack fc.bias \(of 1\)"):
        load_detector(f"imagenet:{folder}", DetectorInputs([SEEN]))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"its weights in pytorch_model.bin, a pickle, which may run code"):
        load_detector(f"imagenet:{folder}", DetectorInputs([SEEN]))


@pytest.mark.packages
def test_imagenet_by_timm_does_not_cover_concepts_without_a_class(saved: Path) -> None:
    with pytest.raises(ConfigError, match="cannot detect 'cat'"):
        load_detector(f"imagenet:{saved}", DetectorInputs([Subject("cat")]))


def test_imagenet_by_timm_names_the_extra_if_timm_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 3}), encoding="utf-8")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(
        DataError, match=r'it needs the package timm \(.*\)\. pip install "timm>=0\.9\.12" \(the extra timm\)'
    ) as caught:
        load_detector(f"imagenet:{tmp_path}", DetectorInputs([SEEN]))
    assert "\n" not in str(caught.value)
