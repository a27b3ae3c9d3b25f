"""Configs of a single file's parts: what its tensors' shapes say, and for the rest what is known of its family.

A single file holds tensors and nothing that says how to build the model around them. Widths, depths and the number of
layers follow from shapes; heads, activations and the noise schedule are the family's (`assets/families.yaml`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salun.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
FACTS = Path(__file__).resolve().parents[1] / "assets" / "families.yaml"


@cache
def facts(family: str) -> dict[str, Any]:
    """What is known of a family beyond shapes."""
    known: dict[str, Any] = yaml.safe_load(FACTS.read_text(encoding="utf-8"))[family]
    return known


def unet_config(shapes: Shapes, family: str, prediction_type: str) -> dict[str, Any]:
    """The config of a diffusers UNet2DConditionModel. shapes: diffusers name → shape.

    Raises ModelError for tensors that cannot belong to such a UNet.
    """
    known = facts(family)["unet"]
    try:
        down, up = _count(shapes, r"down_blocks\.(\d+)\."), _count(shapes, r"up_blocks\.(\d+)\.")
        widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(down)]
        deep = {
            side: [_depth(shapes, f"{side}_blocks.{i}.") for i in range(n)] for side, n in (("down", down), ("up", up))
        }
        context = next(shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
        depths = [d or 1 for d in deep["down"]]
        if any(deep["up"]):  # where only the way up has attention, its depth counts
            depths = [d or u or 1 for d, u in zip(deep["down"], reversed(deep["up"]), strict=True)]
        config: dict[str, Any] = {
            "in_channels": shapes["conv_in.weight"][1],
            "out_channels": shapes["conv_out.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in deep["down"]],
            "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in deep["up"]],
            "mid_block_type": "UNetMidBlock2DCrossAttn" if any(n.startswith("mid_block.") for n in shapes) else None,
            "transformer_layers_per_block": depths,
            "cross_attention_dim": context,
            "use_linear_projection": any(n.endswith(".proj_in.weight") and len(s) == 2 for n, s in shapes.items()),
            "norm_num_groups": known["norm_num_groups"],
            "attention_head_dim": known.get("heads") or [max(w // known["head_width"], 1) for w in widths],
            "upcast_attention": known.get("upcast_attention", False),
            "sample_size": known.get(
                "sample_size_v" if prediction_type == "v_prediction" else "", known["sample_size"]
            ),
        }
        if family == "sdxl":
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": known["addition_time_embed_dim"],
                "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
            }
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise ModelError(f"the UNet lacks or has misshapen tensors ({error}): it is not whole") from error
    return config


def vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The config of a diffusers AutoencoderKL. shapes: diffusers name → shape. Raises ModelError as `unet_config`."""
    known = facts(family)["vae"]
    try:
        levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
            "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **known,
        }
    except (KeyError, IndexError) as error:
        raise ModelError(f"the VAE lacks or has misshapen tensors ({error}): it is not whole") from error


def text_config(shapes: Shapes, family: str, index: int) -> dict[str, Any]:
    """The config of a transformers CLIP text encoder. shapes: name in the single file, without its prefix → shape.

    Raises ModelError as `unet_config`.
    """
    known = facts(family)["text"][index]
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    try:
        if "token_embedding.weight" in bare:  # OpenCLIP
            words, width = bare["token_embedding.weight"]
            places = bare["positional_embedding"][0]
            layers = _count(bare, r"transformer\.resblocks\.(\d+)\.")
            inner = bare["transformer.resblocks.0.mlp.c_fc.weight"][0]
            projection = bare.get("text_projection", (width, width))[1]
        else:
            words, width = bare["embeddings.token_embedding.weight"]
            places = bare["embeddings.position_embedding.weight"][0]
            layers = _count(bare, r"encoder\.layers\.(\d+)\.")
            inner = bare["encoder.layers.0.mlp.fc1.weight"][0]
            projection = width
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the text encoder lacks or has misshapen tensors ({error}): it is not whole") from error
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projection,
        "num_hidden_layers": layers - known["drop_layers"],
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": places,
        "hidden_act": known["hidden_act"],
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }


def scheduler_config(family: str, prediction_type: str, zero_snr: bool) -> dict[str, Any]:
    """The noise schedule, as a diffusers scheduler config."""
    return {
        "_class_name": "DDIMScheduler",
        **facts(family)["scheduler"],
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _depth(shapes: Shapes, block: str) -> int:
    """Transformer layers in each attention of a block; 0 for a block without attention."""
    return _count(shapes, re.escape(block) + r"attentions\.0\.transformer_blocks\.(\d+)\.")
