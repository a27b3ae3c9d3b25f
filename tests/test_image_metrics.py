"""Metrics of sets of images against direct references: FID, KID, CMMD and CLIP score."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from salun.errors import ConfigError, DataError
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.estimate import Estimate, Unknown
from salun.evaluation.image_metric import (
    Distance,
    ImageMetricInputs,
    ImageSet,
    ImageValue,
    load_image_metrics,
    measure_images,
)
from salun.evaluation.image_metrics import cmmd as cmmd_module
from salun.evaluation.image_metrics import inception
from salun.evaluation.image_metrics import lpips as lpips_module
from salun.evaluation.image_metrics.clip_score import clip_scores
from salun.evaluation.image_metrics.cmmd import cmmd
from salun.evaluation.image_metrics.inception import (
    Features,
    fid,
    fid_of_features,
    inception_features,
    kid,
    kid_of_features,
)
from salun.evaluation.image_metrics.lpips import Lpips
from salun.image_metrics import IMAGE_METRICS
from salun.progress import Progress


def drawn(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 (n, d), correlated, and not negative as Inception's features are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ (np.eye(d) + 0.3 * np.random.default_rng(9).standard_normal((d, d)))
    return np.maximum(mixed + shift, 0).astype(np.float32)


def unit(n: int, d: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((n, d)) + 1
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def blank(n: int, color: int = 0) -> ImageSet:
    """n images of one color, with prompts."""
    return ImageSet([np.full((8, 8, 3), color, np.uint8)] * n, ["a"] * n)


def loaded(name: str) -> Any:
    """A metric whose network gives mean colors."""
    if name == "lpips":
        return Lpips(Difference())
    return resolve_name(IMAGE_METRICS[name].loads)(ImageMetricInputs("", cast(ClipModel, Colors())))


def estimated(metric: ImageValue) -> Estimate:
    assert isinstance(metric.value, Estimate)
    return metric.value


@pytest.mark.packages
def test_fid_of_features_is_the_distance_of_fitted_gaussians() -> None:
    pytest.importorskip("torch_fidelity")
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = drawn(2100, 24, 0), drawn(2048, 24, 1, 0.2)
    metric = fid_of_features(Features(a, "w (1)"), Features(b, "w (1)"))
    mean = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = mean @ mean + np.trace(cov_a + cov_b - 2 * scipy_linalg.sqrtm(cov_a @ cov_b).real)
    assert expected > 0.1
    # the library takes the means in float32, as TensorFlow's original does
    assert estimated(metric).value == pytest.approx(expected, rel=1e-5)
    assert estimated(metric).n == 2048 and metric.implementation.startswith("torch-fidelity 0.")
    assert metric.as_json()["weights"] == "w (1)"


PACKAGES = {"fid": "torch_fidelity", "kid": "torch_fidelity", "lpips": "lpips"}


def colors(images: Any, *_: Any) -> np.ndarray:
    """In place of a network's embeddings: the mean color of each image, and a constant, with length 1."""
    means = np.array([np.append(image.reshape(-1, 3).mean(0), 64) for image in images])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


class Colors:
    """A CLIP model of mean colors."""

    sha256, implementation, weights = "0", "mean color 1.0", "mean color (0)"
    embed_images = staticmethod(colors)

    def load(self) -> None:
        """There is nothing to load."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.full((len(texts), 4), 0.5, np.float32)


class Difference(torch.nn.Module):
    """In place of LPIPS's network."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return (before - after).square().mean()


