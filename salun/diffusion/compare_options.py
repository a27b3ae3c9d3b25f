"""The options of a comparison of methods, and its variants. Nothing heavy is imported: help is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from salun.diffusion.attack_options import attack_of
from salun.diffusion.options import GROUPS as ERASE_GROUPS
from salun.diffusion.options import EraseJob, EraseOptions, ModelOptions
from salun.errors import ConfigError
from salun.methods import METHODS
from salun.options import from_mapping, option
from salun.untrusted import parse_yaml

BUDGETS = ("equal-steps", "paper", "tuned")
EQUAL = (  # options that no variant may set: what is evaluated, and how
    "anchor", "seed", "eval_images", "detector", "prompt_style", "negative_prompt", "clip_skip", "resolution",
    "sampling_steps", "sampling_guidance", "sampler", *(item.name for item in fields(ModelOptions)),
)  # fmt: skip
NOT_COMPARED = ("method", "mask", "scope", "until", "recipe", "output", "keep_ema")


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method, and its own values of options.

    Args:
        name: As it is written.
        options: Name → value, `method` among them.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The name of its method."""
        return str(self.options["method"])


@dataclass(frozen=True)
class CompareOptions(EraseJob):
    """The options of `salun compare`; those in NOT_COMPARED are set by each variant."""

    methods: list[str] = option(
        [],
        "Method to compare, the first with each of the others: METHOD, or METHOD+OPTION=VALUE+… such as "
        "esd+mask=saliency or salun+density=0.1; repeatable",
        auto="every method that the model can take",
    )
    seeds: int = option(3, "Number of seeds, counted from seed", minimum=1, maximum=1000)
    budget: str = option(
        "equal-steps",
        "What the training of each method may spend: as many passes through the network as SalUn's steps take; its "
        "paper's numbers, where there are any; or the former with a search of its learning rate (of closed forms, a "
        "weight) on training prompts. Samples and saliency are not counted",
        choices=BUDGETS,
    )

    attack: list[str] = option(
        [],
        "Attack that is made on each erased model, as in `salun attack`; repeatable. The table shows the one that "
        "brings the concept back most often",
        auto="none",
    )
    attacked: int = option(32, "Prompts of each concept that are attacked", minimum=2, maximum=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.attack:
            attack_of(name)
        for item in fields(self):
            if item.name in NOT_COMPARED and getattr(self, item.name) not in (item.default, []):
                raise ConfigError(
                    "cannot be set for all methods of a comparison", option=item.name, advice="Use {methods} instead"
                )
        if self.anchor and len(self.anchor) != len(self.concept):
            raise ConfigError("needs one anchor for each concept", option="anchor")

    @property
    def variants(self) -> list[Variant]:
        """The rows of the table, in order. Raises ConfigError for one that is not valid, or repeated."""
        variants = [variant_of(text) for text in self.methods or METHODS["diffusion"]]
        names = [variant.name for variant in variants]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"has {twice} twice", option="methods")
        return variants


def variant_of(text: str) -> Variant:
    """METHOD, or METHOD+OPTION=VALUE+…. Raises ConfigError for anything else."""
    method, *parts = text.strip().split("+")
    if method not in METHODS["diffusion"]:
        known = ", ".join(METHODS["diffusion"])
        raise ConfigError(f"has {text[:60]!r}, which begins with none of {known}", option="methods")
    values: dict[str, Any] = {"method": method}
    for part in parts:
        name, equals, value = part.partition("=")
        try:
            values[name.strip().replace("-", "_")] = parse_yaml(value) if equals else None
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"has {part[:60]!r}, but must have OPTION=VALUE", option="methods")
    if differing := [name for name in values if name in EQUAL]:
        raise ConfigError(
            f"has {text[:60]!r}, but {differing[0]} must be equal for all methods",
            option="methods",
            advice=f"Use {{{differing[0]}}} for the comparison instead",
        )
    from_mapping(EraseOptions, values, f"methods {text[:60]}")
    return Variant(text.strip(), values)


GROUPS = {"Comparison": ("methods", "seeds", "budget", "attack", "attacked"), **ERASE_GROUPS}
