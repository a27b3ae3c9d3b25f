"""Which MODELs can be erased: their family and prediction type, from ComfyUI's own configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.families.family import Family
from salun.checkpoints.families.registry import FAMILIES
from salun.errors import ModelError

PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}  # by ComfyUI's class
SUPPORTED = "salun supports SD 1.x, SD 2.x and SDXL"


def family_of(model: Any) -> Family:
    """The family of a MODEL. Raises ModelError for any other MODEL, with its type."""
    inner = model.model
    described = f"this MODEL is {type(inner).__name__} ({type(getattr(inner, 'model_config', None)).__name__})"
    config = getattr(getattr(inner, "model_config", None), "unet_config", {})
    family = next((f for f in FAMILIES.values() if f.context_width == config.get("context_dim")), None)
    if type(inner.diffusion_model).__name__ != "UNetModel" or family is None or config.get("in_channels") != 4:
        raise ModelError(f"{described}; {SUPPORTED}, without inpainting models")
    if (config.get("adm_in_channels") or 0) != family.label_width:
        raise ModelError(f"{described}; {SUPPORTED}, without refiner and unCLIP models")
    return family


def prediction_of(schedule: Any) -> str:
    """epsilon or v_prediction. Raises ModelError for a MODEL that predicts something else, with its sampling type.

    Args:
        schedule: The MODEL's `model_sampling`.
    """
    kinds = [kind.__name__ for kind in type(schedule).__mro__]
    first = next((kind for kind in kinds if kind in ("EDM", "X0", "LCM", *PREDICTIONS)), "")
    discrete = "ModelSamplingDiscrete" in kinds and "ModelSamplingDiscreteEDM" not in kinds
    if first not in PREDICTIONS or not discrete:
        raise ModelError(f"this MODEL samples as {', '.join(kinds[:3])}; salun supports epsilon and v-prediction")
    return PREDICTIONS[first]


def schedule_keys(model: Any) -> dict[str, Tensor]:
    """Empty tensors whose names mark v-prediction and zero terminal SNR for loaders of a checkpoint.

    Nothing in an SDXL's weights says either. An epsilon model needs none.
    """
    schedule = model.get_model_object("model_sampling")
    if prediction_of(schedule) != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if getattr(schedule, "zsnr", False) else ["v_pred"]
    return {name: torch.empty(0) for name in names}
