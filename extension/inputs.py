"""Options of a form or request as the core takes them: names of masks and image folders confined to their folders."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.detectors import without_path
from salun.diffusion.options import EraseJob
from salun.errors import ConfigError
from salun.options import MASKS, from_mapping
from salun.user_text import unquoted

from .limits import check_lengths
from .paths import confined, confined_file, displayable, safe_name
from .runs import Runs

NOT_OFFERED = ("models_dir", "output", "run_dir", "allow_pickle")  # a form can name no file to read or write
ERASE_FIELDS = tuple(item.name for item in dataclasses.fields(EraseJob) if item.name not in NOT_OFFERED)
IMAGE_FOLDERS = ("forget_images", "retain_images")


class Inputs:
    """The inputs of an erasure that are given by name: masks, and folders of the user's images."""

    def __init__(self, data: Path, runs: Runs) -> None:
        self.runs = runs
        self.images, self.masks = data / "pictures", data / "masks"
        for folder in (self.images, self.masks):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The given options, with names replaced by paths. Raises ConfigError for a name that leads out of its folder,
        and for an option that cannot be set here.
        """
        unknown = [key for key in options if key not in ERASE_FIELDS]
        if unknown:
            raise ConfigError(f"{', '.join(map(repr, unknown))[:200]} cannot be set here")
        check_lengths(options)
        values = {key: value for key, value in options.items() if value is not None}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"is {value}, but must be a finite number", option=key)
            if key in (*IMAGE_FOLDERS, "components", "detector") and not isinstance(value, str):
                raise ConfigError(f"is {repr(value)[:80]}, but must be a text", option=key)
        values["mask"] = self.mask(values.get("mask", "saliency"))
        for key in IMAGE_FOLDERS:
            if key in values:
                values[key] = str(confined(unquoted(values[key]), self.images))
        if "components" in values:
            values["components"] = _components(unquoted(values["components"]))
        if "detector" in values:
            values["detector"] = self.detector(unquoted(values["detector"]))
        return values

    def detector(self, name: str) -> str:
        """A detector with its argument, where that is a folder of images, a hub id or a plain word."""
        if name.startswith("images:"):
            return f"images:{confined(name.partition(':')[2], self.images)}"
        return without_path(name)

    def image_folders(self) -> list[str]:
        """Names of the folders of the user's images; links that lead out are skipped."""
        return sorted(place.name for place in self.images.iterdir() if place.is_dir() and self._holds(place))

    def _holds(self, folder: Path) -> bool:
        try:
            return bool(confined(folder.name, self.images))
        except ConfigError:
            return False

    def mask_names(self) -> list[str]:
        """Names of masks that can be chosen besides the controls."""
        made = sorted(p.stem for p in self.masks.glob("*.safetensors"))
        of_runs = sorted((p.parent.name for p in self.runs.folder.glob("*/mask.safetensors")), reverse=True)
        return list(filter(displayable, made + of_runs))

    def mask(self, name: Any) -> str:
        """The file of a mask, or the name of a control."""
        if name in MASKS:
            return str(name)
        if not isinstance(name, str):
            raise ConfigError(f"is {repr(name)[:80]}, but must be a text", option="mask")
        if (self.masks / f"{safe_name(name)}.safetensors").is_file():
            return str(confined(f"{safe_name(name)}.safetensors", self.masks))
        return str(confined_file("mask.safetensors", self.runs.get(name)))

    def options_of(self, run: str, titles: Mapping[str, str]) -> dict[str, Any]:
        """The options of a run as a form shows them, to be loaded again. titles: model path → title."""
        options = {key: value for key, value in self.runs.options(run).items() if key in ERASE_FIELDS}
        from_mapping(EraseJob, options, f"the options of {run}")  # run.json is untrusted input
        options["model"] = titles.get(str(options.get("model")), options.get("model"))
        for key in IMAGE_FOLDERS:
            if options.get(key):
                options[key] = Path(options[key]).name
        if str(options.get("detector")).startswith("images:"):
            options["detector"] = f"images:{Path(options['detector'].partition(':')[2]).name}"
        if options.get("mask") not in MASKS:
            file = Path(str(options.get("mask")))  # named as `mask_names` does
            of_a_run = file.parent.parent.resolve() == self.runs.folder.resolve()
            options["mask"] = file.parent.name if of_a_run else file.stem
        return options


def _components(name: str) -> str:
    """Raises ConfigError unless it is an alias or a hub id: a form cannot name folders of this machine."""
    from salun.checkpoints.locate import aliases

    if name in aliases()["models"] or re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", name):
        return name
    raise ConfigError(f"is {name[:80]!r}, but must be an alias or a hub id (owner/name)", option="components")
