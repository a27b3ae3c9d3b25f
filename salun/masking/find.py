"""The mask that an option asks for: from saliency scores, or a control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from salun.masking.mask import Mask, entries, entries_each
from salun.masking.threshold import Selection, select_largest, select_largest_each
from salun.version import __version__

Scores = Callable[[], Iterable[Mapping[str, Tensor]]]
"""() → saliency scores, or their ratios, by parameter, once for each group of forget samples whose masks are united."""


@dataclass(frozen=True)
class RunMask:
    """The mask of a run, and how it was made.

    Args:
        mode: "saliency", "saliency-ratio" (relative to the saliency of the retain set), "saliency-by-layer" (density in
            each parameter), "shuffled" (the saliency mask permuted), "random", "full", "soft" (full at first, learned
            while training) or "file".
        threshold: The smallest score selected.
        zeros, ties: Fractions of scores that are 0, and that equal the threshold.
    """

    mask: Mask
    mode: str
    threshold: float | None = None
    zeros: float | None = None
    ties: float | None = None
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What `run.json` holds of the mask."""
        numbers = {"threshold": self.threshold, "zeros": self.zeros, "ties": self.ties}
        counts = {"density": self.mask.density, "selected": self.mask.selected, "total": self.mask.total}
        known = {name: value for name, value in numbers.items() if value is not None}
        return {"mode": self.mode, **counts, **known, "warnings": list(self.warnings)}


def find_mask(
    parameters: Mapping[str, nn.Parameter],
    mode: str,
    density: float,
    seed: int,
    scores: Scores,
    metadata: Mapping[str, str],
) -> RunMask:
    """The mask of a run over the given parameters.

    Args:
        mode: See `RunMask`; not "file".
        density: Fraction of weights that each group selects.
        seed: Of the controls.
        scores: Called for `BY_GRADIENT` alone.
        metadata: What the mask's file says besides mode, density and version.

    Raises:
        MaskError: The density selects nothing.
    """
    thresholds: dict[str, Any] = {}
    if mode in ("full", "soft"):
        mask = Mask.full(parameters)
    elif mode == "random":
        mask = Mask.random(parameters, density, seed)
    else:
        mask, thresholds = _saliency_mask(parameters, density, scores(), mode == "saliency-by-layer")
        mask = mask.shuffled(seed) if mode == "shuffled" else mask
    described = {"method": mode, "density": str(density), **metadata, "salun_version": __version__}
    return RunMask(Mask(mask.bits, mask.shapes, described), mode, **thresholds)


def _saliency_mask(
    parameters: Mapping[str, nn.Parameter], density: float, groups: Iterable[Mapping[str, Tensor]], by_layer: bool
) -> tuple[Mask, dict[str, Any]]:
    """The union of the groups' masks, and how their thresholds lie. by_layer: Density applies to each parameter."""
    sizes = {name: p.numel() for name, p in parameters.items()}

    def select(scores: Mapping[str, Tensor]) -> Selection:
        if by_layer:
            return select_largest_each(scores, entries_each(sizes, density))
        return select_largest(scores, entries(sum(sizes.values()), density))

    mask, selections = None, []
    for scores in groups:
        selections.append(select(scores))
        selected = Mask.from_selection(selections[-1], parameters)
        mask = selected if mask is None else mask | selected
    assert mask is not None
    return mask, {
        "threshold": min(selection.threshold for selection in selections),
        "zeros": max(selection.zeros for selection in selections),
        "ties": max(selection.ties for selection in selections),
        "warnings": tuple(dict.fromkeys(text for selection in selections for text in selection.warnings())),
    }
