"""What samples of a class-conditional model show, by a classifier of its images: accuracy and Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salun.diffusion.data.class_images import ClassImages
from salun.diffusion.data.latents import item_seed, lazy_images, sample_latents
from salun.diffusion.model.class_conditional import ClassModel
from salun.diffusion.plan import spread
from salun.errors import DataError
from salun.evaluation.detector import DetectorInputs, Samples, load_detector
from salun.evaluation.estimate import Estimate
from salun.evaluation.metrics.frechet import frechet_distance
from salun.progress import Event, Progress, Stage

COMPARED = 10_000  # training images at most, whose features are compared


class Judge:
    """A classifier of `salun classify-train` that names the classes of the data.

    Args:
        name: Its file or run folder, also after `class:`.

    Raises:
        DataError: It cannot be used, or has other classes.
    """

    def __init__(self, name: str, classes: Sequence[str], device: torch.device) -> None:
        from salun.classification.models import head_of

        detector: Any = load_detector(f"class:{name.removeprefix('class:')}", DetectorInputs([], device=device))
        known = list(detector.labels["class"])
        if missing := [each for each in classes if each not in known]:
            raise DataError(
                f"the classifier {name} does not know the class {missing[0]!r} of the data",
                advice="Use one that `salun classify-train` made of the same data",
            )
        self.detector, self.rows = detector, np.array([known.index(each) for each in classes])
        self.head: nn.Linear = head_of(detector.network, len(known))

    def look(self, images: Any, latents: Tensor, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """(label of the data or −1, what the last layer takes) of images (n, H, W, 3): (n,) and (n, d)."""
        taken: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda layer, given: taken.append(given[0].float().cpu()))
        try:
            seen = self.detector.detect(Samples(images, latents, [""] * len(images)), progress)
        finally:
            hook.remove()
        likeliest = seen.scores["class"].argmax(1)
        matches = likeliest[:, None] == self.rows
        return np.where(matches.any(1), matches.argmax(1), -1), torch.cat(taken).flatten(1).numpy()


def quality(
    judge: Judge, model: ClassModel, data: ClassImages, n: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Accuracy of n samples of each trained class, and the Fréchet distance of their features to those of real images.

    The distance depends on the classifier and on both numbers of images, so it is not the FID of papers.
    """

    def watched(event: Event, /) -> None:  # lets a host cancel
        progress(Event(Stage.IMAGES_AFTER))

    labels = np.repeat(data.labels.unique().numpy(), n)
    prompts = [model.labels[label] for label in labels]
    seeds = [item_seed(seed, "eval", i) for i in range(len(labels))]
    with torch.no_grad():
        latents = sample_latents(model, prompts, seeds, progress, Stage.IMAGES_AFTER)
    seen, features = judge.look(lazy_images(model, latents), latents, watched)
    rows = torch.tensor(spread(min(len(data.labels), COMPARED), len(data.labels), seed))
    real = data.images[rows].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    right, known = judge.look(real, data.images[rows].float(), watched)
    return {
        "accuracy": Estimate.percentage(seen == labels).as_json(),
        "accuracy_on_data": Estimate.percentage(right == data.labels[rows].numpy()).as_json(),
        "frechet": Estimate(frechet_distance(known, features), len(labels)).as_json(),
    }


def judged_images(data: ClassImages, n: int) -> int:
    """Samples that `quality` takes."""
    return n * len(data.labels.unique())
