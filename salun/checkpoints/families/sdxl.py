"""Stable Diffusion XL, base model."""

from __future__ import annotations

from salun.checkpoints.families.family import Family, TextEncoder, Vae
from salun.checkpoints.families.unet import UNet, context_widths, has_labels
from salun.checkpoints.keymap import TextLayout

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    architecture="stable-diffusion-xl-v1-base",
    matches=lambda shapes: has_labels(shapes) and context_widths(shapes) != {1024},
    relative=lambda shapes: (
        "an SDXL refiner, which only refines images: erase from its base model"
        if context_widths(shapes) == {1280}
        else ""
    ),
    network=UNet(head_width=64, sample_size=128, size_embedding=256, ldm_lora_names=True),
    text=(
        TextEncoder(
            layouts=(TextLayout("conditioner.embedders.0.transformer.", False),),
            width=768,
            layers=(12,),
            hidden_act="quick_gelu",
            pad_token="<|endoftext|>",
        ),
        TextEncoder(
            layouts=(
                TextLayout("conditioner.embedders.1.model.", True),
                TextLayout("conditioner.embedders.1.transformer.", False),  # transformers' names kept
            ),
            width=1280,
            layers=(32,),
            hidden_act="gelu",
            pad_token="!",
            pooled=True,
        ),
    ),
    vae=Vae(scaling_factor=0.13025, sample_size=1024),
    lora_metadata={"ss_base_model_version": "sdxl_base_v1-0"},
    clip_skip=2,
    final_norm=False,
    v_mark=True,
)
