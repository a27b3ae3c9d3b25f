"""Image classifiers: those of `networks`, transformers' and timm's; files of their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.checkpoints.sizes import check_size, first_line
from salun.checkpoints.transformers_folder import PLAIN, check_config
from salun.classification import pretrained
from salun.classification.data import ImageData
from salun.classification.networks import VGG16, SmallCNN, resnet18, resnet20
from salun.errors import ModelError
from salun.extras import install_command
from salun.randomness import seed_of
from salun.runs.cache import digest_of
from salun.untrusted import parse_json
from salun.user_text import as_spelled

FORMAT = "salun-classifier-1"
SIDE, MOST_CHANNELS = 4096, 4  # pixels and channels of what a model is given


@dataclass(frozen=True)
class Preprocessing:
    """How a pretrained model's images are preprocessed. mean, std: of pixels from 0 to 1, one value or one per channel;
    None: unknown. size: (h, w) to resize to, or (n,) of the shorter side. crop: (h, w) of the center crop.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    mode: str = "bilinear"

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no image can be preprocessed with."""
        numbers = (*(self.mean or ()), *(self.std or ()))
        if not all(isfinite(number) for number in numbers) or any(number <= 0 for number in self.std or ()):
            raise ValueError(f"mean {self.mean} and std {self.std} must be finite, and std above 0")
        if any(len(values or (0,)) not in (1, 3) for values in (self.mean, self.std)):
            raise ValueError("mean and std must be one number, or three")
        if not all(1 <= side <= SIDE for side in (*(self.size or ()), *(self.crop or ()))):
            raise ValueError(f"size {self.size} and crop {self.crop} must be from 1 to {SIDE} pixels")

    @classmethod
    def of(cls, config: dict[str, Any]) -> Preprocessing:
        """From an image processor's `preprocessor_config.json`, read as transformers' processors do."""
        mean, std = config.get("image_mean"), config.get("image_std")
        if config.get("do_normalize") is False:
            mean, std = [0.0], [1.0]
        if mean is not None and std is not None:  # in other units if the pixels are not scaled to 1 first
            unit = 255 * (config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1)
            mean, std = tuple(float(m) / unit for m in mean), tuple(float(s) / unit for s in std)
        size = _sides(config.get("size")) if config.get("do_resize", True) else None
        crop = _sides(config.get("crop_size")) if config.get("do_center_crop") else None
        if size and config.get("crop_pct") and len(size) == 1:  # as ConvNeXt's processor
            large = size[0] >= 384
            size, crop = (size * 2, None) if large else ((int(size[0] / config["crop_pct"]),), size * 2)
        mode = "bicubic" if config.get("resample", 2) == 3 else "bilinear"
        return cls(mean, std, size, crop * 2 if crop and len(crop) == 1 else crop, mode)

    @classmethod
    def from_file(cls, config: dict[str, Any]) -> Preprocessing:
        """From a file of weights, untrusted input. Raises KeyError, ValueError or TypeError if it is invalid."""
        mean, std = (tuple(map(float, config[key])) if config[key] is not None else None for key in ("mean", "std"))
        size, crop = (tuple(map(int, config[key])) if config[key] is not None else None for key in ("size", "crop"))
        if config["mode"] not in ("bilinear", "bicubic"):
            raise ValueError(f"resizing by {config['mode']!r}")
        return cls(mean, std, size, crop, config["mode"])


def _sides(config: Any) -> tuple[int, ...] | None:
    """A processor's size: n in old files, {"height", "width"} or {"shortest_edge"} in newer ones."""
    if isinstance(config, dict):
        keys = ("height", "width") if "height" in config else ("shortest_edge",)
        return tuple(int(config[key]) for key in keys) if keys[0] in config else None
    return (int(config), int(config)) if isinstance(config, int) else None


