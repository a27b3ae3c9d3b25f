"""The options of `salun train`. Nothing heavy is imported: help is made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from salun.errors import ConfigError
from salun.options import DeviceOptions, option
from salun.untrusted import read_yaml

NOISES = ("linear", "cosine")


@cache
def presets() -> dict[str, Any]:
    """How models of data sets known by name are trained, and under "others" of all other data."""
    entries: dict[str, Any] = read_yaml(Path(__file__).resolve().parents[1] / "assets" / "class_models.yaml")
    return entries


@dataclass(frozen=True)
class ClassTrainOptions(DeviceOptions):
    """The data, the network, and how it is trained; `auto` is the data set's number, see `assets/class_models.yaml`."""

    data: str = option(
        "digits",
        "Data set: digits, cifar10 or another name of `classify-train`, a folder with a subfolder of images for "
        "each class, or a Hugging Face data set (hub id, saved or cloned)",
        path=True,
    )
    preset: str | None = option(
        None,
        "Data set whose numbers are taken, for data under another name",
        auto="that of the data",
        choices=("digits", "cifar10", "stl10"),
    )
    without: list[str] = option(
        [], "Class that is left out, by name or as class:NUMBER: a model retrained without it; repeatable"
    )
    data_config: str | None = option(
        None, "Configuration of a Hugging Face data set, or folder in the data's folder", auto="the only one"
    )
    split: str | None = option(None, "Parts of the data by role, such as train=fold1,test=fold2", auto="by their names")
    image_column: str | None = option(None, "Column of images of a Hugging Face data set or metadata.csv")
    label_column: str | None = option(None, "Column of labels of a Hugging Face data set or metadata.csv")
    test_share: float = option(
        0.2, "Fraction of the images that is held out, if the data has no test part", above=0, maximum=0.9
    )
    split_seed: int = option(0, "Seed of that split", minimum=0, maximum=2**63 - 1)
    image_size: int | None = option(
        None, "Side length in pixels that images are resized to", auto="the data set's", minimum=8, maximum=1024
    )
    width: int | None = option(None, "Channels of the first level", auto="the data set's", minimum=8, maximum=2048)
    widths: str | None = option(
        None, "Channels of each level relative to the first, as in 1,2,2", auto="the data set's"
    )
    layers: int | None = option(None, "Residual layers of each level", auto="the data set's", minimum=1, maximum=8)
    dropout: float | None = option(
        None, "Dropout in the residual layers", auto="the data set's", minimum=0, maximum=0.9
    )
    attention: str | None = option(None, "Levels with attention, counted from 0, as in 1,2", auto="the data set's")
    steps: int | None = option(None, "Training steps", auto="the data set's", minimum=1, maximum=100_000_000)
    batch_size: int | None = option(None, "Images of a step", auto="the data set's", minimum=1, maximum=100_000)
    lr: float | None = option(None, "Learning rate of Adam", auto="the data set's", above=0, maximum=1)
    lr_decay: float | None = option(
        None, "Fraction of the steps, at the end, over which the learning rate falls to 0", auto="the data set's",
        minimum=0, maximum=1,
    )  # fmt: skip
    ema: float | None = option(
        None, "Decay of the moving average of the weights, which is the model", auto="the data set's", minimum=0,
        maximum=0.999999,
    )  # fmt: skip
    grad_clip: float | None = option(
        None, "Norm that the gradient of a step is clipped to, 0 for no clipping", auto="the data set's", minimum=0,
        maximum=1e9,
    )  # fmt: skip
    label_dropout: float | None = option(
        None, "Fraction of images whose label is the null label, for guidance", auto="the data set's", above=0,
        maximum=0.9,
    )  # fmt: skip
    noise: str | None = option(None, "Noise schedule", auto="the data set's", choices=NOISES)
    flip: bool | None = option(None, "Mirror half of the images", auto="the data set's")
    prediction_type: str | None = option(
        None, "What the network predicts", auto="the data set's", choices=("epsilon", "v_prediction")
    )
    channels_last: bool = option(False, "Keep images and weights with the channels last in memory")
    classifier: str | None = option(
        None,
        "Classifier of `salun classify-train` (run folder or file) that judges samples at the end: their accuracy, and "
        "the Fréchet distance of its features to those of the training images",
        path=True,
    )
    judged: int = option(50, "Samples of each class that it judges", minimum=2, maximum=100_000)
    samples_every: int = option(1000, "Steps between two images of samples, 0 for none", minimum=0, maximum=2**31)
    save_every: float = option(60.0, "Seconds between saves of the state to resume from", minimum=0, maximum=1e9)
    seed: int = option(0, "Random seed", minimum=0, maximum=2**63 - 1)

    def resolved(self) -> tuple[ClassTrainOptions, dict[str, Any]]:
        """With every number set, and what the preset says of sampling and erasing. Raises ConfigError."""
        known = presets()
        named = self.preset or (self.data if self.data in known["models"] else None)
        preset = known["models"][named] if named is not None else known["others"]
        names = [item.name for item in fields(self) if item.name in preset and getattr(self, item.name) is None]
        options = replace(self, **{name: preset[name] for name in names})
        levels = options.levels
        if any(level >= len(levels) for level in options.attended):
            raise ConfigError(f"is {options.attention}, but there are {len(levels)} levels", option="attention")
        if options.image_size is not None and options.image_size % 2 ** (len(levels) - 1):
            raise ConfigError(
                f"is {options.image_size}, but {len(levels)} levels need a multiple of {2 ** (len(levels) - 1)}",
                option="image_size",
            )
        return options, {key: preset[key] for key in ("sampling", "recipe", "recipes_paper") if key in preset}

    @property
    def levels(self) -> list[int]:
        """Channels of each level."""
        assert self.width is not None and self.widths is not None
        factors = _numbers(self.widths, "widths")
        if not 1 <= len(factors) <= 8 or not all(1 <= factor <= 64 for factor in factors):
            raise ConfigError(f"is {self.widths[:40]}, but must be 1 to 8 numbers from 1 to 64", option="widths")
        if self.width % 8:
            raise ConfigError(f"is {self.width}, but must be a multiple of 8", option="width")
        return [self.width * factor for factor in factors]

    @property
    def attended(self) -> list[int]:
        """The levels with attention."""
        return _numbers(self.attention or "", "attention")


def _numbers(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise ConfigError(f"is {text[:40]!r}, but must be whole numbers, separated by commas", option=name)
    return [int(part) for part in parts]


GROUPS = {
    "Data": (
        "data",
        "preset",
        "without",
        "data_config",
        "split",
        "image_size",
        "image_column",
        "label_column",
        "test_share",
        "split_seed",
    ),
    "Network": ("width", "widths", "layers", "dropout", "attention", "prediction_type"),
    "Training": (
        "steps",
        "batch_size",
        "lr",
        "lr_decay",
        "ema",
        "grad_clip",
        "label_dropout",
        "noise",
        "flip",
        "channels_last",
        "seed",
    ),
    "Output": ("samples_every", "classifier", "judged", "save_every"),
    "Computing": ("device", "dtype"),
}
