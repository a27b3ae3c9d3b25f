"""salun: make a Stable Diffusion model, or an image classifier, forget something.

    import salun
    model = salun.load("shapes")
    run = salun.erase(model, salun.Concept("circle", anchor="square"), seed=0)
    run.save("erased.safetensors")

Names are imported when first used, so that `import salun` is quick and needs no diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from salun.version import __version__ as __version__

if TYPE_CHECKING:
    from salun.delta.delta import Delta
    from salun.diffusion.erase import erase
    from salun.diffusion.model.loading import load
    from salun.diffusion.options import EraseOptions
    from salun.diffusion.prompts.concepts import Concept
    from salun.diffusion.result import Run
    from salun.errors import Cancelled, SalunError
    from salun.masking.mask import Mask
    from salun.masking.saliency import saliency_mask
    from salun.progress import Event, Progress, silent

__all__ = [
    "Cancelled",
    "Concept",
    "Delta",
    "EraseOptions",
    "Event",
    "Mask",
    "Progress",
    "Run",
    "SalunError",
    "erase",
    "load",
    "saliency_mask",
    "silent",
]

_HOMES = {
    "Cancelled": "salun.errors",
    "Concept": "salun.diffusion.prompts.concepts",
    "Delta": "salun.delta.delta",
    "EraseOptions": "salun.diffusion.options",
    "Event": "salun.progress",
    "Mask": "salun.masking.mask",
    "Progress": "salun.progress",
    "Run": "salun.diffusion.result",
    "SalunError": "salun.errors",
    "erase": "salun.diffusion.erase",
    "load": "salun.diffusion.model.loading",
    "saliency_mask": "salun.masking.saliency",
    "silent": "salun.progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'salun' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