class Pretrained(nn.Module):
    """A transformers image classifier whose input is converted to its color, size and crop.

    Its input is normalized already (`normalize_for`), where its files state how.
    """

    def __init__(self, model: nn.Module, pixels: Preprocessing) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.channels = int(getattr(config, "num_channels", 3))
        size = getattr(config, "image_size", None)
        if pixels.size is None and pixels.crop is None and isinstance(size, int):
            pixels = replace(pixels, size=(size, size))
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        (h, w), size, crop = x.shape[2:], self.pixels.size, self.pixels.crop
        if size is not None and len(size) == 1:
            size = (size[0] * h // min(h, w), size[0] * w // min(h, w))
        if size is not None and size != (h, w):
            x = F.interpolate(x, size, mode=self.pixels.mode, antialias=True)
        if crop is not None:
            top, left = (max(have - want, 0) // 2 for have, want in zip(x.shape[2:], crop, strict=True))
            x = x[:, :, top : top + crop[0], left : left + crop[1]]
        out: Tensor = self.model(pixel_values=x).logits
        return out


def normalize_for(model: nn.Module, data: ImageData) -> ImageData:
    """The data with the mean and standard deviation that a transformers model was trained with, if stated."""
    if not isinstance(model, Pretrained) or model.pixels.mean is None or model.pixels.std is None:
        return data
    return replace(data, preset={**data.preset, "mean": list(model.pixels.mean), "std": list(model.pixels.std)})


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "small": SmallCNN, "resnet18": resnet18, "resnet20": resnet20, "vgg16-bn": VGG16,
}  # fmt: skip


def is_builtin(name: str) -> bool:
    """Whether a model's name stands for an architecture alone, not for a hub id or a folder."""
    return name in ARCHITECTURES or re.fullmatch(rf"timm:{PLAIN}", name) is not None


def new_model(name: str, channels: int, classes: int, seed: int, allow_pickle: bool = False) -> nn.Module:
    """A classifier before any training here, with fresh weights or a pretrained body. seed: of random weights.
    name: one of ARCHITECTURES, `timm:NAME` (an extra; fresh), or a transformers folder or hub id (its body, with a new
    head: its own may know the forget set). allow_pickle: read a transformers model's `pytorch_model.bin`. Raises
    ModelError if it does not exist or cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](channels, classes)
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), channels, classes)
        if as_spelled(Path(name).expanduser()).is_dir() or "/" in name:
            return _transformers(name, classes, allow_pickle)
    raise ModelError(
        f"there is no model {name!r}: give {', '.join(ARCHITECTURES)}, timm:NAME, or a transformers folder or hub id"
    )


def _timm(name: str, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the latter
        raise ModelError(
            f"the model timm:{name} needs the package timm ({error})", advice=install_command("timm")
        ) from error
    try:
        made: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"timm cannot build {name!r}: {error}") from error
    return made


def _transformers(name: str, classes: int, allow_pickle: bool) -> nn.Module:
    made = Pretrained(pretrained.load(name, allow_pickle, num_labels=classes), _pixels(name, allow_pickle))
    head_of(made, classes).reset_parameters()
    return made


def stock_model(name: str, allow_pickle: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """A trained transformers classifier, folder or hub id, head and all, and its classes' names. Raises ModelError."""
    made = pretrained.load(name, allow_pickle)
    labels: dict[int, str] = made.config.id2label
    if sorted(labels) != list(range(len(labels))) or not all(isinstance(label, str) for label in labels.values()):
        raise ModelError(f"the id2label in the config.json of {name!r} must name the classes from 0 up")
    return Pretrained(made, _pixels(name, allow_pickle)), tuple(labels[i] for i in sorted(labels))


def first_label_mismatch(model_classes: Sequence[str], data_classes: Sequence[str]) -> tuple[str, str] | None:
    """The first pair of names, the model's and the data's at the same index, of different classes; None if all agree.

    Ignores case, and treats blanks, dashes and underscores alike. Of several names, as in ImageNet, one must agree.
    """

    def names(text: str) -> set[str]:
        return {re.sub(r"[\s_-]+", " ", part).strip().casefold() for part in (text, *text.split(","))}

    return next(((a, b) for a, b in zip(model_classes, data_classes, strict=True) if not names(a) & names(b)), None)


def has_default_labels(classes: Sequence[str]) -> bool:
    """Whether these are transformers' default names, LABEL_0 and so on."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in classes)


def _pixels(name: str, allow_pickle: bool) -> Preprocessing:
    """The preprocessing of the model's image processor, if it has one. Raises ModelError if its file is damaged."""
    try:
        return Preprocessing.of(pretrained.image_processor(name, allow_pickle))
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise ModelError(f"the image processor of {name!r} cannot be read: {error!r}") from error


@dataclass(frozen=True)
class WeightFileInfo:
    """The metadata of a file of weights.

    architecture: as in `new_model`. channels: of the images. classes: names by label. role: original, unlearned or
    retrain. base, split: hashes of what it was trained on (`Split.base`, and of the forget set too where there is one).
    training: the options it was trained with (`plan.RECIPE`), only those that are known. pixels: how its images are
    prepared, None where that is not known.
    """

    architecture: str
    channels: int
    classes: tuple[str, ...]
    role: str
    base: str
    split: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    pixels: Preprocessing | None = None


def save_model(path: Path, model: nn.Module, facts: WeightFileInfo) -> None:
    """Write weights and buffers as safetensors; equal content gives byte-identical files."""
    metadata = {
        "format": FORMAT,
        "architecture": facts.architecture,
        "channels": str(facts.channels),
        "classes": json.dumps(facts.classes, ensure_ascii=False),
        "role": facts.role,
        "base": facts.base,
        "split": facts.split,
        "training": json.dumps(facts.training, sort_keys=True),
    }
    pixels = model.pixels if isinstance(model, Pretrained) else facts.pixels
    if pixels is not None:
        metadata["pixels"] = json.dumps(asdict(pixels), sort_keys=True)
    if isinstance(model, Pretrained):
        metadata["config"] = json.dumps(model.model.config.to_diff_dict(), sort_keys=True)  # type: ignore[union-attr,operator]
    safetensors_io.write(
        path, {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, metadata
    )


def load_model(path: Path) -> tuple[nn.Module, WeightFileInfo]:
    """A classifier from a file that `save_model` wrote, untrusted input: its metadata opens no folder and
    fetches nothing. Raises ModelError if it is invalid, or names a model that is neither built in, timm's nor described
    by the file's own configuration.
    """
    header = safetensors_io.read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path} holds no classifier of salun", advice="Make one with `salun classify-train`")
    try:
        classes = tuple(str(name) for name in parse_json(metadata["classes"]))
        facts = WeightFileInfo(
            metadata["architecture"], int(metadata["channels"]), classes, metadata["role"],
            metadata["base"], metadata["split"], dict(parse_json(metadata["training"])),
        )  # fmt: skip
        config = parse_json(metadata["config"]) if "config" in metadata else None
        known = "pixels" in metadata or config is not None
        pixels = Preprocessing.from_file(parse_json(metadata["pixels"])) if known else None
        facts = replace(facts, pixels=pixels)
        if not 1 <= facts.channels <= MOST_CHANNELS:
            raise ValueError(f"{facts.channels} channels")
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise ModelError(f"{path} is damaged: an entry of its header is missing or invalid ({error})") from error
    if config is not None:
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            check_config(config)
            made = AutoConfig.for_model(**config)
            build = partial(AutoModelForImageClassification.from_config, made, trust_remote_code=False)
            check_size(build, sum(prod(entry.shape) for entry in header.entries.values()), path)
            model: nn.Module = Pretrained(build(), pixels or Preprocessing())
        except Exception as error:  # the library raises many kinds for a config that it cannot use
            raise ModelError(
                f"{path} is damaged: no classifier can be built from its configuration ({first_line(error)})"
            ) from error
    elif is_builtin(facts.architecture):
        model = new_model(facts.architecture, facts.channels, len(facts.classes), seed=0)
    else:
        raise ModelError(
            f"{path} names the model {facts.architecture!r}, but a file may only name "
            f"{', '.join(ARCHITECTURES)}, timm:NAME, or a transformers model whose configuration the file holds"
        )
    try:
        model.load_state_dict(dict(safetensors_io.tensors(path)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is damaged: its weights do not fit {facts.architecture} ({reason})") from error
    return model, facts


def weights_digest(model: nn.Module) -> str:
    """A hash of a model's weights and buffers, wherever its files are."""
    return digest_of(*model.state_dict().values())


def head_of(model: nn.Module, classes: int) -> nn.Linear:
    """The last linear layer, which gives the logits. Raises ModelError if there is none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not layers:
        raise ModelError(f"the model has no linear layer of {classes} classes, which this method needs")
    return layers[-1]
