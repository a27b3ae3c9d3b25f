"""Images for ComfyUI: previews in its progress bar, and arrays and lines of text as IMAGE."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from salun.diffusion.losses import ErasureData
from salun.diffusion.plan import Plan
from salun.diffusion.result import blurred
from salun.report.image_grid import blurred as blurred_image

from .model import GraphModel

Preview = tuple[str, Any, int]
"""What ComfyUI's bar takes: (format, PIL image, largest side in pixels)."""


class TrainingPreview:
    """The network's current estimate of the first forget sample, from strong noise.

    Blurred where the run's images are.
    """

    def __init__(self, model: GraphModel, plan: Plan, data: ErasureData) -> None:
        self.model, self.data, self.blur = model, data, any(blurred(plan))
        self.noise = torch.randn(data.forget_latents[:1].shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self) -> Preview | None:
        previewer = _previewer(self.model)
        if previewer is None:
            return None
        model, x_0 = self.model, self.data.forget_latents[:1]
        t = torch.tensor([model.schedule.t_at(0.7)], device=x_0.device)
        x_t = model.schedule.add_noise(x_0, self.noise.to(x_0.device), t)
        x_0 = model.schedule.x_0(x_t, model.predict(x_t, t, self.data.forget[:1]), t)
        return _decoded(previewer, x_0, self.blur)


class SamplePreview:
    """The newest sample, if there is one. Blurred where the run's images are."""

    def __init__(self, model: GraphModel, plan: Plan) -> None:
        self.model, self.blur = model, any(blurred(plan))

    def __call__(self) -> Preview | None:
        latent = self.model.sampled
        previewer = _previewer(self.model) if latent is not None else None
        return _decoded(previewer, latent, self.blur) if latent is not None and previewer is not None else None


def _decoded(previewer: Any, latent: Tensor, blur: bool) -> Preview:
    image = previewer.decode_latent_to_preview(latent)
    return "JPEG", blurred_image(image) if blur else image, 512


def _previewer(model: GraphModel) -> Any:
    import latent_preview

    previewer = latent_preview.get_previewer(model.device, model.latent_format)
    factors = getattr(model.latent_format, "latent_rgb_factors", None)
    if previewer is None and factors is not None:  # previews are off for sampling, but training takes long
        bias = getattr(model.latent_format, "latent_rgb_factors_bias", None)
        previewer = latent_preview.Latent2RGBPreviewer(factors, bias)
    return previewer


def to_image(pixels: np.ndarray) -> Tensor:
    """uint8 pixels (h, w, 3) → ComfyUI's IMAGE, float (1, h, w, 3) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).float()[None] / 255


def text_image(text: str) -> Tensor:
    """A line of text as an IMAGE, where there is no image to show."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (max(64, 8 * len(text)), 40), (250, 250, 250))
    ImageDraw.Draw(sheet).text((8, 12), text, (40, 40, 46), ImageFont.load_default(size=12))
    return to_image(np.asarray(sheet))
