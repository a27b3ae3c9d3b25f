"""The options of an evaluation and of attacks as inputs of nodes; files have the names of ComfyUI's lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from salun.attacks import ATTACKS
from salun.detectors import without_path
from salun.diffusion import attack_options, eval_options
from salun.diffusion.attack_options import AttackOptions, with_prompts_only
from salun.diffusion.eval_options import ComparedOptions, EvalOptions
from salun.diffusion.options import EraseOptions
from salun.diffusion.prompts.prompt_file import LINES, TABLES
from salun.errors import ConfigError
from salun.image_metrics import IMAGE_METRICS
from salun.options import entry_of
from salun.user_text import is_data_set_id, is_hub_id

from .families import family_of
from .inputs import DETECTORS, explicit, option_input, wires
from .paths import SAFETENSORS, file_state, input_folder, saved_path
from .types import OptionValues

WIRED = ("concept", "against")  # the inputs concept and before
OTHERWISE = (*(item.name for item in dataclasses.fields(EraseOptions)), *WIRED)  # SalUn Options, or the graph
PROMPTS = (*TABLES, LINES)  # endings of files
INPUTS = {"clip": "clip_model"}  # option → its input, where a wire has its name
WITHOUT_TOKENS = [name for name, of in ATTACKS["diffusion"].items() if of.default and not of.tokens]
"""The attacks that run when none is named: a CLIP does not show its tokens."""
Looked = TypeVar("Looked", bound=ComparedOptions)


@dataclass(frozen=True)
class LookInputs(Generic[Looked]):
    """An option dataclass as inputs of a node.

    Args:
        kind: The dataclass.
        groups: Title → options, in the order in which to show them.
        main: Options that are always in view.
        tooltips: Option → its tooltip, where the command line takes a path.
        looked_up: Option → what turns a text of it into what the core takes, or raises ConfigError.
    """

    kind: type[Looked]
    groups: Mapping[str, tuple[str, ...]]
    main: tuple[str, ...]
    tooltips: Mapping[str, str]
    looked_up: Mapping[str, Callable[[str], str]]

    def entries(self, main: bool) -> dict[str, Any]:
        """INPUT_TYPES entries of the options in view, or else of the others."""
        names = [name for names in self.groups.values() for name in names]
        shown = [n for n in names if (n in self.main) == main and (n in self.main or n not in OTHERWISE)]
        return {INPUTS.get(name, name): self._input(name, {} if main else {"advanced": True}) for name in shown}

    def input_types(self) -> dict[str, Any]:
        """INPUT_TYPES of a node that looks at the original and the erased MODEL."""
        models = {
            "before": ("MODEL", {"tooltip": "Original model."}),
            "after": ("MODEL", {"tooltip": "Erased model."}),
        }
        return {
            "required": {**models, **wires("clip", "vae", "concept"), **self.entries(main=True)},
            "optional": {**wires("options"), **self.entries(main=False)},
        }

    def _input(self, name: str, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        what, settings = option_input(name, self.kind)
        return what, {**settings, "tooltip": self.tooltips.get(name, settings["tooltip"]), **more}

    def options(self, values: OptionValues) -> tuple[Looked, dict[str, str]]:
        """The core's options from the node's inputs, and of what was looked up the names as they were given.

        Raises:
            ConfigError: An option is invalid, or names a file that ComfyUI does not list.
        """
        option_of = {shown: option for option, shown in INPUTS.items()}
        given = explicit({option_of.get(name, name): value for name, value in values.items()}, self.kind)
        named: dict[str, str] = {}
        for name, look_up in self.looked_up.items():
            if isinstance(texts := given.get(name), list):
                given[name] = [look_up(text) for text in texts]
                named.update(zip(given[name], texts, strict=True))
            elif texts is not None:
                given[name] = look_up(texts)
        return self.kind(**given), named


def _detector(name: str) -> str:
    key, _, folder = name.partition(":")
    return f"images:{input_folder(folder, 'detector')}" if key == "images" else without_path(name)


def _metric(name: str) -> str:
    _, folder = entry_of(name, IMAGE_METRICS, "metric")
    return f"{name.partition(':')[0]}:{input_folder(folder, 'metric')}" if folder else name


def _prompts(name: str) -> str:
    return name if is_data_set_id(name) else str(saved_path(name, PROMPTS))


def _clip(name: str) -> str:
    if not is_hub_id(name, revised=True):
        raise ConfigError(
            f"is {name[:80]!r}, but must be a hub id (owner/name or owner/name@revision)", option=INPUTS["clip"]
        )
    return name


def _attack(text: str) -> str:
    return with_prompts_only(text, lambda name: saved_path(name, (*PROMPTS, SAFETENSORS)))


CLIP = "Hub id (owner/name or owner/name@revision) of the CLIP model of detectors{} by CLIP. auto: openai's ViT-L/14."
EVALUATION = LookInputs(
    EvalOptions,
    eval_options.GROUPS,
    ("detector", "n", "seed"),
    {
        "detector": f"Detectors that decide whether images show the concept, one per line: {DETECTORS}, or "
        "images:NAME for a folder in input with the folders concept and other. auto: that of SalUn Options.",
        "metric": f"Further metrics of the images, one per line: {', '.join(IMAGE_METRICS)}; fid, kid and cmmd "
        "compare the two models, or each with real images, as in fid:NAME for a folder in input.",
        "clip": CLIP.format(" and metrics"),
        "prompts": "Further prompts, one file per line: in input or output/salun (.csv with the columns of I2P or "
        "COCO, or .txt), or hub id of a data set, with a revision or a split as in owner/name@revision:split.",
        "keep_images": "Write every image too, into the folder in output/salun.",
    },
    {"detector": _detector, "metric": _metric, "prompts": _prompts, "clip": _clip},
)
ATTACK = LookInputs(
    AttackOptions,
    attack_options.GROUPS,
    ("attack", "budget", "n", "control", "seed"),
    {
        "attack": f"Attacks, one per line: {', '.join(WITHOUT_TOKENS)}, with numbers as in relearn+steps=50, or "
        "prompts:NAME for a file in input or output/salun. auto: all of them but files. Those that learn tokens need "
        "the command line.",
        "clip": CLIP.format(""),
    },
    {"attack": _attack, "clip": _clip},
)


def prompts_state(prompts: str) -> str:
    """A text that changes with the files of prompts, for ComfyUI's cache."""
    names = [line.strip() for line in prompts.splitlines()]
    return "\n".join(file_state(name, PROMPTS) for name in names if name and not is_data_set_id(name))


def check_families(before: Any, after: Any) -> None:
    """Raises ConfigError for two MODELs of different families."""
    families = family_of(before).name, family_of(after).name
    if families[0] != families[1]:
        raise ConfigError(f"before is a MODEL of the family {families[0]}, but after is of {families[1]}")
