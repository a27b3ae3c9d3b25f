"""Configs of a single file's VAE and text encoders, from the tensors' shapes and otherwise from the family.

A single file holds tensors and nothing that says how to build the model around them. Widths, depths and the number of
layers follow from shapes; activations and scales are the family's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from salun.checkpoints.families.family import Shapes, TextEncoder, Vae
from salun.checkpoints.families.shapes import check_not_empty, count
from salun.errors import ModelError


def vae_config(shapes: Shapes, vae: Vae) -> dict[str, Any]:
    """The config of a diffusers AutoencoderKL. shapes: diffusers name → shape. Raises ModelError as `unet_config`."""
    check_not_empty(shapes, "VAE")
    try:
        levels = count(shapes, r"encoder\.down_blocks\.{}\.")
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
            "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.{}\."),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **asdict(vae),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the VAE lacks or has misshapen tensors ({error}): it is incomplete") from error


def text_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """The config of a transformers CLIP text encoder. shapes: name in the single file, without its prefix → shape.

    Raises ModelError as `unet_config`.
    """
    check_not_empty(shapes, "text encoder")
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    try:
        if "token_embedding.weight" in bare:  # OpenCLIP
            tokens, width = bare["token_embedding.weight"]
            positions = bare["positional_embedding"][0]
            layers = count(bare, r"transformer\.resblocks\.{}\.")
            hidden = bare["transformer.resblocks.0.mlp.c_fc.weight"][0]
        else:
            tokens, width = bare["embeddings.token_embedding.weight"]
            positions = bare["embeddings.position_embedding.weight"][0]
            layers = count(bare, r"encoder\.layers\.{}\.")
            hidden = bare["encoder.layers.0.mlp.fc1.weight"][0]
        projection = bare.get("text_projection.weight", bare.get("text_projection", (width, width))[::-1])[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"the text encoder lacks or has misshapen tensors ({error}): it is incomplete") from error
    if width == encoder.width and layers not in encoder.layers:
        expected = " or ".join(map(str, encoder.layers))
        raise ModelError(f"a text encoder stores {layers} layers, where {expected} are expected")
    return {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": hidden,
        "projection_dim": projection,
        "num_hidden_layers": min(layers, encoder.used_layers or layers),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": encoder.hidden_act,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
    }
