"""Stable Diffusion 1.x."""

from __future__ import annotations

from salun.checkpoints.families.family import Family, TextEncoder, Vae
from salun.checkpoints.families.unet import UNet, context_widths, has_labels, has_linear_projections, reads_sd2_text
from salun.checkpoints.keymap import TextLayout

FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1",
    pipeline="StableDiffusionPipeline",
    architecture="stable-diffusion-v1",
    matches=lambda shapes: (
        not has_labels(shapes) and not has_linear_projections(shapes) and context_widths(shapes) != {1024}
    ),
    matches_config=lambda config: not reads_sd2_text(config),
    network=UNet(heads=8, sample_size=64),
    text=(
        TextEncoder(
            layouts=(
                TextLayout("cond_stage_model.transformer.", False),
                TextLayout("conditioner.embedders.0.transformer.", False),  # of Stability's newer training code (sgm)
            ),
            width=768,
            layers=(12,),
            hidden_act="quick_gelu",
            pad_token="<|endoftext|>",
        ),
    ),
    vae=Vae(scaling_factor=0.18215, sample_size=512),
    lora_metadata={"ss_base_model_version": "sd_v1"},
    index={"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
)
