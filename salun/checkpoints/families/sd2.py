"""Stable Diffusion 2.x."""

from __future__ import annotations

from salun.checkpoints.families.family import Family, TextEncoder, Vae
from salun.checkpoints.families.unet import UNet, context_widths, has_labels, has_linear_projections, reads_sd2_text
from salun.checkpoints.keymap import TextLayout

GUESS_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
GUESS_SPREAD = 0.09  # ComfyUI's

FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2",
    pipeline="StableDiffusionPipeline",
    architecture="stable-diffusion-v2",
    matches=lambda shapes: (
        context_widths(shapes) == {1024} or (has_linear_projections(shapes) and not has_labels(shapes))
    ),
    matches_config=reads_sd2_text,
    relative=lambda shapes: (
        "an unCLIP model, which is guided by images: salun does not support it" if has_labels(shapes) else ""
    ),
    network=UNet(head_width=64, sample_size=64, sample_size_v=96, upcast_attention=True),
    text=(
        TextEncoder(
            layouts=(
                TextLayout("cond_stage_model.model.", True),
                TextLayout("conditioner.embedders.0.model.", True),  # of Stability's newer training code (sgm)
                TextLayout("cond_stage_model.transformer.", False),  # transformers' names kept
                TextLayout("conditioner.embedders.0.transformer.", False),
            ),
            width=1024,
            layers=(23, 24),
            used_layers=23,  # of 24, so diffusers' folders and converter leave out the last one
            hidden_act="gelu",
            pad_token="!",
        ),
    ),
    vae=Vae(scaling_factor=0.18215, sample_size=768),
    lora_metadata={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    v_guess=(GUESS_KEY, GUESS_SPREAD),
    index={"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
)
