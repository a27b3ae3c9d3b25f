"""Models distilled to a few steps (Turbo, Lightning, LCM …): known by their names, and what to sample them with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class FewSteps:
    """A sign that a model is meant for few steps.

    kind: how it was distilled. sign: the text that says so, and source: where it stands. sampling_steps,
    sampling_guidance, sampler: options that suit it.
    """

    kind: str
    sign: str
    source: str
    sampling_steps: int
    sampling_guidance: float
    sampler: str

    def line(self, prefix: str = "sampling_", spell: Callable[[str], str] = str) -> str:
        """The hint in one line. prefix: of the options for steps and guidance. spell: how the host spells options."""
        steps, guidance = spell(f"{prefix}steps"), spell(f"{prefix}guidance")
        options = (
            f"{steps} {self.sampling_steps} {guidance} {self.sampling_guidance:g} {spell('sampler')} {self.sampler}"
        )
        return (
            f"{self.source} contains {self.sign!r}: few-step models give overexposed images at the usual steps and "
            f"guidance. If this is one, use {options}"
        )

    @property
    def text(self) -> str:
        """The hint for an erasure."""
        return self.line()

    def as_data(self) -> dict[str, Any]:
        """For programs: every field, and the line."""
        return {**asdict(self), "text": self.text}


KINDS: dict[str, tuple[int, str]] = {  # kind → steps and sampler of its authors' examples; all are made for guidance 1
    "Turbo": (4, "euler_a"),  # ADD, Sauer et al. 2023
    "Lightning": (4, "euler"),  # SDXL-Lightning, Lin et al. 2024
    "LCM": (4, "lcm"),  # Luo et al. 2023
    "Hyper": (8, "ddim"),  # Hyper-SD, Ren et al. 2024
    "DMD2": (4, "lcm"),  # Yin et al. 2024
    "TCD": (8, "ddim"),  # Zheng et al. 2024; without its noise it steps as DDIM
    "few steps": (4, "euler"),
}
UNMISTAKABLE = {"turbo": "Turbo", "lightning": "Lightning"}  # also within a longer word
NAMES = {"lcm": "LCM", "hyper": "Hyper", "hypersdxl": "Hyper", "dmd": "DMD2", "tcd": "TCD"}
METADATA = ("modelspec.title", "modelspec.description", "ss_output_name", "sd_merge_recipe", "sd_merge_models")
SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])(?![ _-]?\d)", re.IGNORECASE)
_LONGEST = 20_000  # characters of metadata that are looked at; a merge recipe lists its models first
_MOST_STEPS = 12


def find_few_steps(
    names: Mapping[str, str], metadata: Mapping[str, str], scheduler: Mapping[str, Any]
) -> FewSteps | None:
    """The first sign that a model is for few steps: in its names, its file's metadata or its scheduler config.

    names: source, as messages name it → name.
    """
    texts = [*names.items(), *((f"the metadata {key}", metadata[key]) for key in METADATA if key in metadata)]
    for source, text in texts:
        text = text[:_LONGEST]
        steps = next((int(n) for n in _STEPS.findall(text) if 1 <= int(n) <= _MOST_STEPS), None)
        for kind, sign in _kinds(text):
            return _suggested(kind, sign, source, steps)
        if steps is not None:
            return _suggested("few steps", f"{steps} steps", source, steps)
    kind, sign = _of_scheduler(scheduler)
    return _suggested(kind, sign, "the scheduler", None) if kind else None


def _suggested(kind: str, sign: str, source: str, steps: int | None) -> FewSteps:
    usual, sampler = KINDS[kind]
    return FewSteps(kind, sign, source, steps or usual, 1.0, sampler)


def _kinds(text: str) -> Iterator[tuple[str, str]]:
    """(kind, sign) of each few-step name in a text. Capitals separate names, as in `RealVisLightning`."""
    tokens = [word.lower() for word in _WORD.findall(text)]
    for word, next_token in zip(tokens, [*tokens[1:], ""], strict=True):
        for part, kind in UNMISTAKABLE.items():
            if part in word:
                yield kind, part
        if word in NAMES and not next_token.startswith("real"):  # "hyper realistic" does not name Hyper-SD
            yield NAMES[word], word


def _of_scheduler(config: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, class name) of a few-step scheduler, else empty.

    Turbo's scheduler is Euler with trailing timesteps. Models whose schedule ends in pure noise (rescaled betas) use
    trailing timesteps too, but are not few-step models.
    """
    name = str(config.get("_class_name"))
    if name in SCHEDULERS:
        return SCHEDULERS[name], name
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    if trailing and name.startswith("Euler") and config.get("prediction_type", "epsilon") == "epsilon":
        return "few steps", f"{name}, trailing"
    return "", ""


def hint(
    sign: FewSteps | None, sampling: Sampling, steps: int | None, guidance: float | None, sampler: str | None
) -> FewSteps | None:
    """The hint, unless one of the three options is given, or the model's sampling settings use no guidance."""
    return sign if sampling.guided and steps is None and guidance is None and sampler is None else None
