"""Tensor names: single files' (LDM, as in CompVis's and Stability's checkpoints) ↔ diffusers', by rule.

Facts, not code, come from those projects: LDM numbers a UNet's blocks in one row (`input_blocks.4.1`), diffusers by
level and kind (`down_blocks.1.attentions.0`). The inner names of attention blocks are the same on both sides. Nothing
here looks at a tensor; where one side keeps it in another shape, `is_vae_matrix` and `text_to_ldm` say so.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

UNET = "model.diffusion_model."
VAE = "first_stage_model."
EMA = "model_ema."
_NUMBER = r"(\d{1,4})"  # in names, which are untrusted input: no model has more, and Python refuses 4,300 digits

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_BACK = {ldm_name: diffusers_name for diffusers_name, ldm_name in _TOP.items()}
_RESNET_BACK = {ldm_name: diffusers_name for diffusers_name, ldm_name in _RESNET.items()}


# -- UNet -------------------------------------------------------------------------------------------------------------


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers name → LDM name (with `model.diffusion_model.`) of every UNet tensor.

    The names of all the UNet's tensors are needed: the numbering depends on how many layers a block has, and which have
    attention. Raises KeyError naming a tensor that no UNet of these families has.
    """
    names = list(names)
    layers = 1 + max(_numbers(names, rf"down_blocks\.0\.resnets\.{_NUMBER}\."), default=1)
    attended = _numbers(names, rf"up_blocks\.{_NUMBER}\.attentions\.")
    return {name: UNET + _unet_name(name, layers, attended) for name in names}


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    """Every number that the pattern finds at the beginning of a name."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _unet_name(name: str, layers: int, attended: set[int]) -> str:
    for diffusers_name, ldm_name in _TOP.items():
        if name.startswith(diffusers_name + "."):
            rest = name[len(diffusers_name) + 1 :]
            return f"{ldm_name}.{_inner(rest, _RESNET) if '.resnets.' in diffusers_name else rest}"
    kinds = "resnets|attentions|downsamplers|upsamplers"
    match = re.fullmatch(rf"(down|up)_blocks\.{_NUMBER}\.({kinds})\.{_NUMBER}\.(.+)", name)
    if match is None:
        raise KeyError(name)
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    row = "input_blocks" if side == "down" else "output_blocks"
    start = 1 + block * (layers + 1) if side == "down" else block * (layers + 1)
    if kind == "resnets":
        return f"{row}.{start + layer}.0.{_inner(rest, _RESNET)}"
    if kind == "attentions":
        return f"{row}.{start + layer}.1.{rest}"
    if kind == "downsamplers":
        return f"{row}.{start + layers}.0.op.{rest.removeprefix('conv.')}"
    return f"{row}.{start + layers}.{2 if block in attended else 1}.{rest}"


def unet_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """LDM name (with `model.diffusion_model.`) → diffusers name of every UNet tensor among `names`; no others.

    Raises KeyError naming a foreign tensor.
    """
    bare = [name.removeprefix(UNET) for name in names if name.startswith(UNET)]
    samplers = _numbers(bare, rf"input_blocks\.{_NUMBER}\.0\.op\.")
    positions = _numbers(bare, rf"input_blocks\.{_NUMBER}\.")
    layers = min(samplers) - 1 if samplers else max(positions, default=2)  # without a sampler there is one level
    return {UNET + name: _unet_name_back(name, layers) for name in bare}


def _unet_name_back(name: str, layers: int) -> str:
    for ldm_name, diffusers_name in _TOP_BACK.items():
        if name.startswith(ldm_name + "."):
            rest = name[len(ldm_name) + 1 :]
            return f"{diffusers_name}.{_inner(rest, _RESNET_BACK) if '.resnets.' in diffusers_name else rest}"
    match = re.fullmatch(rf"(input|output)_blocks\.{_NUMBER}\.{_NUMBER}\.(.+)", name)
    if match is None:
        raise KeyError(UNET + name)
    side, place, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        block, layer = divmod(place - 1, layers + 1)
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest[3:]}"
        where = f"down_blocks.{block}"
    else:
        block, layer = divmod(place, layers + 1)
        if rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        where = f"up_blocks.{block}"
    if slot == 0:
        return f"{where}.resnets.{layer}.{_inner(rest, _RESNET_BACK)}"
    return f"{where}.attentions.{layer}.{rest}"


def _inner(rest: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if rest.startswith(old + "."):
            return new + rest[len(old) :]
    raise KeyError(rest)


# -- VAE --------------------------------------------------------------------------------------------------------------

_VAE_MODULES = {  # diffusers → LDM
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_norm_out.": "norm_out.",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # of diffusers before 0.18
_ATTENTION_BACK = {  # converters of 2023 left diffusers' names within `mid.attn_1`, older or newer
    **{name: name for name in _ATTENTION},
    **{ldm_name: diffusers_name for diffusers_name, ldm_name in _ATTENTION.items()},
    **{
        old: diffusers_name
        for old, ldm_name in _OLD_ATTENTION.items()
        for diffusers_name, new in _ATTENTION.items()
        if new == ldm_name
    },
}


def vae_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers name → LDM name (with `first_stage_model.`) of every tensor of an AutoencoderKL.

    The attention's matrices are (c, c) in diffusers and (c, c, 1, 1) in single files: see `is_vae_matrix`.
    """
    names = list(names)
    levels = 1 + max(_numbers(names, rf"decoder\.up_blocks\.{_NUMBER}\."), default=0)
    return {name: VAE + _vae_name(name, levels) for name in names}


