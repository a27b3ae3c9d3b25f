"""What a single-file checkpoint holds, by its tensors' names and shapes alone, and where its network lies.

Two layouts hold a complete model: a single file (`*.safetensors` with LDM names, as WebUIs and ComfyUI keep them) and a
diffusers folder. Behind `Stored` they look alike: tensors by diffusers name, read from disk at each access.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.diffusers_folder import check_links, open_component
from salun.checkpoints.families.family import Family, Network
from salun.checkpoints.families.registry import TITLES, network_of, network_part, recognize
from salun.checkpoints.keymap import TextLayout
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.safetensors_io import Header
from salun.errors import ModelError

PREDICTIONS = {  # prediction types in metadata (modelspec) → in diffusers
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
UNCONDITIONED = "is unconditional (no cross-attention): prompts do not reach its network, so nothing can be erased"


def open_unet(path: Path) -> Stored:
    """The UNet in a single file or a diffusers folder. Raises ModelError for anything else, saying what it is."""
    return open_folder(path) if path.is_dir() else CheckpointContents.of(path).unet


def open_folder(folder: Path) -> Stored:
    """The UNet of a diffusers folder. Raises ModelError if there is none in safetensors, or as `check_links`."""
    part = folder / network_part(folder)
    if part.is_dir():
        check_links(folder)
    unet = open_component(part)
    return Stored(folder, unet.locations, unet.headers)


@dataclass(frozen=True, eq=False)
class CheckpointContents:
    """What a single file holds.

    unet: where the UNet's tensors are. has_vae: both halves of one. layouts: where each
    of the family's text encoders lies, None for one that is not there. ema: names of a second copy of the weights.
    others: names that belong to none of these.
    """

    path: Path
    header: Header
    family: Family
    unet: Stored
    has_vae: bool
    layouts: tuple[TextLayout | None, ...]
    ema: list[str]
    others: list[str]

    @staticmethod
    def of(path: Path) -> CheckpointContents:
        """Raises ModelError for an invalid or unsupported file, saying what it is."""
        header = safetensors_io.read_header(path)
        names = header.names
        kind = describe_unsupported(header)
        if kind is not None:
            raise ModelError(f"{path} is {kind}; salun supports complete models of {TITLES}")
        network = network_of(names)
        assert network is not None  # `describe_unsupported` covers all other files
        try:
            diffusers_names = network.from_single(names)
        except (KeyError, ZeroDivisionError) as error:  # the latter for absurd numbers in a name
            what = safetensors_io.truncated(str(error.args[0]))
            raise ModelError(f"{path} has a tensor that no Stable Diffusion UNet has: {what}") from error
        if len(set(diffusers_names.values())) != len(diffusers_names):
            twice = next(iter((Counter(diffusers_names.values()) - Counter(set(diffusers_names.values()))).keys()))
            raise ModelError(
                f"{path} has two tensors for one parameter: {safetensors_io.truncated(twice)} in diffusers' names"
            )
        unet = Stored(path, {new: (path, name) for name, new in diffusers_names.items()}, {path: header})
        family = _family(unet, network)
        layouts = tuple(keymap.find_text(header.entries, encoder.layouts) for encoder in family.text)
        text = (*(encoder.layouts[0] for encoder in family.text), *(layout for layout in layouts if layout is not None))
        known = (network.prefix, keymap.VAE, keymap.EMA, *(layout.prefix for layout in text))
        return CheckpointContents(
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
    def declared_prediction_type(self) -> tuple[str, str] | None:
        """(prediction type, its source): the file's metadata or its mark of v-prediction; None without either."""
        named = PREDICTIONS.get(self.header.metadata.get("modelspec.prediction_type", "").lower())
        if named is not None:
            return named, "its metadata"
        return ("v_prediction", "its v_pred mark") if "v_pred" in self.header.entries else None

    @cached_property
    def prediction(self) -> tuple[str, str]:
        """(prediction type, its source): as declared, or a guess where the family has one."""
        if self.declared_prediction_type is not None:
            return self.declared_prediction_type
        if self.family.v_guess is not None:
            key, threshold = self.family.v_guess
            name = next((name for name in self.unet if self.unet.name_in_file(name) == key), None)
            if name is None:
                return "epsilon", "the default; prediction_type overrides it"
            wide = self.unet[name].float().std(unbiased=False).item() > threshold
            guess = "v_prediction" if wide else "epsilon"
            return guess, "a guess from one of its weights; prediction_type overrides it"
        return "epsilon", "the default of its family"

    @property
    def zero_snr(self) -> bool:
        """Whether the noise schedule is rescaled to end in pure noise (a `ztsnr` mark)."""
        return "ztsnr" in self.header.entries


def _family(unet: Stored, network: Network) -> Family:
    """Raises ModelError for a UNet of another kind, by name."""
    shapes, path = shapes_of(unet), unet.path
    if fault := network.fault(shapes):
        raise ModelError(f"{path} {fault}")
    integers = next((n for n in unet if not safetensors_io.DTYPES[unet.entry(n).dtype].is_floating_point), None)
    if integers is not None:
        raise ModelError(
            f"{path}: {unet.name_in_file(integers)} has the unsupported weight dtype {unet.entry(integers).dtype}"
        )
    if not network.is_conditioned(shapes):
        raise ModelError(f"{path} {UNCONDITIONED}")
    try:
        return recognize(shapes)
    except ModelError as error:
        raise ModelError(f"{path} {error.message}") from error


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
    (r"^edm_(mean$|vpred\.)", "an EDM model (Playground, CosXL), whose noise schedule is not supported"),
    (r"^motion_modules\.|\.motion_modules\.|temporal_transformer", "an AnimateDiff motion module"),
]


def describe_unsupported(header: Header) -> str | None:
    """What a safetensors file is, if it is not a single-file model; None if it is one."""
    if header.metadata.get("format", "").startswith("salun-"):
        return f"a {header.metadata['format'].removeprefix('salun-').rsplit('-', 1)[0]} written by salun, not a model"
    complete = keymap.UNET + "out.2.weight" in header.names
    for pattern, kind in _KINDS[complete:]:  # (a complete checkpoint may carry a LoRA along)
        if any(re.search(pattern, name) for name in header.names):
            return kind
    if network_of(header.names) is not None:
        return None
    if is_bare_network(header):
        return "a UNet alone, under diffusers' names (give the diffusers folder it belongs to)"
    if any(name.startswith(("input_blocks.", "middle_block.")) for name in header.names):
        return "a UNet alone (give the complete checkpoint)"
    if any(name.startswith(("encoder.", "decoder.", keymap.VAE)) for name in header.names):
        return "a VAE alone"
    text = ("text_model.", "transformer.", "cond_stage_model.", "conditioner.")
    if any(name.startswith(text) for name in header.names):
        return "a text encoder alone"
    return "a safetensors file without a UNet"


def is_bare_network(header: Header) -> bool:
    """Whether a file holds a diffusers UNet alone, under diffusers' names."""
    if network_of(header.names) is not None:
        return False
    foreign = any(re.search(pattern, name) for pattern, _ in _KINDS for name in header.names)
    return not foreign and any(name.startswith(("down_blocks.", "mid_block.")) for name in header.names)


def shapes_of(stored: Stored) -> dict[str, tuple[int, ...]]:
    """diffusers name → shape of the UNet's tensors, without reading them."""
    return {name: stored.entry(name).shape for name in stored}
