"""Image classifiers of timm in a folder, as the hub has them: network, preprocessing, names of the classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.sizes import check_size, first_line
from salun.checkpoints.transformers_folder import SIDE, ModelFiles, check_config, entries_of, readable_weights
from salun.errors import ModelError
from salun.evaluation.pretrained import Network, Prepare
from salun.extras import install_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

POOLING = "global_pool"  # the argument of timm's networks that is a text
BLANK = np.zeros((8, 8, 3), np.uint8)


def is_timm(config: dict[str, Any]) -> bool:
    """Whether a config.json is of timm, whose configs name an architecture of that library."""
    return isinstance(config.get("architecture"), str)


def load_timm(
    name: str, folder: Path, files: ModelFiles, config: dict[str, Any], device: torch.device | str = "cpu"
) -> tuple[Network, Prepare, list[str]]:
    """The network in a folder, in eval mode and float32, its preprocessing and the names of its classes.

    Args:
        name: As the user gave it.
        config: The folder's config.json.
        device: Where to compute.

    Raises:
        ModelError: timm is not installed, or the folder's config or weights cannot be used.
    """
    from torch.random import fork_rng

    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the latter
        why = f"it needs the package timm ({first_line(error)})"
        raise ModelError(files.lacking(name, why), advice=install_command("timm")) from error
    try:
        arguments, described = _arguments(config), config.get("pretrained_cfg", config)  # older files have one level
        classes, prepare = _classes(config, described), _prepare(described)
    except Exception as error:  # the library raises many kinds for a config that it cannot use
        raise ModelError(files.lacking(name, first_line(error))) from error

    def build() -> nn.Module:
        made: nn.Module = timm.create_model(
            config["architecture"], pretrained=False, **{**arguments, "num_classes": len(classes)}
        )
        return made

    weights = readable_weights(name, folder, files)
    check_size(build, entries_of(weights), folder / "config.json")
    with fork_rng(devices=[]):
        network = build()
    try:
        _fill(network, weights)
        logits = network(prepare(BLANK)[None])
        if logits.shape != (1, len(classes)):
            raise ValueError(f"it gives {tuple(logits.shape)} for an image, not (1, {len(classes)})")
    except Exception as error:  # likewise, for weights and for what the network then computes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(files.lacking(name, truncated(lines[-1].strip()))) from error
    return network.to(device), prepare, classes


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the config gives to timm's function that builds the network, which would open files by some texts.

    Raises:
        ValueError: The config is not allowed, see `check_config`.
    """
    arguments = dict(config.get("model_args") or {})
    pooling = arguments.pop(POOLING, None)
    check_config({**config, "model_args": arguments})
    if pooling is not None and not (isinstance(pooling, str) and re.fullmatch("[a-z]*", pooling)):
        raise ValueError(f"its {POOLING} is {truncated(repr(pooling))}, which is not allowed in a file")
    return arguments if pooling is None else {**arguments, POOLING: pooling}


def _fill(network: nn.Module, weights: list[Path]) -> None:
    """Load the tensors of the files, in eval mode and float32. Raises an error, whose last line says what differs."""
    from safetensors.torch import load_file

    tensors = {key: tensor for path in weights for key, tensor in load_file(path).items()}
    missing, _ = network.load_state_dict(tensors, strict=False)
    if missing:
        raise ValueError(f"its weight files lack {missing[0]} (of {len(missing)})")
    network.float().eval().requires_grad_(False)


def _classes(config: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """The names of the classes: those in the config, or else timm's of the subset of ImageNet that has as many.

    Raises:
        ValueError: It names none, or not as many as the network has.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = config.get("num_classes", described.get("num_classes"))
    names = config.get("label_names") or described.get("label_names") or described.get("labels")
    texts = config.get("label_descriptions") or described.get("label_descriptions") or {}
    if names is None:
        subset = infer_imagenet_subset({"num_classes": count})
        if subset is None:
            raise ValueError(f"its config.json does not name its {truncated(repr(count))} classes")
        return list(ImageNetInfo(subset).label_descriptions())
    classes = [texts.get(each, each) for each in names]
    if len(classes) != count or not all(isinstance(each, str) for each in classes):
        raise ValueError(f"its config.json names {len(classes):,} of its {truncated(repr(count))} classes")
    return classes


def _prepare(described: dict[str, Any]) -> Prepare:
    """The preprocessing of timm's own validation: at the size for tests, where the config has one.

    Raises:
        ValueError: It would give pixels of another kind than networks of photographs take, or too many.
    """
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config(pretrained_cfg=described, use_test_size=True)
    size, fraction = tuple(settings["input_size"]), settings["crop_pct"]
    if len(size) != 3 or size[0] != 3 or not all(isinstance(side, int) and 1 <= side <= SIDE for side in size[1:]):
        raise ValueError(f"its input_size is {truncated(repr(size))}, not 3 and two sides of 1 to {SIDE}")
    if not max(size) <= SIDE * fraction:
        raise ValueError(f"its crop_pct is {truncated(repr(fraction))}, by which images become larger than {SIDE}")
    transform = create_transform(**settings, is_training=False)

    def prepare(image: np.ndarray) -> Tensor:
        pixels: Tensor = transform(Image.fromarray(image))
        return pixels

    return prepare
