"""What a metric of images is, and the sets of images that it compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from salun.errors import DataError
from salun.evaluation.estimate import Unknown, Value
from salun.image_metrics import IMAGE_METRICS
from salun.images import list_images, read_image, white_level
from salun.options import entry_of
from salun.progress import Progress, silent
from salun.user_text import as_spelled, unquoted

if TYPE_CHECKING:
    import torch

    from salun.evaluation.clip_model import ClipModel


BLANK = np.zeros((64, 64, 3), np.uint8)


@dataclass(frozen=True)
class ImageValue:
    """A value measured on sets of images, and what it was measured with.

    Args:
        implementation: Library and version; "salun" for our own.
        weights: Of the network behind it: name and sha256; "" where none was needed.
        spread: Standard deviation over subsets, of KID.
    """

    value: Value
    implementation: str
    weights: str
    spread: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As in `eval.json`."""
        reason = {"reason": self.value.reason} if isinstance(self.value, Unknown) else {}
        spread = {"spread": self.spread} if self.spread is not None else {}
        return {
            "value": self.value.as_json(), **spread, **reason, "implementation": self.implementation,
            "weights": self.weights,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, and what several metrics compute from them once.

    Args:
        images: uint8 (h, w, 3) each, of any sizes; read in order, and best held nowhere (`LazyImages`, `ImageFiles`).
        prompts: Of each image; none of real images.
    """

    images: Sequence[np.ndarray]
    prompts: Sequence[str] = ()
    _known: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def features(self, name: str, compute: Callable[[Sequence[np.ndarray]], Any]) -> Any:
        """What `compute` makes of the images, computed once for each name."""
        if name not in self._known:
            self._known[name] = compute(self.images)
        return self._known[name]


def too_few(n: int, least: int, needs: str, where: str = "") -> Unknown | None:
    """Unknown, with the reason, where n images are fewer than a metric needs.

    Args:
        needs: Subject and verb, as in "CMMD needs".
        where: Of the images, as in "on a side".
    """
    if n >= least:
        return None
    images = " ".join(filter(None, (f"{n:,} image{'s' * (n != 1)}", where, "is" if n == 1 else "are")))
    return Unknown(f"{images} too few; {needs} {least:,}")


def clip_embeddings(images: ImageSet, model: ClipModel, progress: Progress = silent) -> np.ndarray:
    """CLIP's embeddings of the images, float32 (n, d), computed once."""
    embedded: np.ndarray = images.features(f"clip {model.sha256}", lambda of: model.embed_images(of, progress, len(of)))
    return embedded


class ImageFiles(Sequence[np.ndarray]):
    """The images of a folder, uint8 (h, w, 3), each read when it is asked for.

    Raises:
        DataError: The folder cannot be read or has no images; later, that a file is not an image.
    """

    def __init__(self, folder: Path) -> None:
        self.files = list_images(folder).files
        if not self.files:
            raise DataError(f"{folder} has no images", advice="Give a folder of images")
        self._white = cache(lambda: white_level(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        path = self.files[index]
        try:
            image, _ = read_image(path, self._white)
        except DataError as error:
            raise DataError(f"{path} cannot be read as an image: {error}", advice="Fix or remove it") from error
        return np.array(image.convert("RGB"))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


class ImageMetric(Protocol):
    """Measures images of two models, or of one.

    Attributes:
        needs_original: Whether there is nothing to measure without images of the original model.
    """

    needs_original: bool

    def measure(self, before: ImageSet | None, after: ImageSet, progress: Progress = silent) -> dict[str, ImageValue]:
        """The values of each model, "before" and "after", or one "between" both.

        Args:
            before: The original's images, at the prompts and seeds of `after`; None for no original.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """A metric that can fail for other reasons than the images it measures, which is to be known before they are."""

    def prepare(self, n: int, progress: Progress = silent) -> None:
        """Load and read all that measuring needs.

        Args:
            n: Images of the largest set.

        Raises:
            DataError: Weights are not here, or a real image cannot be read.
        """
        ...


class Distance:
    """How far apart sets of images are: each model's from real ones, or else the two models' from each other.

    Args:
        compare: The value of two sets.
        embed: Compute what `compare` needs of a set, which keeps it.
        real: Images to compare with; None for none.
        least: Images on a side with which `compare` computes anything.
    """

    def __init__(
        self,
        compare: Callable[[ImageSet, ImageSet, Progress], ImageValue],
        embed: Callable[[ImageSet, Progress], Any],
        real: ImageSet | None,
        least: int = 1,
    ) -> None:
        self.compare, self.embed, self.least = compare, embed, least
        self.real, self.needs_original = real, real is None

    def prepare(self, n: int, progress: Progress = silent) -> None:
        """As in `Prepared`: the real images are embedded, or else a blank one."""
        if min(n, n if self.real is None else len(self.real)) >= self.least:
            self.embed(self.real if self.real is not None else ImageSet([BLANK]), progress)

    def measure(self, before: ImageSet | None, after: ImageSet, progress: Progress = silent) -> dict[str, ImageValue]:
        """As in `ImageMetric`."""
        if self.real is not None:
            sides = {"before": before, "after": after}
            return {name: self.compare(of, self.real, progress) for name, of in sides.items() if of is not None}
        assert before is not None
        return {"between": self.compare(before, after, progress)}


@dataclass(frozen=True)
class ImageMetricInputs:
    """What metrics of images are made from.

    Args:
        argument: What follows the metric's name after a colon, "" for nothing.
        clip: For metrics by CLIP's embeddings.
        device: Where to compute.
    """

    argument: str
    clip: ClipModel
    device: torch.device | str = "cpu"

    @property
    def real(self) -> ImageSet | None:
        """The images of the folder that the argument names. Raises DataError where it has no images."""
        if not self.argument:
            return None
        return ImageSet(ImageFiles(as_spelled(Path(unquoted(self.argument)).expanduser())))


def load_image_metrics(
    names: Sequence[str], clip: ClipModel, device: torch.device | str = "cpu"
) -> dict[str, ImageMetric]:
    """The metrics of these names, each with its argument after a colon if it takes one.

    Raises:
        ConfigError: No metric has that name, or it takes no argument.
        DataError: What it needs is not here.
    """
    loaded: dict[str, ImageMetric] = {}
    for name in dict.fromkeys(names):
        entry, argument = entry_of(name, IMAGE_METRICS, "metric")
        loaded[name] = resolve_name(entry.loads)(ImageMetricInputs(argument, clip, device))
    return loaded


def measure_images(
    metrics: Mapping[str, ImageMetric], before: ImageSet | None, after: ImageSet, progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """The values of all metrics as JSON: name → "before", "after" or "between" → `ImageValue.as_json`.

    What cannot be measured is unknown, and why: the images took hours.
    """
    measured = {}
    for name, metric in metrics.items():
        try:
            values = metric.measure(before, after, progress)
        except DataError as error:
            values = {"between" if metric.needs_original else "after": ImageValue(Unknown(str(error)), "", "")}
        measured[name] = {side: value.as_json() for side, value in values.items()}
    return measured