@pytest.mark.parametrize(
    ("name", "n", "reason"),
    [
        ("cmmd", 255, "255 images on a side are too few; CMMD needs 256"),
        ("cmmd", 0, "0 images on a side are too few; CMMD needs 256"),
        ("clip-score", 7, "7 images are too few; the CLIP score needs 8"),
        ("clip-score", 1, "1 image is too few; the CLIP score needs 8"),
        ("lpips", 7, "7 images of each model are too few; LPIPS needs 8"),
    ],
)
def test_metrics_of_too_few_images_are_unknown_with_the_reason(name: str, n: int, reason: str) -> None:
    for value in measure_images({name: loaded(name)}, blank(300 if name == "cmmd" else n), blank(n))[name].values():
        assert (value["value"], value["reason"]) == (None, reason) and value["implementation"]


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.packages] * (each in PACKAGES)) for each in IMAGE_METRICS]
)
def test_metrics_of_images_of_one_color_have_a_value_and_of_no_images_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    monkeypatch.setattr(inception, "inception_features", lambda images, *_: Features(colors(images), "mean color (0)"))
    n = {"fid": inception.LEAST, "kid": inception.LEAST, "cmmd": cmmd_module.LEAST}.get(name, 8)
    metric = {name: loaded(name)}
    same, apart, none = (
        list(measure_images(metric, *sides)[name].values())[-1]
        for sides in ((blank(n), blank(n)), (blank(n), blank(n, 255)), (blank(0), blank(0)))
    )
    assert none["value"] is None and "too few" in none["reason"]
    values = [Estimate(**each["value"]) for each in (same, apart)]
    assert all(value.n == n for value in values)
    if name == "clip-score":
        assert values[0].value == pytest.approx(50, abs=1e-3) and values[0].low == values[0].high
    else:
        assert values[0].value == pytest.approx(0, abs=1e-3) and 0.01 < values[1].value < 100


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (xᵀy / d + 1)³, over all pairs."""
    x, y, d = x.astype(np.float64), y.astype(np.float64), x.shape[1]

    def within(z: np.ndarray) -> float:
        kernel = (z @ z.T / d + 1) ** 3
        return float((kernel.sum() - np.trace(kernel)) / (len(z) * (len(z) - 1)))

    return within(x) + within(y) - 2 * float(((x @ y.T / d + 1) ** 3).mean())


@pytest.mark.packages
def test_kid_of_features_is_the_mean_over_subsets_of_the_polynomial_mmd() -> None:
    pytest.importorskip("torch_fidelity")
    a, b = drawn(2048, 16, 0), drawn(2048, 16, 1, 0.2)
    metric = kid_of_features(Features(a, "w"), Features(b, "w"))
    rng = np.random.RandomState(inception.SEED)
    draws = [(rng.choice(2048, 1000, replace=False), rng.choice(2048, 1000, replace=False)) for _ in range(100)]
    expected = [polynomial_mmd(a[i], b[j]) for i, j in draws]
    assert estimated(metric).value == pytest.approx(np.mean(expected), rel=1e-4)  # the library's are in float32
    assert metric.spread == pytest.approx(np.std(expected), rel=1e-2)
    assert estimated(metric).value == pytest.approx(polynomial_mmd(a, b), abs=4 * np.std(expected) / 10)


@pytest.mark.parametrize("metric", [fid, kid])
def test_fid_and_kid_of_few_images_are_unknown_with_the_reason(metric: Any) -> None:
    few, many = blank(3), blank(inception.LEAST)
    for sides in ((few, many), (many, few)):
        result = metric(*sides)
        assert result.value == Unknown("3 images on a side are too few; FID and KID need 2,048")
        assert result.as_json()["value"] is None and "too few" in result.as_json()["reason"]


@pytest.mark.parametrize("metric", [fid, kid])
def test_fid_and_kid_say_in_one_line_which_extra_they_need(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    many = blank(inception.LEAST)
    with pytest.raises(
        DataError, match=r'need the package torch-fidelity .*\. pip install "torch-fidelity>=0\.4" \(the extra fid\)'
    ) as caught:
        metric(many, many)
    assert "\n" not in str(caught.value)


@pytest.mark.packages
def test_inception_features_say_in_one_line_that_the_weights_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")

    def offline(*_: Any, **__: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        DataError, match=r"could not be downloaded \(URLError\)\. Connect to the internet, or"
    ) as caught:
        inception_features(np.zeros((1, 8, 8, 3), np.uint8))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.packages
def test_inception_features_are_those_of_the_library(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    shapes: dict[str, torch.Tensor] = {}
    original = FeatureExtractorInceptionV3.load_state_dict
    try:  # the class has no other way to be built without its weights
        FeatureExtractorInceptionV3.load_state_dict = lambda self, _: shapes.update(self.state_dict())
        path = tmp_path / "weights.pth"
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("n", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = original
    for tensor in shapes.values():
        if tensor.ndim == 4:  # so that the images still differ behind all layers
            torch.nn.init.kaiming_normal_(tensor)
    torch.save(shapes, path)
    network.load_state_dict(shapes)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    mixed = [*images[:2], images[2, :16]]  # of two sizes
    features = inception_features(mixed, weights=path)
    with torch.no_grad():
        expected = [network(torch.from_numpy(each).permute(2, 0, 1)[None])[0] for each in mixed]
    assert features.values.shape == (3, 2048) and features.values.std(0).max() > 0.05
    assert torch.allclose(torch.from_numpy(features.values), torch.cat(expected), rtol=1e-3, atol=1e-4)
    assert features.weights.startswith("weights.pth (")


def gaussian_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared MMD with a Gaussian kernel of σ = 10, times 1,000, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        squares = ((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(2)
        return float(np.exp(-squares / (2 * 10.0**2)).mean())

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("block", [1, 7, 64, 2048])
def test_cmmd_is_the_gaussian_mmd_whatever_the_block(block: int) -> None:
    x, y = unit(50, 12, 0), unit(33, 12, 1) * np.float32(0.9)
    assert cmmd(x, y, block) == pytest.approx(gaussian_mmd(x, y), rel=1e-9, abs=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_and_grows_with_the_distance() -> None:
    x = unit(40, 12, 0)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert 0 < cmmd(x, unit(40, 12, 1)) < cmmd(x, -x)
    assert cmmd(x, -x) == cmmd(-x, x)


def test_cmmd_of_two_samples_of_one_distribution_is_its_bias_which_is_small_from_the_least_number_on() -> None:
    rng, bias = np.random.default_rng(0), {}
    for n in (8, cmmd_module.LEAST):
        x = rng.standard_normal((2, n, 64)) + np.full(64, 1.0)  # a mean cosine of 0.5, as CLIP's embeddings of images
        x /= np.linalg.norm(x, axis=2, keepdims=True)
        squares = ((x[0][:, None] - x[1][None]) ** 2).sum(2)
        bias[n] = 1000 * 2 / n * (1 - np.exp(-squares / 200).mean())
        assert cmmd(x[0], x[1]) == pytest.approx(bias[n], rel=0.2)
    assert bias[8] > 1.1 and bias[cmmd_module.LEAST] < 0.05


def test_cmmd_needs_embeddings_of_one_length() -> None:
    with pytest.raises(ValueError, match=r"not of shapes \(3, 4\) and \(3, 5\)"):
        cmmd(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="CMMD needs"):
        cmmd(np.ones((0, 4)), np.ones((3, 4)))


def test_clip_scores_are_cosines_in_percent_and_never_negative() -> None:
    x, y = unit(6, 5, 0), unit(6, 5, 1)
    y[0] = -x[0]
    expected = [max(100 * float(np.dot(a.astype(float), b.astype(float))), 0) for a, b in zip(x, y, strict=True)]
    assert clip_scores(x, y) == pytest.approx(expected, abs=1e-9)
    assert clip_scores(x, y)[0] == 0 and clip_scores(x, x) == pytest.approx(np.full(6, 100), abs=1e-4)


@pytest.mark.parametrize(
    "content", [None, b"", b"<html>", b"PK\x03\x04"], ids=["missing", "empty", "text", "truncated"]
)
def test_lpips_says_in_one_line_which_weights_it_cannot_use(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(**_: Any) -> Any:  # as torchvision and so the package do
        return torch.hub.load_state_dict_from_url(f"{lpips_module.SOURCE}/{lpips_module.WEIGHTS}", check_hash=True)

    def download(_: str, target: str, digest: str, **__: Any) -> None:
        raise RuntimeError(f'invalid hash value (expected "{digest}", got "0")')

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=network))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / lpips_module.WEIGHTS
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_image_metrics(["lpips"], cast(ClipModel, Colors()), "cpu")
    remove = f"AlexNet's weights in {path} cannot be read"
    missing = "could not be downloaded (RuntimeError: invalid hash value"
    assert (missing if content is None else remove) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.packages
def test_lpips_is_that_of_the_package_at_images_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips")
    from salun.evaluation.image_metrics import lpips as ours

    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()  # the true one is a download
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: network)
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, 256, (8, 64, 48, 3), np.uint8) for _ in range(2))
    metric = ours.load(ImageMetricInputs("", ClipModel()))
    value = metric.measure(ImageSet(list(before)), ImageSet(list(after)))["between"]
    tensors = [torch.from_numpy(each).permute(0, 3, 1, 2).float() / 127.5 - 1 for each in (before, after)]
    with torch.no_grad():
        expected = network(*tensors).flatten().numpy()
    assert expected.std() > 0 and estimated(value).value == pytest.approx(expected.mean(), rel=1e-4)
    assert value.implementation.startswith("lpips 0.1") and estimated(value).n == 8
    tiny = metric.measure(ImageSet(list(before[:, :8, :8])), ImageSet(list(before[:, :8, :8])))["between"]
    assert estimated(tiny).value == 0


def test_a_distance_reads_the_real_images_before_it_measures(tmp_path: Path) -> None:
    for i, image in enumerate(drawn(3, 8 * 8 * 3, 0).reshape(3, 8, 8, 3)):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{i}.png")
    read: list[int] = []

    def embed(of: ImageSet, _: Progress) -> None:
        of.features("count", lambda images: read.append(sum(1 for _ in images)))

    def distance(least: int) -> Distance:
        real = ImageMetricInputs(str(tmp_path), ClipModel()).real
        return Distance(lambda *_: pytest.fail("nothing is measured yet"), embed, real, least)

    ready = distance(1)
    ready.prepare(2)
    ready.prepare(2)
    assert read == [3]
    (tmp_path / "2.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image: unreadable\. Fix or remove it"):
        distance(1).prepare(2)
    distance(4).prepare(9)  # three images are too few for any value, so none is read


@pytest.mark.parametrize("load", [inception.load_fid, inception.load_kid])
def test_fid_and_kid_fetch_their_weights_before_there_are_images(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise DataError("the weights could not be downloaded")

    monkeypatch.setattr(inception, "_library", lambda: None)
    monkeypatch.setattr(inception, "inception_features", offline)
    metric = load(ImageMetricInputs("", ClipModel()))
    metric.prepare(inception.LEAST - 1)  # too few for a value
    with pytest.raises(DataError, match="could not be downloaded"):
        metric.prepare(inception.LEAST)


def test_measure_images_says_why_a_metric_is_unknown_and_measures_the_others() -> None:
    def broken(*_: Any) -> ImageValue:
        raise DataError("the disk is gone", advice="Mount it")

    def sound(a: ImageSet, b: ImageSet, _: Progress) -> ImageValue:
        return ImageValue(Estimate(1.0, len(a)), "here", "")

    metrics = {"a": Distance(broken, broken, None), "b": Distance(sound, sound, None)}
    measured = measure_images(metrics, blank(2), blank(2))
    unknown = {"value": None, "reason": "the disk is gone. Mount it", "implementation": "", "weights": ""}
    assert measured["a"] == {"between": unknown} and measured["b"]["between"]["value"]["value"] == 1.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ssim"], "metric is 'ssim', but must be one of fid, kid, cmmd, clip-score, lpips"),
        (["lpips:folder"], "lpips takes no argument. Use .* lpips"),
    ],
)
def test_metrics_of_images_are_named_by_the_registry(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_image_metrics(names, ClipModel())
