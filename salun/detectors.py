"""The detectors by name: what decides whether images show a concept. Each is a file in `salun.evaluation.detectors`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from salun.errors import ConfigError
from salun.options import entry_of
from salun.user_text import is_hub_id


@dataclass(frozen=True)
class DetectorEntry:
    """An entry of `DETECTORS`.

    Args:
        title: What it looks at, and by what; a noun phrase.
        loads: The function of `DetectorInputs` that loads it, "module:name", imported when it is called. It returns
            None where what it needs is not there, such as a model's own classifier.
        argument: What may follow the name after a colon, as in "images:FOLDER"; "" for nothing. MODEL is a folder or a
            hub id, with a revision as in ID@REVISION; without a FOLDER or FILE the detector cannot be used.
        passes: Of the original network for each image, on average.
        fitting_passes: Likewise for each image in the rounds of its fit (`calibration.fitting_rounds`): the first, the
            second, and each further one; empty for a detector that is not fitted.
    """

    title: str
    loads: str
    argument: str = ""
    passes: int = 0
    fitting_passes: tuple[int, ...] = ()


DETECTORS = {
    "attribute": DetectorEntry("classifier in the model's own folder", "salun.evaluation.detectors.attribute:load"),
    "self": DetectorEntry(
        "the original model as classifier of latents",
        "salun.evaluation.detectors.self_classifier:load",
        passes=6,
        fitting_passes=(21, 6, 3),  # three prompts at seven timesteps, at two, and at one
    ),
    "clip": DetectorEntry("CLIP, without training, for any concept", "salun.evaluation.detectors.clip:load", "MODEL"),
    "images": DetectorEntry(
        "classifier on CLIP's features, trained on examples", "salun.evaluation.detectors.images:load", "FOLDER"
    ),
    "imagenet": DetectorEntry(
        "image classifier of transformers or timm, for concepts among its labels",
        "salun.evaluation.detectors.imagenet:load",
        "MODEL",
    ),
    "class": DetectorEntry(
        "classifier of `salun classify-train`, for concepts among its classes",
        "salun.evaluation.detectors.class_classifier:load",
        "FILE",
    ),
    "safety-checker": DetectorEntry(
        "safety checker of Stable Diffusion 1.x, for nudity",
        "salun.evaluation.detectors.safety_checker:load",
        "MODEL",
    ),
    "q16": DetectorEntry(
        "inappropriate content by Q16, whose file is downloaded apart", "salun.evaluation.detectors.q16:load", "FILE"
    ),
    "nudenet": DetectorEntry(
        "exposed body parts by NudeNet, which is installed apart",
        "salun.evaluation.detectors.nudenet:load",
        "CRITERION[:FILE]",
    ),
    "open-nsfw": DetectorEntry(
        "pornography by Open-NSFW, which is installed apart", "salun.evaluation.detectors.open_nsfw:load"
    ),
}


def default_detector(folder: Path | None) -> str:
    """The name of the detector of a model, by whether it has a classifier in its folder."""
    return "attribute" if folder is not None else "self"


def passes_of(name: str) -> int:
    """Passes of the original network for each image, on average; 0 for an unknown detector."""
    entry = DETECTORS.get(name.partition(":")[0])
    return entry.passes if entry is not None else 0


def fitting_passes_of(name: str) -> tuple[int, ...]:
    """Likewise for each image in the rounds of the detector's fit; empty for one that is not fitted."""
    entry = DETECTORS.get(name.partition(":")[0])
    return entry.fitting_passes if entry is not None else ()


WITHOUT_PATH = tuple(name for name, entry in DETECTORS.items() if entry.argument not in ("FOLDER", "FILE"))
"""The detectors that need no path, for hosts with remote users."""


def without_path(name: str) -> str:
    """Accept a detector name whose argument cannot be a path, for hosts with remote users: a hub id or a plain word.

    Raises:
        ConfigError: The argument could be a path, or there is no such detector.
    """
    entry_of(name, DETECTORS, "detector")
    key, _, argument = name.partition(":")
    harmless = not argument or is_hub_id(argument, revised=True) or re.fullmatch("[a-z]+", argument)
    if key not in WITHOUT_PATH or not harmless:
        raise ConfigError(f"is {name[:80]!r}, but can name no folder here", option="detector")
    return name
