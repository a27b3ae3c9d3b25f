"""What a checkpoint is, told from its tensors' names and shapes alone, and where the UNet lies in it.

Two layouts hold a whole model: a single file (`*.safetensors` with LDM names, as WebUIs and ComfyUI keep them) and a
diffusers folder. Behind `Stored` they look alike: tensors by diffusers name, read from disk when asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.diffusers_folder import check_links, open_part
from salun.checkpoints.keymap import TextLayout
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.safetensors_io import Header
from salun.errors import ModelError

PREDICTIONS = {  # words of metadata (modelspec) → diffusers'
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
GUESS_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
GUESS_SPREAD = 0.09  # ComfyUI's: this bias is spread wider than that in v-prediction SD 2 models
_ENDS = {"conv_in.weight": "input_blocks.0.0.weight", "conv_out.weight": "out.2.weight"}  # diffusers' → LDM's
_CONTEXT = re.compile(r"\.attn2\.to_k\.weight$")


def open_unet(path: Path) -> Stored:
    """The UNet in a single file or a diffusers folder. Raises ModelError for anything else, saying what it is."""
    return open_folder(path) if path.is_dir() else Contents.of(path).unet


def open_folder(folder: Path) -> Stored:
    """The UNet of a diffusers folder. Raises ModelError if there is none in safetensors, or as `check_links`."""
    if (folder / "unet").is_dir():
        check_links(folder)
    unet = open_part(folder / "unet")
    return Stored(folder, unet.places, unet.headers)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a single file holds.

    family: "sd1" | "sd2" | "sdxl". unet: where the UNet's tensors are. has_vae: both halves of one. layouts: where each
    of the family's text encoders lies, None for one that is not there. ema: names of a second copy of the weights.
    others: names that belong to none of these.
    """

    path: Path
    header: Header
    family: str
    unet: Stored
    has_vae: bool
    layouts: tuple[TextLayout | None, ...]
    ema: list[str]
    others: list[str]

    @staticmethod
    def of(path: Path) -> Contents:
        """Raises ModelError for a file that is not sound, or that is no Stable Diffusion 1, 2 or XL model: by name."""
        header = safetensors_io.read_header(path)
        names = header.names
        kind = other_kind(header)
        if kind is not None:
            raise ModelError(f"{path} is {kind}; salun erases whole Stable Diffusion 1, 2 and XL models")
        try:
            ours = keymap.unet_from_ldm(names)
        except (KeyError, ZeroDivisionError) as error:  # the latter for absurd numbers in a name
            what = safetensors_io.truncated(str(error.args[0]))
            raise ModelError(f"{path} has a tensor that no Stable Diffusion UNet has: {what}") from error
        if len(set(ours.values())) != len(ours):
            twice = next(iter((Counter(ours.values()) - Counter(set(ours.values()))).keys()))
            raise ModelError(
                f"{path} has two tensors in the place of one: {safetensors_io.truncated(twice)} in diffusers' names"
            )
        places = {name: (path, theirs) for theirs, name in ours.items()}
        unet = Stored(path, places, {path: header})
        family = _family(unet, path)
        layouts = tuple(keymap.find_text(header.entries, family))
        text = (*keymap.TEXT[family], *(layout for layout in layouts if layout is not None))
        known = (keymap.UNET, keymap.VAE, keymap.EMA, *(layout.prefix for layout in text))
        return Contents(
            path=path,
            header=header,
            family=family,
            unet=unet,
            has_vae=all(f"{keymap.VAE}{half}.conv_in.weight" in header.entries for half in ("encoder", "decoder")),
            layouts=layouts,
            ema=[n for n in names if n.startswith(keymap.EMA)],
            others=[n for n in names if not n.startswith(known)],
        )

    @property
    def text(self) -> tuple[bool, ...]:
        """Whether each of the family's text encoders is there."""
        return tuple(layout is not None for layout in self.layouts)

    @property
    def told_prediction(self) -> tuple[str, str] | None:
        """(prediction type, what tells it): the file's metadata or its mark of v-prediction; None if nothing does."""
        told = PREDICTIONS.get(self.header.metadata.get("modelspec.prediction_type", "").lower())
        if told is not None:
            return told, "its metadata"
        return ("v_prediction", "its v_pred mark") if "v_pred" in self.header.entries else None

    @cached_property
    def prediction(self) -> tuple[str, str]:
        """(prediction type, how that is known): as told, or for SD 2 a guess as ComfyUI's."""
        if self.told_prediction is not None:
            return self.told_prediction
        if self.family == "sd2":
            ours = next((n for n in self.unet if self.unet.inner(n) == GUESS_KEY), None)
            if ours is not None:
                spread = self.unet[ours].float().std(unbiased=False).item()
                guess = "v_prediction" if spread > GUESS_SPREAD else "epsilon"
                return guess, "a guess from one of its weights; --prediction-type says otherwise"
            return "epsilon", "nothing says otherwise; --prediction-type does"
        return "epsilon", "the family's own"

    @property
    def zero_snr(self) -> bool:
        """Whether the noise schedule is rescaled to end in pure noise (a `ztsnr` mark)."""
        return "ztsnr" in self.header.entries


