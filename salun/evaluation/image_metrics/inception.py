"""FID and KID: how far apart two sets of images are, by torch-fidelity and its Inception network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.errors import DataError, literal
from salun.evaluation.estimate import Estimate
from salun.evaluation.image_metric import Distance, ImageMetricInputs, ImageSet, ImageValue, too_few
from salun.extras import install_command
from salun.files import sha256_file
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    import torch

LEAST = 2048  # images on a side: with fewer, the covariance of 2,048 features has no full rank
LAYER = "2048"  # the features before the last layer, by their number
SUBSETS, SUBSET, SEED = 100, 1000, 2020  # torch-fidelity's for KID, and of the draw of subsets
DIGEST = "6726825d"  # of the weights, at the end of their file's name
BATCH = 32


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a set of images, float32 (n, d), and the network behind them: name and sha256."""

    values: np.ndarray
    weights: str

    def __len__(self) -> int:
        return len(self.values)


def fid(a: ImageSet, b: ImageSet, device: torch.device | str = "cpu", progress: Progress = silent) -> ImageValue:
    """Fréchet Inception distance of two sets of images (Heusel et al. 2017).

    Returns:
        Unknown for fewer than `LEAST` images on a side.

    Raises:
        DataError: torch-fidelity is not installed, or its weights are not here and cannot be downloaded.
    """
    return _too_few(a, b) or fid_of_features(*(_features(each, device, progress) for each in (a, b)))


def kid(a: ImageSet, b: ImageSet, device: torch.device | str = "cpu", progress: Progress = silent) -> ImageValue:
    """Kernel Inception distance of two sets of images (Bińkowski et al. 2018).

    Args, Returns, Raises: As `fid`. The value is the mean over subsets; it is unbiased, and can be below zero.
    """
    return _too_few(a, b) or kid_of_features(*(_features(each, device, progress) for each in (a, b)))


def load_fid(inputs: ImageMetricInputs) -> Distance:
    """FID of each model from the images in the folder of the argument, or else between the models. As `fid`."""
    return _distance(fid, inputs)


def load_kid(inputs: ImageMetricInputs) -> Distance:
    """KID, likewise."""
    return _distance(kid, inputs)


def _distance(metric: Callable[..., ImageValue], inputs: ImageMetricInputs) -> Distance:
    _library()
    return Distance(
        lambda a, b, progress: metric(a, b, inputs.device, progress),
        lambda of, progress: _features(of, inputs.device, progress),
        inputs.real,
        LEAST,
    )


def _features(images: ImageSet, device: torch.device | str, progress: Progress) -> Features:
    features: Features = images.features("inception", lambda of: inception_features(of, device, progress))
    return features


def fid_of_features(a: Features, b: Features) -> ImageValue:
    """As `fid`, of features."""
    short = _too_few(a, b)
    if short:
        return short
    from torch import from_numpy

    library = _library()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(from_numpy(each.values)) for each in (a, b)]
    value = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    return ImageValue(Estimate(value, min(len(a), len(b))), _named(library), a.weights)


def kid_of_features(a: Features, b: Features) -> ImageValue:
    """As `kid`, of features."""
    short = _too_few(a, b)
    if short:
        return short
    from torch import from_numpy

    library = _library()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    values = kid_features_to_metric(
        from_numpy(a.values), from_numpy(b.values), kid_subsets=SUBSETS, kid_subset_size=SUBSET, rng_seed=SEED,
        verbose=False,
    )  # fmt: skip
    estimate = Estimate(values[KEY_METRIC_KID_MEAN], min(len(a), len(b)))
    return ImageValue(estimate, _named(library), a.weights, values[KEY_METRIC_KID_STD])


def inception_features(
    images: Sequence[np.ndarray], device: torch.device | str = "cpu", progress: Progress = silent,
    weights: Path | None = None,
) -> Features:  # fmt: skip
    """The 2,048 features of torch-fidelity's Inception network of each image, n > 0.

    Args:
        images: uint8 (h, w, 3) each; the network scales them to 299 × 299 itself.
        weights: File of the network's weights; by default torch-fidelity's own, downloaded if need be.

    Raises:
        DataError: As `fid`.
    """
    import torch

    _library()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = weights or _inception_weights()
    network = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=str(path))
    network.to(device)
    parts, done = [], 0
    with torch.no_grad():
        for batch in _batches(images):
            parts.append(network(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device))[0].cpu().numpy())
            done += len(batch)
            progress(Event(Stage.EVALUATING, done, len(images)))
    return Features(np.concatenate(parts), f"{path.name} ({sha256_file(path)})")


def _library() -> Any:
    """torch-fidelity. Raises DataError where it is not installed."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the latter
        reason = str(error).splitlines()[0]
        raise DataError(
            f"FID and KID need the package torch-fidelity ({reason})", advice=install_command("fid")
        ) from error
    return torch_fidelity


def _named(library: Any) -> str:
    return f"torch-fidelity {library.__version__}"


def _too_few(a: ImageSet | Features, b: ImageSet | Features) -> ImageValue | None:
    unknown = too_few(min(len(a), len(b)), LEAST, "FID and KID need", "on a side")
    return ImageValue(unknown, "torch-fidelity", "") if unknown is not None else None


def _batches(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stacks of up to `BATCH` images of the same size, in order; each image is taken once."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == BATCH or image.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield np.stack(batch)


def _inception_weights() -> Path:
    """The file of the network's weights, downloaded if need be, checked to hold what its name says and tensors alone.

    (The library itself loads it as a pickle that may run code.)
    """
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(URL_INCEPTION_V3)
    try:
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk or the unpickler; each means that they are not here
        raise DataError(
            f"the weights of torch-fidelity's Inception network are not on this machine and could not be downloaded "
            f"({type(error).__name__})",
            advice=literal(f"Connect to the internet, or copy {path.name} from {URL_INCEPTION_V3} to {path.parent}"),
        ) from error
    if not sha256_file(path).startswith(DIGEST):
        raise DataError(
            f"{path} is not the file of its name: its sha256 does not begin with {DIGEST}", advice="Remove it"
        )
    return path
