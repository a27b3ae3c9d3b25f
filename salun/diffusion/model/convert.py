"""Between the layouts: a diffusers folder written as a single file that hosts load, and a single file as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import keymap
from salun.checkpoints.diffusers_folder import model_files, open_component
from salun.checkpoints.families.family import TextEncoder, numbered
from salun.checkpoints.lazy_tensors import Planned, PlannedTensors, Stored
from salun.checkpoints.safetensors_io import DTYPES
from salun.checkpoints.single_file import CheckpointContents
from salun.diffusion.model.clip_tokenizer import write_clip_tokenizer
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.model.single_file import text_tensors, vae_tensors
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ModelError
from salun.files import new_folder

WRITE_FOLDER = "Write a folder (end its name in /)"


def write_single_file(model: Model, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a diffusers folder as one file under the names that hosts know: network, VAE, text encoders.

    changed: diffusers name → the UNet's tensors that differ from the folder's. Raises ModelError for a part that is
    missing or that the layout has no names for.
    """
    stored, family = model.stored, model.family
    items: dict[str, Planned] = {}
    try:
        for name, ldm_name in family.network.to_single(stored).items():
            items[ldm_name] = Planned(*_entry(stored, name), _from(changed, stored, name))
        _add_vae(items, stored.path)
        for index, encoder in enumerate(family.text):
            _add_text(items, stored.path / numbered("text_encoder", index), encoder)
    except KeyError as error:
        raise ModelError(
            f"{stored.path}: single files have no name for its {error.args[0]}", advice=WRITE_FOLDER
        ) from error
    v = model.schedule.prediction_type == "v_prediction"
    for mark, there in (("v_pred", v and family.v_mark), ("ztsnr", model.zero_snr)):
        if there:  # hosts look for these names
            items[mark] = Planned(torch.float32, (0,), partial(torch.empty, 0))
    described = {"modelspec.architecture": family.architecture, "modelspec.prediction_type": "v" if v else "epsilon"}
    PlannedTensors(items).write(target, {**described, **_held(metadata)})


def lost_in_single_file(model: Model) -> str | None:
    """A note if a folder that was written as a single file loses its noise schedule, since it is not its family's."""
    usual = model.family.scheduler_config(model.schedule.prediction_type, model.zero_snr)
    if torch.equal(model.schedule.alphas_cumprod, schedule_of(usual, model.name).alphas_cumprod):
        return None
    return (
        "a single file holds no noise schedule, and this model has another than its family's: load it with components, "
        "or write a folder (end its name in /)"
    )


