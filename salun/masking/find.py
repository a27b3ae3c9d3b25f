"""The mask that an option asks for: from saliency scores, or a control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from salun.masking.mask import Mask, entries
from salun.masking.threshold import select_largest
from salun.version import __version__

Scores = Callable[[], Iterable[Mapping[str, Tensor]]]
"""() → saliency scores by parameter, once for each group of forget samples whose masks are united."""


def find_mask(
    parameters: Mapping[str, nn.Parameter],
    mode: str,
    density: float,
    seed: int,
    scores: Scores,
    metadata: Mapping[str, str],
) -> tuple[Mask, dict[str, Any]]:
    """The mask of a run over the given parameters, and its summary for run.json.

    Args:
        mode: "saliency", "shuffled" (the saliency mask permuted), "random", "full", or "soft" (full, for SalUn-soft).
        density: Fraction of weights that each group selects.
        seed: Of the controls.
        scores: Called for "saliency" and "shuffled" alone.
        metadata: What the mask's file says besides mode, density and version.

    Returns:
        The mask, and {"mode", "density", "selected", "total", "warnings"}, for a saliency mask with its "threshold",
        "zeros" and "ties".

    Raises:
        MaskError: The density selects nothing.
    """
    summary: dict[str, Any] = {"warnings": []}
    if mode in ("full", "soft"):
        mask = Mask.full(parameters)
    elif mode == "random":
        mask = Mask.random(parameters, density, seed)
    else:
        mask, summary = _saliency_mask(parameters, density, scores())
        mask = mask.shuffled(seed) if mode == "shuffled" else mask
    described = {"method": mode, "density": str(density), **metadata, "salun_version": __version__}
    return Mask(mask.bits, mask.shapes, described), mask_summary(mask, mode, summary)


def mask_summary(mask: Mask, mode: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a mask."""
    return {"mode": mode, "density": mask.density, "selected": mask.selected, "total": mask.total, **details}


def _saliency_mask(
    parameters: Mapping[str, nn.Parameter], density: float, groups: Iterable[Mapping[str, Tensor]]
) -> tuple[Mask, dict[str, Any]]:
    """The union of the groups' masks, and the summary of their thresholds."""
    count = entries(sum(p.numel() for p in parameters.values()), density)
    mask, selections = None, []
    for scores in groups:
        selections.append(select_largest(scores, count))
        selected = Mask.from_selection(selections[-1], parameters)
        mask = selected if mask is None else mask | selected
    assert mask is not None
    return mask, {
        "threshold": min(selection.threshold for selection in selections),
        "zeros": max(selection.zeros for selection in selections),
        "ties": max(selection.ties for selection in selections),
        "warnings": list(dict.fromkeys(text for selection in selections for text in selection.warnings())),
    }
