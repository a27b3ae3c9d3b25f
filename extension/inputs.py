"""Options of a form or request as the core takes them: names of masks, images and prompts confined to their folders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from salun.detectors import without_path
from salun.diffusion.attack_options import AttackOptions, with_prompts_only
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.options import EraseJob
from salun.diffusion.prompts.prompt_file import LINES, TABLES
from salun.errors import ConfigError
from salun.image_metrics import IMAGE_METRICS
from salun.options import MASKS, entry_of, from_mapping
from salun.user_text import is_data_set_id, is_hub_id, unquoted

from .limits import check_lengths
from .paths import confined, confined_file, displayable, safe_name
from .runs import Runs

NOT_OFFERED = ("models_dir", "output", "run_dir", "allow_pickle")  # a form can name no file to read or write
IMAGE_FOLDERS = ("forget_images", "retain_images")
TITLES = ("model", "against")  # options that `Models` looks up
ADVERSARIAL = "adversarial.safetensors"  # in a run folder: what its attacks made
NAMES = (*IMAGE_FOLDERS, "mask", "prompts", "components", "clip", "attack")  # of paths, replaced by `Inputs.check`


def offered(kind: Any) -> tuple[str, ...]:
    """Names of the options of a dataclass that can be set here: of those with a path, the ones that are looked up."""
    looked_up = (*TITLES, *NAMES)
    return tuple(
        item.name
        for item in dataclasses.fields(kind)
        if item.name not in NOT_OFFERED and (item.name in looked_up or not item.metadata["path"])
    )


ERASE_FIELDS, EVAL_FIELDS, ATTACK_FIELDS = offered(EraseJob), offered(EvalOptions), offered(AttackOptions)


class Inputs:
    """The inputs that are given by name: masks, folders of the user's images, and files of prompts."""

    def __init__(self, data: Path, runs: Runs) -> None:
        self.runs = runs
        self.images, self.masks, self.prompts = data / "pictures", data / "masks", data / "prompts"
        for folder in (self.images, self.masks, self.prompts):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self, options: Mapping[str, Any], kind: Any = EraseJob) -> dict[str, Any]:
        """The given options of a dataclass, with names replaced by paths, but for TITLES. The dataclass checks types.

        Raises ConfigError for a name that leads out of its folder, and for an option that cannot be set here.
        """
        allowed = offered(kind)
        unknown = [key for key in options if key not in allowed]
        if unknown:
            raise ConfigError(f"{', '.join(map(repr, unknown))[:200]} cannot be set here")
        check_lengths(options)
        values = {key: value for key, value in options.items() if value is not None}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"is {value}, but must be a finite number", option=key)
        return {key: _each(value, self._lookup(key), key) for key, value in values.items()}

    def _lookup(self, option: str) -> Callable[[str], str] | None:
        """What turns a text of an option into what the core takes; None for one that the core takes as it is."""
        looked_up: dict[str, Callable[[str], str]] = {
            **dict.fromkeys(IMAGE_FOLDERS, lambda name: str(confined(name, self.images))),
            "mask": self.mask,
            "prompts": self.prompt_file,
            "components": _components,
            "clip": _clip,
            "detector": self.detector,
            "metric": self.metric,
            "attack": self.attack,
        }
        return looked_up.get(option)

    def detector(self, name: str) -> str:
        """A detector with its argument, where that is a folder of images, a hub id or a plain word."""
        if name.startswith("images:"):
            return f"images:{confined(name.partition(':')[2], self.images)}"
        return without_path(name)

    def metric(self, name: str) -> str:
        """A metric of images with its argument, which is a folder of images."""
        _, folder = entry_of(name, IMAGE_METRICS, "metric")
        return f"{name.partition(':')[0]}:{confined(folder, self.images)}" if folder else name

    def prompt_file(self, name: str) -> str:
        """A file of prompts, or the hub id of a data set."""
        return name if is_data_set_id(name) else str(confined_file(name, self.prompts))

    def attack(self, text: str) -> str:
        """An attack with its numbers. What may follow its name is a file of prompts, or a run whose attacks made some.

        Raises ConfigError for any other argument.
        """
        return with_prompts_only(text, self._adversarial)

    def _adversarial(self, name: str) -> Path:
        in_run = self.runs.has(name)
        return confined_file(ADVERSARIAL, self.runs.get(name)) if in_run else confined_file(name, self.prompts)

    def prompt_files(self) -> list[str]:
        """Names of the files of prompts; links that lead out are skipped."""
        return self._names(self.prompts, lambda place: place.suffix.lower() in (*TABLES, LINES) and place.is_file())

    def image_folders(self) -> list[str]:
        """Names of the folders of the user's images; links that lead out are skipped."""
        return self._names(self.images, Path.is_dir)

    def _names(self, folder: Path, fits: Callable[[Path], bool]) -> list[str]:
        return sorted(place.name for place in folder.iterdir() if fits(place) and _is_inside(place))

    def mask_names(self) -> list[str]:
        """Names of masks that can be chosen besides the controls."""
        made = sorted(p.stem for p in self.masks.glob("*.safetensors"))
        of_runs = sorted((p.parent.name for p in self.runs.folder.glob("*/mask.safetensors")), reverse=True)
        return list(filter(displayable, made + of_runs))

    def mask(self, name: str) -> str:
        """The file of a mask, or the name of a control."""
        if name in MASKS:
            return name
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
        if options.get("mask") not in (None, *MASKS):
            file = Path(str(options.get("mask")))  # named as `mask_names` does
            of_a_run = file.parent.parent.resolve() == self.runs.folder.resolve()
            options["mask"] = file.parent.name if of_a_run else file.stem
        return options


def _each(value: Any, look_up: Callable[[str], str] | None, option: str) -> Any:
    """A text, or each text of a list, looked up. Raises ConfigError for another value."""
    if look_up is None:
        return value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"is {repr(value)[:80]}, but must be a text", option=option)
    made = [look_up(unquoted(text)) for text in texts]
    return made if isinstance(value, list) else made[0]


def _is_inside(place: Path) -> bool:
    """Whether a file or folder can be named here."""
    try:
        return bool(confined(place.name, place.parent))
    except ConfigError:
        return False


def _components(name: str) -> str:
    """Raises ConfigError unless it is an alias or a hub id: a form cannot name folders of this machine."""
    from salun.checkpoints.locate import aliases

    if name in aliases()["models"] or is_hub_id(name):
        return name
    raise ConfigError(f"is {name[:80]!r}, but must be an alias or a hub id (owner/name)", option="components")


def _clip(name: str) -> str:
    """Raises ConfigError unless it is a hub id, as `_components` does."""
    if is_hub_id(name, revised=True):
        return name
    raise ConfigError(f"is {name[:80]!r}, but must be a hub id (owner/name or owner/name@revision)", option="clip")