def _entry(stored: Stored, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    entry = stored.entry(name)
    return DTYPES[entry.dtype], entry.shape


def _add_vae(items: dict[str, Planned], folder: Path) -> None:
    vae = open_component(folder / "vae")
    for name, ldm_name in keymap.vae_to_ldm(vae).items():
        dtype, shape = _entry(vae, name)
        if keymap.is_vae_matrix(ldm_name) and len(shape) == 2:
            shape = (*shape, 1, 1)
        items[ldm_name] = Planned(dtype, shape, partial(_read_as, vae, [name], shape))


def _add_text(items: dict[str, Planned], folder: Path, encoder: TextEncoder) -> None:
    text, layout = open_component(folder), encoder.layouts[0]
    together: dict[str, dict[str, str]] = {}
    for name, (ldm_name, part) in keymap.text_to_ldm(text, layout).items():
        together.setdefault(ldm_name, {})[part] = name
    for ldm_name, parts in together.items():
        names = [parts[part] for part in ("q", "k", "v")] if "q" in parts else list(parts.values())
        dtype, shape = _entry(text, names[0])
        if "T" in parts:
            items[ldm_name] = Planned(dtype, shape[::-1], partial(_read_transposed, text, names[0]))
        else:
            joined = (len(names) * shape[0], *shape[1:]) if shape else shape
            items[ldm_name] = Planned(dtype, joined, partial(_read_as, text, names, joined))
    if encoder.used_layers is not None:
        _add_last_layer(items, layout.prefix, folder, encoder.used_layers)


def _add_last_layer(items: dict[str, Planned], prefix: str, folder: Path, used: int) -> None:
    """The layer that diffusers leaves out, since no output of it is used, as one that changes nothing.

    Hosts build it all the same, and would otherwise leave its weights as whatever was in memory. Raises ModelError if
    the folder's text encoder has this layer and uses it, as no host does. (No published model has
    fewer layers, and no host builds one.)
    """
    rows = [name for name in items if name.startswith(f"{prefix}transformer.resblocks.")]
    layers = len({name.split("resblocks.")[1].split(".")[0] for name in rows})
    if layers > used:
        raise ModelError(f"{folder} uses {layers} layers, but hosts use {used} of a single file", advice=WRITE_FOLDER)
    for name in [name for name in rows if layers == used and f".resblocks.{layers - 1}." in name]:
        dtype, shape, _ = items[name]
        fill = 1.0 if ".ln_" in name and name.endswith(".weight") else 0.0
        copy = name.replace(f".resblocks.{layers - 1}.", f".resblocks.{layers}.")
        items[copy] = Planned(dtype, shape, partial(torch.full, shape, fill, dtype=dtype))


def _read_as(part: Stored, names: list[str], shape: tuple[int, ...]) -> Tensor:
    """Tensors one after the other, in a shape of as many entries."""
    return torch.cat([part[name].reshape(-1) for name in names]).view(shape)


def _read_transposed(part: Stored, name: str) -> Tensor:
    return part[name].T.contiguous()


def write_folder(model: Model, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a model that came from a single file as a diffusers folder, every tensor in the dtype it has there.

    Parts that the file lacks are copied from the folder they came from.
    """
    assert model.contents is not None
    contents, stored = model.contents, model.stored
    with new_folder(target) as temporary:
        part = temporary / model.family.network.part
        part.mkdir(parents=True, exist_ok=True)
        model.unet.save_config(part)
        network = {name: Planned(*_entry(stored, name), _from(changed, stored, name)) for name in stored}
        PlannedTensors(network).write(part / "diffusion_pytorch_model.safetensors", _held(metadata))
        if contents.has_vae:
            (temporary / "vae").mkdir()
            model.vae.save_config(temporary / "vae")
            makers, shapes, inner = vae_tensors(contents)
            vae = {n: Planned(_dtype(contents, inner[n]), shapes[n], make) for n, make in makers.items()}
            PlannedTensors(vae).write(temporary / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        else:
            _copy(model.components, "vae", temporary)
        for index, (encoder, tokenizer) in enumerate(zip(model.text_encoders, model.tokenizers, strict=True)):
            name, tokenizer_part = numbered("text_encoder", index), numbered("tokenizer", index)
            if model.components is not None:
                _copy(model.components, tokenizer_part, temporary)
            else:
                write_clip_tokenizer(temporary / tokenizer_part, tokenizer.pad_token)
            if not contents.text[index]:
                _copy(model.components, name, temporary)
                continue
            encoder.config.save_pretrained(temporary / name)
            text: dict[str, Planned] = {}
            makers, inner = text_tensors(contents, encoder.state_dict(), index)
            for key, make in makers.items():
                shape = tuple(encoder.state_dict()[key].shape)
                text[keymap.published(key)] = Planned(_dtype(contents, inner[key]), shape, make)
            PlannedTensors(text).write(temporary / name / "model.safetensors", {"format": "pt"})
        (temporary / "scheduler").mkdir()
        _json(temporary / "scheduler" / "scheduler_config.json", model.scheduler_config)
        scheduler = str(model.scheduler_config.get("_class_name"))
        _json(temporary / "model_index.json", model.family.model_index(scheduler))


def _held(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without empty texts, which only remove a key from a file that is copied."""
    return {key: text for key, text in metadata.items() if text}


def _from(changed: Mapping[str, Tensor], stored: Stored, name: str) -> Callable[[], Tensor]:
    return lambda: changed[name] if name in changed else stored[name]


def _dtype(contents: CheckpointContents, name: str) -> torch.dtype:
    return DTYPES[contents.header.entries[name].dtype]


def _copy(components: Path | None, part: str, target: Path) -> None:
    assert components is not None  # what a file lacks was loaded from there
    for source in model_files(components):
        name = source.relative_to(components)
        if name.parts[0] == part:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