def _vae_name(name: str, levels: int) -> str:
    head, _, rest = name.partition(".")
    if head not in ("encoder", "decoder"):
        return name
    for diffusers_name, ldm_name in _VAE_MODULES.items():
        if rest.startswith(diffusers_name):
            tail = rest[len(diffusers_name) :]
            if "attn" in ldm_name:
                tail = _inner(tail, {**_ATTENTION, **_OLD_ATTENTION})
            return f"{head}.{ldm_name}{tail.replace('conv_shortcut', 'nin_shortcut')}"
    match = re.match(rf"(down|up)_blocks\.{_NUMBER}\.(resnets|downsamplers|upsamplers)\.{_NUMBER}\.(.+)", rest)
    if match is None:
        return name
    side, block, kind, layer, tail = match[1], int(match[2]), match[3], match[4], match[5]
    level = block if side == "down" else levels - 1 - block  # the decoder's levels are counted from the image
    if kind == "resnets":
        return f"{head}.{side}.{level}.block.{layer}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{head}.{side}.{level}.{kind.removesuffix('rs')}.{tail}"


def vae_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """LDM name (with `first_stage_model.`) → diffusers name of every VAE tensor among `names`; others are skipped.

    A name that no VAE has stays as it is.
    """
    bare = [name.removeprefix(VAE) for name in names if name.startswith(VAE)]
    levels = 1 + max(_numbers(bare, rf"decoder\.up\.{_NUMBER}\."), default=0)
    return {VAE + name: _vae_name_back(name, levels) for name in bare}


def _vae_name_back(name: str, levels: int) -> str:
    head, _, rest = name.partition(".")
    if head not in ("encoder", "decoder"):
        return name
    for diffusers_name, ldm_name in _VAE_MODULES.items():
        if rest.startswith(ldm_name):
            tail = rest[len(ldm_name) :]
            if "attn" in ldm_name:
                try:
                    tail = _inner(tail, _ATTENTION_BACK)
                except KeyError:
                    return name
            return f"{head}.{diffusers_name}{tail.replace('nin_shortcut', 'conv_shortcut')}"
    match = re.match(rf"(down|up)\.{_NUMBER}\.(block\.\d+|downsample|upsample)\.(.+)", rest)
    if match is None:
        return name
    side, level, kind, tail = match[1], int(match[2]), match[3], match[4]
    block = level if side == "down" else levels - 1 - level
    if kind.startswith("block."):
        return f"{head}.{side}_blocks.{block}.resnets.{kind[6:]}.{tail.replace('nin_shortcut', 'conv_shortcut')}"
    return f"{head}.{side}_blocks.{block}.{kind}rs.0.{tail}"


