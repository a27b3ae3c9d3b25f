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

from salun.checkpoints.safetensors_io import truncated
from salun.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
NOT_KNOWN = "it is damaged, or of a layout that salun does not know"  # of a UNet that its shapes alone describe
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
    _none_empty(shapes, "UNet")
    try:
        down, up = _count(shapes, r"down_blocks\.{}\."), _count(shapes, r"up_blocks\.{}\.")
        widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(down)]
        depths_down = [_depths(shapes, f"down_blocks.{i}.") for i in range(down)]
        depths_up = [_depths(shapes, f"up_blocks.{i}.") for i in range(up)]
        context = next(shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
        config: dict[str, Any] = {
            "in_channels": shapes["conv_in.weight"][1],
            "out_channels": shapes["conv_out.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.{}\."),
            "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths_down],
            "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths_up],
            "mid_block_type": _mid_block_type(shapes),
            **_transformer_layers(depths_down, depths_up),
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
        raise ModelError(f"the UNet lacks or has misshapen tensors ({error}): {NOT_KNOWN}") from error
    return config


def _mid_block_type(shapes: Shapes) -> str | None:
    """Distilled models have a middle of one residual layer (SSD-1B, Segmind Vega) or none (KOALA-700M, BK-SDM-Tiny)."""
    if any(name.startswith("mid_block.attentions.") for name in shapes):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in shapes) else None


def _transformer_layers(down: list[list[int]], up: list[list[int]]) -> dict[str, Any]:
    """diffusers' words for how many transformer layers each attention has. down, up: block → its attentions' depths.

    One number a block where all attentions of a level agree, on the way down and up; else lists (SSD-1B).
    """
    levels = [set(d + u) for d, u in zip(down, reversed(up), strict=True)]
    if all(len(depths) <= 1 for depths in levels):
        return {"transformer_layers_per_block": [max(depths, default=1) for depths in levels]}

    def shortest(depths: list[int]) -> int | list[int]:
        return depths if len(set(depths)) > 1 else max(depths, default=1)

    return {
        "transformer_layers_per_block": [shortest(depths) for depths in down],
        "reverse_transformer_layers_per_block": [shortest(depths) for depths in up],
    }


def vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The config of a diffusers AutoencoderKL. shapes: diffusers name → shape. Raises ModelError as `unet_config`."""
    known = facts(family)["vae"]
    _none_empty(shapes, "VAE")
    try:
        levels = _count(shapes, r"encoder\.down_blocks\.{}\.")
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
            "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.{}\."),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **known,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the VAE lacks or has misshapen tensors ({error}): it is not whole") from error


def text_config(shapes: Shapes, family: str, index: int) -> dict[str, Any]:
    """The config of a transformers CLIP text encoder. shapes: name in the single file, without its prefix → shape.

    Raises ModelError as `unet_config`.
    """
    known = facts(family)["text"][index]
    _none_empty(shapes, "text encoder")
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    try:
        if "token_embedding.weight" in bare:  # OpenCLIP
            words, width = bare["token_embedding.weight"]
            places = bare["positional_embedding"][0]
            layers = _count(bare, r"transformer\.resblocks\.{}\.")
            inner = bare["transformer.resblocks.0.mlp.c_fc.weight"][0]
        else:
            words, width = bare["embeddings.token_embedding.weight"]
            places = bare["embeddings.position_embedding.weight"][0]
            layers = _count(bare, r"encoder\.layers\.{}\.")
            inner = bare["encoder.layers.0.mlp.fc1.weight"][0]
        projection = bare.get("text_projection.weight", bare.get("text_projection", (width, width))[::-1])[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the text encoder lacks or has misshapen tensors ({error}): it is not whole") from error
    if width == known.get("width") and layers not in known["layers"]:
        due = " or ".join(map(str, known["layers"]))
        raise ModelError(f"a text encoder stores {layers} layers, where {due} are expected: it is not whole")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projection,
        "num_hidden_layers": min(layers, known.get("used_layers", layers)),
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
    """How many numbers, from 0 on, the pattern finds at the beginning of names; `{}` in it stands for the number.

    Raises ValueError if one is missing in between. (Names are untrusted: what is built is as large as their number.)
    """
    numbered = re.compile(pattern.replace("{}", r"(\d{1,4})"))
    numbers = {int(match[1]) for name in names if (match := numbered.match(name))}
    gap = next((number for number in range(len(numbers)) if number not in numbers), None)
    if gap is not None:
        raise ValueError("no " + pattern.replace("{}", str(gap)).replace("\\", "") + "*")
    return len(numbers)


def _depths(shapes: Shapes, block: str) -> list[int]:
    """Transformer layers in each attention of a block, in order; none for a block without attention."""
    block = re.escape(block)
    attentions = range(_count(shapes, block + r"attentions\.{}\."))
    return [_count(shapes, rf"{block}attentions\.{i}\.transformer_blocks\." + r"{}\.") for i in attentions]


def _none_empty(shapes: Shapes, part: str) -> None:
    """Raises ModelError for a tensor without entries: it takes no bytes, but its other sizes may be anything."""
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise ModelError(f"the {part}'s {truncated(empty)} has no entries: it is damaged")
