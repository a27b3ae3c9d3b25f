"""The page's controls, made from the core's option dataclasses, and the options read back from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from salun.attacks import ATTACKS
from salun.detectors import WITHOUT_PATH
from salun.diffusion import attack_options, eval_options
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.options import GROUPS, OF_RECIPE, EraseJob, Recipe
from salun.errors import ConfigError
from salun.image_metrics import IMAGE_METRICS
from salun.options import MASKS

from .inputs import NAMES, offered
from .markup import named_only
from .messages import label

AUTO = "auto"
MAX_DIGITS = 30  # characters of a number
DETECTORS = (
    f"{', '.join(WITHOUT_PATH)}, or images:NAME for a folder in `pictures` of the data folder with the folders concept "
    "and other"
)
OF_REAL_IMAGES = ", ".join(name for name, entry in IMAGE_METRICS.items() if entry.argument)
PAGE_HELP = {  # options that take a path on the command line, but only a name here
    "components": "Single files: alias or hub id (owner/name) with the parts that the file lacks "
                  "(VAE, text encoder, configs).",
    "forget_images": "Folder of images of the concept, used instead of samples: a folder in `pictures` of the data "
                     "folder (several concepts: a subfolder for each).",
    "retain_images": "Folder of images to retain, used in addition to samples: a folder in `pictures` of the data "
                     "folder; x.txt is the prompt of x.png.",
    "detector": f"Decides whether images show the concept: {DETECTORS}.",
    "mask": f"{', '.join(MASKS)} (the last three are controls), or the mask of an earlier run or job (empty: the "
    "method's own).",
}  # fmt: skip
EVALUATION_HELP = {
    **PAGE_HELP,
    "against": "For a checkpoint: without it there are rates, but no verdict. A run knows its own.",
    "concept": "What a checkpoint should have forgotten; one per line. A run knows its own.",
    "anchor": "Of each concept of a checkpoint, in the same order; one per line (default: the preset's). A run knows "
              "its own.",
    "detector": f"{DETECTORS}; one per line (default: the classifier in the model's folder, else self: the original "
                "model as classifier).",
    "metric": f"Further metrics of the images: {', '.join(IMAGE_METRICS)}; one per line. {OF_REAL_IMAGES} compare the "
              "two models, or each with real images, as in fid:NAME for a folder in `pictures` of the data folder.",
    "clip": "Hub id (owner/name or owner/name@revision) of the CLIP model of detectors and metrics by CLIP (default: "
    "openai's ViT-L/14).",
    "prompts": "Further prompts: files in `prompts` of the data folder (.csv with the columns of I2P or COCO, or "
               ".txt).",
    "sets": "Further prompts made from the concept, for models of free text.",
    "keep_images": "Write every image, into `images` of the job's folder and of the run.",
}  # fmt: skip
ATTACK_HELP = {
    **EVALUATION_HELP,
    "against": "For a checkpoint: images of the concept come from it. A run knows its own.",
    "attack": f"{', '.join(name for name, of in ATTACKS['diffusion'].items() if of.default)}, with numbers as in "
              "inversion+steps=400, or prompts:NAME for a file in `prompts` of the data folder or for the prompts that "
              "attacks on a run made; one per line (default: all of them).",
    "detector": f"Decides about success: {DETECTORS} (default: the run's, else the classifier in the model's folder, "
                "else self: the original model as classifier).",
}  # fmt: skip


@dataclass(frozen=True)
class Controls:
    """The controls of an option dataclass.

    Args:
        kind: The dataclass.
        groups: Title → options, in the order in which to show them.
        main: Options that are always in view; the others are folded.
        prefix: Beginning of the elements' ids.
        help: Option → its help, where that of the command line does not fit.
    """

    kind: Any
    groups: Mapping[str, tuple[str, ...]]
    main: tuple[str, ...]
    prefix: str
    help: Mapping[str, str]

    @cached_property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """Option → its field, of all options that have a control."""
        names = offered(self.kind)
        return {item.name: item for item in dataclasses.fields(self.kind) if item.name in names}

    @cached_property
    def folded(self) -> dict[str, tuple[str, ...]]:
        """Title → options, without those in view."""
        return {
            title: tuple(name for name in names if name in self.fields and name not in self.main)
            for title, names in self.groups.items()
        }

    def help_of(self, name: str) -> str:
        """An option's help: that of the command line, except for options that take a path there."""
        of_recipe = {field.name for field in dataclasses.fields(Recipe)}
        shown = self.help.get(name) or str(self.fields[name].metadata["help"]).replace("repeatable", "one per line")
        plain = name in of_recipe and not self.fields[name].metadata["auto"]
        return shown + (f" (auto: {OF_RECIPE})" if plain else "")

    def default_of(self, name: str) -> Any:
        """The default of an option as its control shows it."""
        item = self.fields[name]
        return self.shown_of(name, item.default if item.default is not dataclasses.MISSING else [])

    def shown_of(self, name: str, value: Any) -> Any:
        """What the control of an option shows for a value."""
        if value is None:
            return AUTO if self.fields[name].metadata["choices"] else ""
        if isinstance(value, list):
            return "\n".join(map(str, value))
        return value if isinstance(value, bool | str) else _text(value)

    def is_automatic(self, name: str) -> bool:
        """Whether the control of an option is a text that is empty by default: for auto, or for several lines."""
        item = self.fields[name]
        is_text = str(item.type) != "bool" and not item.metadata["choices"] and name not in NAMES
        return is_text and not str(item.type).startswith("list") and item.default is None

    def placeholder(self, name: str, automatic: Mapping[str, Any]) -> str:
        """What an empty control shows. automatic: option → the number that auto is."""
        return f"{AUTO}: {self.shown_of(name, automatic[name])}" if name in automatic else AUTO

    def control(
        self, gr: Any, name: str, listed: Mapping[str, Sequence[str]], automatic: Mapping[str, Any] | None = None
    ) -> Any:
        """The gradio component of an option, at its default.

        Args:
            listed: Option → the names to choose from. automatic: option → the number that auto is.
        """
        item, value = self.fields[name], self.default_of(name)
        shown = {"label": label(name), "info": self.help_of(name), "elem_id": f"{self.prefix}{name}"}
        several = str(item.type).startswith("list")
        if str(item.type) == "bool":
            return gr.Checkbox(value=value, **shown)
        if name in listed:
            choices = list(listed[name])
            if several:
                return gr.Dropdown(choices=choices, value=[], multiselect=True, **shown)
            return gr.Dropdown(choices=choices, value=value, **named_only(gr), **shown)
        if item.metadata["choices"]:
            choices = list(item.metadata["choices"])
            choices = choices if item.default in choices else [AUTO, *choices]
            return gr.Dropdown(choices=choices, value=value, **named_only(gr), **shown)
        if several:
            return gr.Textbox(value=value, lines=2, placeholder="one per line", **shown)
        return gr.Textbox(value=value, max_lines=1, placeholder=self.placeholder(name, automatic or {}), **shown)

    def in_pairs(
        self,
        gr: Any,
        names: Sequence[str],
        listed: Mapping[str, Sequence[str]],
        automatic: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The controls of several options, two in a row. listed, automatic: as in `control`."""
        made = {}
        for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
            with gr.Row():
                made.update({name: self.control(gr, name, listed, automatic) for name in pair})
        return made

    def value_of(self, name: str, shown: Any) -> Any:
        """An option's value from what its control holds; None for auto. Raises ConfigError for an invalid number."""
        kind = str(self.fields[name].type)
        if kind == "bool":
            return bool(shown)
        if isinstance(shown, list):
            return [str(each) for each in shown]
        text = str(shown if shown is not None else "").strip()
        if kind.startswith("list"):
            return [line.strip() for line in text.splitlines() if line.strip()]
        if text in ("", AUTO) and ("None" in kind or text == ""):
            return None
        if len(text) > MAX_DIGITS and kind.startswith(("int", "float")):
            raise ConfigError(f"has {len(text)} digits; the limit is {MAX_DIGITS}", option=name)
        try:
            if kind.startswith("int"):
                return int(text)
            return float(text) if kind.startswith("float") else text
        except ValueError:
            raise ConfigError(f"is {text[:40]!r}, but must be a number", option=name) from None


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


ERASURE = Controls(EraseJob, GROUPS, ("model", "concept", "anchor", "retain_prompts"), "salun_", PAGE_HELP)
EVALUATION = Controls(
    EvalOptions,
    eval_options.GROUPS,
    ("against", "concept", "anchor", "detector", "n"),
    "salun_eval_",
    EVALUATION_HELP,
)
ATTACK = Controls(
    AttackOptions,
    attack_options.GROUPS,
    ("against", "concept", "anchor", "attack", "n", "budget"),
    "salun_attack_",
    ATTACK_HELP,
)