def is_vae_matrix(name: str) -> bool:
    """Whether a VAE tensor (LDM name) is a matrix in diffusers and a 1×1 convolution in single files.

    Some converters leave it a matrix.
    """
    layers = "|".join(re.escape(name) for name in _ATTENTION_BACK if "norm" not in name)
    return re.search(rf"\.mid\.attn_1\.({layers})\.weight$", name) is not None


# -- text encoders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextLayout:
    """Where a text encoder lies in a single file.

    prefix: of its names there. open_clip: OpenCLIP's names, with q, k and v fused, rather than transformers'. short:
    transformers' names without their `text_model.`, as some old files have them. turned: OpenCLIP's text projection,
    the transpose of transformers'; diffusers' converter leaves it as it is, under transformers' name.
    """

    prefix: str
    open_clip: bool
    short: bool = False
    turned: bool = True


TOKENS = (  # by which of these a text encoder is known to be there: transformers', the same shortened, OpenCLIP's
    "text_model.embeddings.token_embedding.weight",
    "embeddings.token_embedding.weight",
    "token_embedding.weight",
)
_CLIP = {  # transformers ↔ OpenCLIP, within a layer
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def published(name: str) -> str:
    """A CLIP text encoder's tensor as files name it, which every version of transformers reads.

    From version 5 on a `CLIPTextModel` in memory lacks the `text_model.` of the names on the hub.
    """
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def find_text(names: Container[str], layouts: Iterable[TextLayout]) -> TextLayout | None:
    """The first of the layouts in which a file with these names holds a text encoder; None if it holds none."""
    for layout in layouts:
        if any(f"{layout.prefix}{name}" in names for name in TOKENS):
            short = f"{layout.prefix}embeddings.token_embedding.weight" in names
            turned = f"{layout.prefix}text_projection.weight" not in names
            return replace(layout, short=short, turned=turned)
    return None


def text_to_ldm(names: Iterable[str], layout: TextLayout) -> dict[str, tuple[str, str]]:
    """transformers name → (name in the single file, part) of a CLIP text encoder's tensors.

    part: "" for the tensor as it is, "q", "k" or "v" for a third of a fused one (rows in this order), "T" for one that
    is transposed (the text projection). Buffers that both sides make themselves (position_ids) are skipped.
    """
    mapping = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare.endswith("position_ids"):
            continue
        if not layout.open_clip:
            inner = bare if layout.short or bare.startswith("text_projection") else f"text_model.{bare}"
            mapping[name] = (layout.prefix + inner, "")
            continue
        ldm_name, part = _open_clip_name(bare)
        if part == "T" and not layout.turned:
            ldm_name, part = bare, ""
        mapping[name] = (layout.prefix + ldm_name, part)
    return mapping


def _open_clip_name(bare: str) -> tuple[str, str]:
    if bare in _CLIP_TOP:
        return _CLIP_TOP[bare], "T" if bare.startswith("text_projection") else ""
    match = re.fullmatch(rf"encoder\.layers\.{_NUMBER}\.(.+)", bare)
    if match is None:
        raise KeyError(bare)
    row, rest = f"transformer.resblocks.{match[1]}.", match[2]
    if fused := re.fullmatch(r"self_attn\.(q|k|v)_proj\.(weight|bias)", rest):
        return f"{row}attn.in_proj_{fused[2]}", fused[1]
    return row + _inner(rest, _CLIP), ""
