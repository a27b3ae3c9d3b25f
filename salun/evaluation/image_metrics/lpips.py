"""LPIPS: how different two images look, by the features of AlexNet."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.hashing import base_hash
from salun.checkpoints.sizes import first_line
from salun.errors import DataError, literal
from salun.evaluation.estimate import Estimate
from salun.evaluation.image_metric import ImageMetricInputs, ImageSet, ImageValue, too_few
from salun.extras import install_command
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    import torch

LEAST = 8  # pairs of images: a mean of fewer says little, and nor does its interval
WEIGHTS, SOURCE = "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models"  # torchvision's
LEAST_SIDE = 32  # pixels, which AlexNet's layers need; smaller images are enlarged


class Lpips:
    """The mean distance of each image of one model from the other's at the same prompt and seed.

    Args:
        network: The package's LPIPS.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    needs_original = True

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network, device
        self.weights = f"AlexNet and lpips 0.1 ({base_hash(network.state_dict())})"

    def measure(self, before: ImageSet | None, after: ImageSet, progress: Progress = silent) -> dict[str, ImageValue]:
        """As in `ImageMetric`; unknown for fewer than `LEAST` pairs."""
        assert before is not None
        unknown = too_few(len(after), LEAST, "LPIPS needs", "of each model")
        if unknown is not None:
            return {"between": ImageValue(unknown, "lpips", self.weights)}
        values = []
        for i, (a, b) in enumerate(zip(before.images, after.images, strict=True)):
            values.append(self._distance(a, b))
            progress(Event(Stage.EVALUATING, i + 1, len(after)))
        return {"between": ImageValue(Estimate.mean(np.array(values)), f"lpips {version('lpips')}", self.weights)}

    def _distance(self, a: np.ndarray, b: np.ndarray) -> float:
        """Of two images of the same size, uint8 (h, w, 3)."""
        import torch

        pixels = [torch.from_numpy(each).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in (a, b)]
        if min(a.shape[:2]) < LEAST_SIDE:
            scale = LEAST_SIDE / min(a.shape[:2])
            pixels = [torch.nn.functional.interpolate(each, scale_factor=scale, mode="bilinear") for each in pixels]
        with torch.no_grad():
            return float(self.network(*(each.to(self.device) for each in pixels)))


def load(inputs: ImageMetricInputs) -> Lpips:
    """LPIPS with AlexNet.

    Raises:
        DataError: lpips is not installed, or AlexNet's weights are invalid, or not here and cannot be downloaded.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the latter
        reason = str(error).splitlines()[0]
        raise DataError(f"LPIPS needs the package lpips ({reason})", advice=install_command("lpips")) from error
    try:
        network = lpips.LPIPS(net="alex", verbose=False)
    except Exception as error:  # of the network, the disk or the unpickler
        raise _without_weights(error) from error
    return Lpips(network.to(inputs.device).eval(), inputs.device)


def _without_weights(error: Exception) -> DataError:
    """The error that AlexNet's weights cannot be used, by what the library raised."""
    from torch import hub

    path, reason = Path(hub.get_dir()) / "checkpoints" / WEIGHTS, f"({type(error).__name__}: {first_line(error)})"
    if path.is_file():
        return DataError(f"AlexNet's weights in {path} cannot be read {reason}", advice="Remove the file")
    return DataError(
        f"the weights of AlexNet are not on this machine and could not be downloaded {reason}",
        advice=literal(f"Connect to the internet, or copy {WEIGHTS} from {SOURCE} to {path.parent}"),
    )
