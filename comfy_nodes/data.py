"""SalUn Training Data: the samples that an erasure uses, from the model itself or from images and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from salun.diffusion.context import training_session
from salun.diffusion.data.images import square
from salun.diffusion.data.training_set import UserLatents, build_training_set
from salun.diffusion.plan import Plan
from salun.diffusion.stages import erasure_stages
from salun.errors import ConfigError, DataError
from salun.progress import Stage
from salun.user_text import prompt_text

from .execution import computes, graph_and_plan, text_digest
from .images import SamplePreview
from .inputs import option_inputs, wires
from .model import GraphModel
from .progress import ComfyProgress
from .storage import cache
from .types import DATA, Concepts, Data, Node, OptionValues, data_on


class SalUnTrainingData(Node):
    """Latents and prompts of the forget set, the anchors and the retain set."""

    TITLE = "SalUn Training Data"
    RETURN_TYPES, RETURN_NAMES = (DATA,), ("data",)
    OUTPUT_TOOLTIPS = ("Training set of SalUn Saliency Mask and SalUn Erase, which can share it.",)
    DESCRIPTION = (
        "Makes the training set of an erasure. By default all samples come from the model itself and are cached on "
        "disk. Images of the concept replace the forget samples; images to retain are added to the retain samples."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Model to erase from; the training set is sampled from it."}),
                **wires("clip", "concept"),
                **option_inputs("seed"),
            },
            "optional": {
                **wires("options"),
                "vae": ("VAE", {"tooltip": "Encoder of the images; needed with IMAGE inputs only."}),
                "forget_images": ("IMAGE", {"tooltip": "Images of the concept, in place of samples (one concept)."}),
                "forget_samples": ("LATENT", {"tooltip": "Latents of the concept, in place of samples (one concept)."}),
                "retain_images": ("IMAGE", {"tooltip": "Images to retain, added to the samples."}),
                "retain_samples": ("LATENT", {"tooltip": "Latents to retain, added to the samples."}),
                "retain_captions": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "advanced": True,
                        "tooltip": "Prompts of the images or latents to retain, one line each; without them they are "
                        "retained under the empty prompt.",
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
        options: OptionValues | None = None,
        **values: Any,
    ) -> tuple[Data]:
        graph, plan = graph_and_plan(model, clip, vae, concept, values, options)
        lines = retain_captions.splitlines() if retain_captions.strip() else []
        captions = [prompt_text(line.strip()) or None for line in lines]
        with training_session(graph, plan):
            forget = _latents(graph, forget_images, forget_samples, "forget")
            retain = _latents(graph, retain_images, retain_samples, "retain")
            n_forget, n_retain = (len(latents) if latents is not None else 0 for latents in (forget, retain))
            if captions and len(captions) != n_retain:
                raise DataError(
                    f"has {len(captions)} lines, but must have one for each image or latent to retain ({n_retain})",
                    option="retain_captions",
                )
            if forget is not None and len(plan.concepts) > 1:
                raise ConfigError(
                    "images or latents of the concept are connected, but there are several concepts",
                    advice="Erase one concept at a time",
                )
            user = UserLatents([forget] if forget is not None else None, retain, tuple(captions or [None] * n_retain))
            sampling = [cost for cost in erasure_stages(plan, images=n_forget) if cost.stage is Stage.SAMPLING]
            bar = ComfyProgress(sampling, SamplePreview(graph, plan))
            content = data_on(build_training_set(graph, plan, bar, cache=cache(), given=user), "cpu")
        names, anchors = tuple(c.name for c in plan.concepts), tuple(c.anchor for c in plan.concepts)
        return (Data(names, content, graph.family.name, anchors, plan.prompts.digest, text_digest(graph, plan)),)


def _latents(graph: GraphModel, images: Tensor | None, samples: dict[str, Tensor] | None, use: str) -> Tensor | None:
    """The latents of a node's IMAGE (n, h, w, c) or LATENT input: (n, c, h/8, w/8), scaled; None without an input.

    Args:
        use: "forget" or "retain", the inputs' prefix.

    Raises:
        DataError: Both inputs are connected, or a batch is empty or not of the run's size.
    """
    if images is not None and samples is not None:
        raise DataError(f"{use}_images and {use}_samples are both connected", advice="Connect one of them")
    batch, name = (samples["samples"], f"{use}_samples") if samples is not None else (images, f"{use}_images")
    if batch is None:
        return None
    if not len(batch):
        raise DataError("is an empty batch", option=name)
    if samples is not None:
        latents = graph.scaled(batch)
    else:
        if batch.shape[-1] < 3:  # gray, and perhaps alpha
            batch = batch[..., :1].expand(*batch.shape[:-1], 3)
        pixels = batch[..., :3].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        side = graph.settings.sampling.resolution
        latents = graph.encode_images(np.stack([square(Image.fromarray(each), side) for each in pixels]))
    if tuple(latents.shape[1:]) != graph.latent_shape:
        raise DataError(
            f"has latents of shape {list(latents.shape[1:])}, but must have {list(graph.latent_shape)}",
            option=name,
            advice="Set {resolution} to match",
        )
    return latents


def check_data(data: Data | None, graph: GraphModel, plan: Plan) -> None:
    """Raises ConfigError for training data of other concepts, prompts or sizes, or of a model of another family."""
    if data is None:
        return
    anchors = tuple(c.anchor for c in plan.concepts)
    side, resolution = data.content.forget_latents.shape[-1] * 8, graph.settings_with(plan.options).sampling.resolution
    family = graph.family.name
    checks = (
        (
            data.names == tuple(c.name for c in plan.concepts),
            f"the concept {', '.join(data.names)}, not {plan.name}",
            "one SalUn Concept",
        ),
        (data.anchors == anchors, f"the anchors {data.anchors}, not {anchors}", "one SalUn Concept"),
        (
            data.family == family,
            f"a model of the family {data.family}, not {family}",
            "one MODEL",
        ),
        (side == resolution, f"resolution {side}, not {resolution}", "one SalUn Options"),
        (
            data.prompts == plan.prompts.digest,
            "other prompts",
            "one SalUn Concept ({retain_prompts}) and one SalUn Options ({prompt_style})",
        ),
        (
            data.text == text_digest(graph, plan),
            "another CLIP",
            "one CLIP and one SalUn Options ({clip_skip}, {negative_prompt})",
        ),
    )
    for matches, made_with, source in checks:
        if not matches:
            raise ConfigError(
                f"the training data were made with {made_with}",
                advice=f"Connect {source} to SalUn Training Data and to this node",
            )
