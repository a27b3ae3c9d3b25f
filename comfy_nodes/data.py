"""SalUn Training Data: what an erasure looks at, sampled from the model or made of the user's own pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from salun.diffusion.context import prepared
from salun.diffusion.data.images import square
from salun.diffusion.data.training_set import UserLatents, sample_data
from salun.errors import ConfigError, DataError
from salun.user_text import prompt_text

from .inputs import inputs, options_of, wires
from .kinds import DATA, Chosen, Concepts, Data, Node, moved
from .model import GraphModel, as_started
from .places import cache
from .progress import ComfyProgress
from .work import Sampled, computes, plan_of, samples_drawn, text_of


class SalUnTrainingData(Node):
    """Latents and prompts to forget, to become and to keep."""

    RETURN_TYPES, RETURN_NAMES = (DATA,), ("data",)
    OUTPUT_TOOLTIPS = ("For SalUn Saliency Mask and SalUn Erase: several of them can share it.",)
    DESCRIPTION = (
        "What an erasure looks at. Without pictures everything is sampled from the model itself, and kept on disk. "
        "Pictures of the concept take the place of forget samples; pictures to keep are added to the retain samples."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that will be erased; its samples are the training data."}),
                **wires("clip", "concept"),
                **inputs("seed"),
            },
            "optional": {
                **wires("options"),
                "vae": ("VAE", {"tooltip": "Needed for IMAGE inputs only."}),
                "forget_images": ("IMAGE", {"tooltip": "Pictures of the concept, in place of samples (one concept)."}),
                "forget_samples": ("LATENT", {"tooltip": "Latents of the concept, in place of samples (one concept)."}),
                "retain_images": ("IMAGE", {"tooltip": "Pictures to keep, added to the samples."}),
                "retain_samples": ("LATENT", {"tooltip": "Latents to keep, added to the samples."}),
                "retain_captions": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "What the pictures to keep show; one line a picture.",
                    },
                ),
            },
        }

    @computes
    def run(
        self,
        model: Any,
        clip: Any,
        concept: Concepts,
        vae: Any = None,
        forget_images: Tensor | None = None,
        forget_samples: dict[str, Tensor] | None = None,
        retain_images: Tensor | None = None,
        retain_samples: dict[str, Tensor] | None = None,
        retain_captions: str = "",
        options: Chosen | None = None,
        **given: Any,
    ) -> tuple[Data]:
        wanted = as_started(options_of(given, options))
        graph = GraphModel(model, clip, vae, wanted.dtype)
        plan = plan_of(graph, concept, wanted)
        lines = retain_captions.splitlines() if retain_captions.strip() else []
        captions = [prompt_text(line.strip()) or None for line in lines]
        if captions and retain_images is None and retain_samples is None:
            raise DataError("retain_captions are of retain_images or retain_samples: connect one of them")
        with prepared(graph, plan):
            side = graph.latent_shape
            forget = _latents(graph, forget_images, forget_samples, side, "forget")
            retain = _latents(graph, retain_images, retain_samples, side, "retain")
            if retain is not None and captions and len(captions) != len(retain):
                raise DataError(
                    f"retain_captions has {len(captions)} lines for {len(retain)} pictures: write one a picture"
                )
            if forget is not None and len(plan.concepts) > 1:
                raise ConfigError("pictures of the concept are given for several concepts: erase one at a time")
            own = UserLatents(
                [forget] if forget is not None else None,
                retain,
                tuple(captions or [None] * len(retain)) if retain is not None else (),
            )
            drawn = samples_drawn(plan, len(forget) if forget is not None else 0)
            bar = ComfyProgress({"sampling": drawn}, Sampled(graph, plan))
            made = sample_data(graph, plan, bar, cache=cache(), given=own)
        names, anchors = tuple(c.name for c in plan.concepts), tuple(c.anchor for c in plan.concepts)
        told = (graph.family.name, anchors, plan.prompts.digest, text_of(graph, plan))
        return (Data(names, moved(made, "cpu"), *told),)


def _latents(
    graph: GraphModel, images: Tensor | None, samples: dict[str, Tensor] | None, shape: tuple[int, ...], what: str
) -> Tensor | None:
    """A batch's latents. Raises DataError if both kinds are given, or none in them, or their size is not the run's."""
    if images is not None and samples is not None:
        raise DataError(f"{what}_images and {what}_samples are both given: connect one of them")
    if images is None and samples is None:
        return None
    if not len(images if images is not None else samples["samples"]):  # type: ignore[index]
        raise DataError(f"{what}_{'images' if images is not None else 'samples'} is an empty batch")
    if images is not None:
        if images.shape[-1] < 3:  # grey, and perhaps an alpha
            images = images[..., :1].expand(*images.shape[:-1], 3)
        pixels = images[..., :3].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        side = graph.settings.sampling.resolution
        found = graph.encode_pictures(np.stack([square(Image.fromarray(picture), side) for picture in pixels]))
    else:
        assert samples is not None
        found = graph.scaled(samples["samples"])
    if tuple(found.shape[1:]) != shape:
        raise DataError(
            f"{what}_samples are {list(found.shape[1:])}, the run's latents {list(shape)}: set resolution to fit"
        )
    return found
