"""UNets of Stable Diffusion: recognized, configured and named by their tensors' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from salun.checkpoints import keymap
from salun.checkpoints.families.family import Shapes
from salun.checkpoints.families.shapes import check_not_empty, count
from salun.errors import ModelError

NOT_KNOWN = "it is damaged, or of a layout that salun does not know"  # of a UNet that its shapes alone describe
_ENDS = {"conv_in.weight": "input_blocks.0.0.weight", "conv_out.weight": "out.2.weight"}  # diffusers' → LDM's
_RELATIVES = {9: "an inpainting model", 8: "an image-editing model (InstructPix2Pix)", 5: "a depth model"}


def context_widths(shapes: Shapes) -> set[int]:
    """Features of a token that the cross-attention takes: one width in all known models, none if there is no text."""
    return {shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight") and len(shape) == 2}


def has_labels(shapes: Shapes) -> bool:
    """Whether the UNet takes a vector with the text, such as SDXL's pooled text and sizes."""
    return any(name.startswith("add_embedding.") for name in shapes)


def has_linear_projections(shapes: Shapes) -> bool:
    """Whether the projections around attention are matrices, not convolutions."""
    return any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())


def reads_sd2_text(config: Mapping[str, Any]) -> bool:
    """Whether a UNet with this config is SD 2's rather than SD 1's."""
    return bool(config.get("use_linear_projection")) or config.get("cross_attention_dim", 768) == 1024


@dataclass(frozen=True, eq=False)
class UNet:
    """diffusers' UNet2DConditionModel with the names of CompVis's (LDM) in single files. Implements `Network`.

    Args:
        sample_size: Height and width of latents in training; sample_size_v: likewise of v-prediction models.
        heads: Attention heads in every block, or head_width: features of a head.
        size_embedding: Features of each of the six sizes that it takes, if it takes them.
        ldm_lora_names: Whether LoRA files name modules as LDM does rather than diffusers.
    """

    sample_size: int
    sample_size_v: int | None = None
    heads: int | None = None
    head_width: int = 64
    norm_num_groups: int = 32
    upcast_attention: bool = False
    size_embedding: int | None = None
    ldm_lora_names: bool = False

    part: ClassVar[str] = "unet"
    class_name: ClassVar[str] = "UNet2DConditionModel"
    prefix: ClassVar[str] = keymap.UNET
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {
        "full": lambda name: True,
        "xattn": lambda name: ".attn2." in name,
        "xattn-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
        "selfattn": lambda name: ".attn1." in name,
        "attn": lambda name: ".attn1." in name or ".attn2." in name,
        "noxattn": lambda name: (  # ESD leaves out the time embedding and the output layers too
            ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
        ),
    }

    @property
    def size_features(self) -> int:
        return 6 * (self.size_embedding or 0)

    def to_single(self, names: Iterable[str]) -> dict[str, str]:
        return keymap.unet_to_ldm(names)

    def from_single(self, names: Iterable[str]) -> dict[str, str]:
        return keymap.unet_from_ldm(names)

    def fault(self, shapes: Shapes) -> str:
        for name, ldm_name in _ENDS.items():
            if name not in shapes:
                return f"lacks {keymap.UNET}{ldm_name}: the UNet is incomplete"
            if len(shapes[name]) != 4:
                return f"has {keymap.UNET}{ldm_name} of shape {list(shapes[name])}, which no image model has"
        channels, out = shapes["conv_in.weight"][1], shapes["conv_out.weight"][0]
        if channels == out:
            return ""
        what = _RELATIVES.get(channels, "a model with further inputs")
        return (
            f"is {what}: its UNet has {channels} input and {out} output channels; salun supports UNets with as many "
            "output as input channels"
        )

    def is_conditioned(self, shapes: Shapes) -> bool:
        return bool(context_widths(shapes))

    def latent_side(self, prediction_type: str) -> int:
        return (self.sample_size_v if prediction_type == "v_prediction" else None) or self.sample_size

    def lora_modules(self, names: Iterable[str]) -> dict[str, str]:
        """SDXL's modules have LDM names, as A1111 misses four of them by diffusers' names. SD 1's and 2's have
        diffusers', which diffusers itself requires, but for conv_norm_out, which A1111 knows by its LDM name alone."""
        names = list(names)
        if self.ldm_lora_names:
            renamed = {name: ldm_name.removeprefix(keymap.UNET) for name, ldm_name in keymap.unet_to_ldm(names).items()}
        else:
            renamed = {name: name.replace("conv_norm_out.", "out.0.") for name in names}
        return {name: "lora_unet_" + new.rpartition(".")[0].replace(".", "_") for name, new in renamed.items()}

    def config(self, shapes: Shapes, prediction_type: str) -> dict[str, Any]:
        check_not_empty(shapes, "UNet")
        try:
            return self._config(shapes, prediction_type)
        except (KeyError, IndexError, StopIteration, ValueError) as error:
            raise ModelError(f"the UNet lacks or has misshapen tensors ({error}): {NOT_KNOWN}") from error

    def _config(self, shapes: Shapes, prediction_type: str) -> dict[str, Any]:
        down, up = count(shapes, r"down_blocks\.{}\."), count(shapes, r"up_blocks\.{}\.")
        widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(down)]
        depths_down = [_depths(shapes, f"down_blocks.{i}.") for i in range(down)]
        depths_up = [_depths(shapes, f"up_blocks.{i}.") for i in range(up)]
        config: dict[str, Any] = {
            "in_channels": shapes["conv_in.weight"][1],
            "out_channels": shapes["conv_out.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.{}\."),
            "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths_down],
            "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths_up],
            "mid_block_type": _mid_block_type(shapes),
            **_transformer_layers(depths_down, depths_up),
            "cross_attention_dim": next(s[1] for name, s in shapes.items() if name.endswith(".attn2.to_k.weight")),
            "use_linear_projection": has_linear_projections(shapes),
            "norm_num_groups": self.norm_num_groups,
            "attention_head_dim": self.heads or [max(width // self.head_width, 1) for width in widths],
            "upcast_attention": self.upcast_attention,
            "sample_size": self.latent_side(prediction_type),
        }
        if self.size_embedding is not None:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": self.size_embedding,
                "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
            }
        return config


def _mid_block_type(shapes: Shapes) -> str | None:
    """Distilled models have a middle of one residual layer (SSD-1B, Segmind Vega) or none (KOALA-700M, BK-SDM-Tiny)."""
    if any(name.startswith("mid_block.attentions.") for name in shapes):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in shapes) else None


def _transformer_layers(down: list[list[int]], up: list[list[int]]) -> dict[str, Any]:
    """How many transformer layers each attention has, as diffusers' config says it.

    down, up: block → the depths of its attentions. One number a block where all attentions of a level agree, on the
    way down and up; else lists (SSD-1B).
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


def _depths(shapes: Shapes, block: str) -> list[int]:
    """Transformer layers in each attention of a block, in order; none for a block without attention."""
    block = re.escape(block)
    attentions = range(count(shapes, block + r"attentions\.{}\."))
    return [count(shapes, rf"{block}attentions\.{i}\.transformer_blocks\." + r"{}\.") for i in attentions]