def _family(unet: Stored, path: Path) -> str:
    """Raises ModelError for a UNet of another kind, by name."""
    for name, theirs in _ENDS.items():
        if name not in unet.places:
            raise ModelError(f"{path} lacks {keymap.UNET}{theirs}: it holds no whole UNet")
        shape = unet.entry(name).shape
        if len(shape) != 4:
            raise ModelError(f"{path}: {unet.inner(name)} has the shape {list(shape)}, and no picture has that")
    channels, out = (unet.entry(name).shape[side] for name, side in zip(_ENDS, (1, 0), strict=True))
    if channels != out:
        what = {9: "an inpainting model", 8: "an image-editing model (InstructPix2Pix)", 5: "a depth model"}
        raise ModelError(
            f"{path} is {what.get(channels, 'a model with further inputs')}: its UNet takes {channels} channels and "
            f"gives {out}; salun handles those that take and give the same"
        )
    whole = next((n for n in unet if not safetensors_io.DTYPES[unet.entry(n).dtype].is_floating_point), None)
    if whole is not None:
        raise ModelError(f"{path}: {unet.inner(whole)} is of dtype {unet.entry(whole).dtype}, and no weights are")
    widths = {unet.entry(name).shape[1] for name in unet if _CONTEXT.search(name) and len(unet.entry(name).shape) == 2}
    if not widths:
        raise ModelError(f"{path} has no cross-attention: prompts do not reach its UNet, so nothing can be forgotten")
    labelled = "add_embedding.linear_1.weight" in unet.places
    if labelled and widths == {1280}:
        raise ModelError(f"{path} is an SDXL refiner, which only finishes pictures: erase from its base model")
    if labelled and widths == {1024}:
        raise ModelError(f"{path} is an unCLIP model, which is guided by pictures: salun does not handle it")
    if labelled:
        return "sdxl"
    linear = any(name.endswith(".proj_in.weight") and len(unet.entry(name).shape) == 2 for name in unet)
    return "sd2" if linear or widths == {1024} else "sd1"


_KINDS = [  # (a pattern that some tensor's name matches, what such a file is); the first match counts
    (
        r"^lora_|[._]lora(_linear_layer)?[._](up|down|A|B)\b|\.lokr_|\.hada_w|\.oft_",
        "a LoRA, a difference to a model",
    ),
    (r"joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"double_blocks\.", "a Flux model"),
    (r"transformer_blocks\.\d+\.attn\.(norm_)?add(ed)?_", "a Flux or Stable Diffusion 3 transformer"),
    (r"^(control_model\.|controlnet_)|^input_hint_block\.", "a ControlNet"),
    (r"^(emb_params|string_to_param)|^clip_[lg]$", "a textual inversion"),
    (r"^edm_(mean$|vpred\.)", "an EDM model (Playground, CosXL), whose noise salun does not know"),
    (r"^motion_modules\.|\.motion_modules\.|temporal_transformer", "an AnimateDiff motion module"),
]


def other_kind(header: Header) -> str | None:
    """What a safetensors file is, if it is no single-file model with a UNet under LDM names."""
    if header.metadata.get("format", "").startswith("salun-"):
        return f"a {header.metadata['format'].removeprefix('salun-').rsplit('-', 1)[0]} written by salun, and no model"
    whole = keymap.UNET + "out.2.weight" in header.names
    for pattern, kind in _KINDS[whole:]:  # (a whole checkpoint may carry a LoRA along)
        if any(re.search(pattern, name) for name in header.names):
            return kind
    if any(name.startswith(keymap.UNET) for name in header.names):
        return None
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in header.names):
        return "a UNet alone, under diffusers' names (give the diffusers folder it belongs to)"
    if any(name.startswith(("input_blocks.", "middle_block.")) for name in header.names):
        return "a UNet alone (give the whole checkpoint it was taken from)"
    if any(name.startswith(("encoder.", "decoder.", keymap.VAE)) for name in header.names):
        return "a VAE alone"
    text = ("text_model.", "transformer.", "cond_stage_model.", "conditioner.")
    if any(name.startswith(text) for name in header.names):
        return "a text encoder alone"
    return "a safetensors file without a UNet"


def shapes_of(stored: Stored) -> dict[str, tuple[int, ...]]:
    """diffusers name → shape of the UNet's tensors, without reading them."""
    return {name: stored.entry(name).shape for name in stored}
