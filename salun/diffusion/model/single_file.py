"""A single file's parts: UNet, VAE and text encoders built from what it holds, the tokenizer from CLIP's vocabulary.

What the file lacks comes from a diffusers folder (option `components`). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.diffusers_folder import check_tokenizer, open_component
from salun.checkpoints.families.family import Family, numbered
from salun.checkpoints.families.parts import text_config, vae_config
from salun.checkpoints.families.unet import NOT_KNOWN
from salun.checkpoints.single_file import CheckpointContents, shapes_of
from salun.diffusion.model.clip_tokenizer import clip_tokenizer
from salun.diffusion.model.configs import check_config, library_class, load_tokenizer, read_object
from salun.diffusion.model.parts import check_state_dict, empty_module, fill_module, load_strict
from salun.errors import ModelError, some

Makers = dict[str, Callable[[], Tensor]]
"""Name → what reads that tensor."""


def load_parts(
    contents: CheckpointContents, components: Path | None, prediction_type: str, precision: torch.dtype
) -> tuple[Any, Any, list[Any], list[Any]]:
    """(UNet, VAE, text encoders, tokenizers), on the CPU; all in `precision` but the VAE, which is float32.

    Configs are those of `components` where given, else the family's. Raises ModelError naming what is missing, too
    much or misshapen.
    """
    config_of = _config_reader(contents.family, components)
    unet = _unet(contents, config_of(contents.family.network.part), prediction_type, precision)
    vae = _vae(contents, components, config_of("vae"))
    encoders = [
        _text_encoder(contents, components, config_of(numbered("text_encoder", i)), i, precision)
        for i in range(len(contents.text))
    ]
    tokenizers = [_tokenizer(contents, components, i) for i in range(len(contents.text))]
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        if len(tokenizer) > encoder.config.vocab_size:
            raise ModelError(
                f"{contents.path}: its text encoder has {encoder.config.vocab_size} tokens, but CLIP has "
                f"{len(tokenizer)}",
                advice="Give a diffusers folder with its tokenizer as {components}",
            )
    return unet, vae, encoders, tokenizers


def _config_reader(family: Family, components: Path | None) -> Callable[[str], dict[str, Any] | None]:
    """Part → its config in `components`; None without `components`."""

    def read(part: str) -> dict[str, Any] | None:
        if components is None:
            return None
        path = components / part / "config.json"
        return check_config(read_object(path, str(components)), library_class(family.class_name(part)), path)

    return read


def _unet(
    contents: CheckpointContents, config: dict[str, Any] | None, prediction_type: str, precision: torch.dtype
) -> Any:
    unet, stored = empty_unet(contents, config, prediction_type), contents.unet
    fill_module(
        unet,
        {name: partial(stored.__getitem__, name) for name in stored},
        precision,
        contents.path,
        stored.name_in_file,
    )
    return unet


def empty_unet(contents: CheckpointContents, config: dict[str, Any] | None, prediction_type: str) -> Any:
    """The UNet that the file's tensors fit, without weights. Raises ModelError naming a tensor that has no place in it,
    is not there, or is of another shape."""
    stored = contents.unet
    shapes = shapes_of(stored)
    network = contents.family.network
    made = config or network.config(shapes, prediction_type)
    unet = empty_module(lambda: library_class(network.class_name).from_config(made), contents, config)
    wanted = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    check_state_dict(
        wanted, shapes, contents.path, stored.name_in_file, "the model is incomplete" if config else NOT_KNOWN
    )
    return unet


def _vae(contents: CheckpointContents, components: Path | None, config: dict[str, Any] | None) -> Any:
    from diffusers import AutoencoderKL

    if not contents.has_vae:
        return _from_components(AutoencoderKL, contents, components, "vae", torch_dtype=torch.float32)
    vae, tensors, inner = empty_vae(contents, config)
    fill_module(vae, tensors, torch.float32, contents.path, inner.__getitem__)
    return vae


def empty_vae(contents: CheckpointContents, config: dict[str, Any] | None) -> tuple[Any, Makers, dict[str, str]]:
    """The VAE that the file's tensors fit, without weights, how to read each of these, and its name in the file.

    Raises ModelError as `empty_unet`.
    """
    from diffusers import AutoencoderKL

    tensors, shapes, inner = vae_tensors(contents)
    _only_weights(contents, inner.values())
    assert contents.family.vae is not None  # no family with single files is without
    known = config or vae_config(shapes, contents.family.vae)
    vae = empty_module(lambda: AutoencoderKL.from_config(known), contents, config)
    check_state_dict({n: tuple(p.shape) for n, p in vae.named_parameters()}, shapes, contents.path, inner.__getitem__)
    return vae, tensors, inner


def vae_tensors(contents: CheckpointContents) -> tuple[Makers, dict[str, tuple[int, ...]], dict[str, str]]:
    """The file's VAE under diffusers' names: how to read each tensor, its shape, and its name in the file.

    Raises ModelError for two tensors of one name.
    """
    entries = contents.header.entries
    inner: dict[str, str] = {}
    for ldm_name, name in keymap.vae_from_ldm(contents.header.names).items():
        if name in inner:
            raise ModelError(f"{contents.path} has two tensors for one parameter: {inner[name]} and {ldm_name}")
        if _in_vae(name):
            inner[name] = ldm_name
    shapes = {name: entries[ldm_name].shape for name, ldm_name in inner.items()}
    shapes |= {
        name: shapes[name][:2]
        for name, ldm_name in inner.items()
        if keymap.is_vae_matrix(ldm_name) and shapes[name][2:] == (1, 1)
    }

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: _read(contents, inner[name]).reshape(shapes[name])

    return {name: maker(name) for name in inner}, shapes, inner


def _in_vae(name: str) -> bool:
    return name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # not a training loss's


def _text_encoder(
    contents: CheckpointContents,
    components: Path | None,
    config: dict[str, Any] | None,
    index: int,
    precision: torch.dtype,
) -> Any:
    if not contents.text[index]:
        kind = library_class(contents.family.text[index].class_name)
        return _from_components(kind, contents, components, numbered("text_encoder", index)).to(precision)
    encoder, tensors, inner = empty_text_encoder(contents, config, index)
    fill_module(encoder, tensors, precision, contents.path, inner.__getitem__)
    return encoder


def empty_text_encoder(
    contents: CheckpointContents, config: dict[str, Any] | None, index: int
) -> tuple[Any, Makers, dict[str, str]]:
    """The text encoder that the file's tensors fit, without weights, how to read each, and its name in the file.

    Raises ModelError as `empty_unet`.
    """
    from transformers import CLIPTextConfig

    kind = library_class(contents.family.text[index].class_name)
    layout, entries = contents.layouts[index], contents.header.entries
    assert layout is not None
    in_file = {n.removeprefix(layout.prefix): e.shape for n, e in entries.items() if n.startswith(layout.prefix)}
    known = config or text_config(in_file, contents.family.text[index])
    encoder = empty_module(lambda: kind(CLIPTextConfig.from_dict(known)), contents, config)
    tensors, inner = text_tensors(contents, encoder.state_dict(), index)
    _only_weights(contents, inner.values())
    ldm_names = keymap.text_to_ldm(encoder.state_dict(), layout)
    shapes = {name: _shape_in(entries[ldm_name].shape, part) for name, (ldm_name, part) in ldm_names.items()}
    check_state_dict(
        {n: tuple(p.shape) for n, p in encoder.named_parameters()}, shapes, contents.path, inner.__getitem__
    )
    return encoder, tensors, inner


def _only_weights(contents: CheckpointContents, names: Iterable[str]) -> None:
    for name in names:
        dtype = contents.header.entries[name].dtype
        if not safetensors_io.DTYPES[dtype].is_floating_point:
            raise ModelError(f"{contents.path}: {name} has the unsupported weight dtype {dtype}")


def _shape_in(shape: tuple[int, ...], part: str) -> tuple[int, ...]:
    """Of a text encoder's tensor, from that of the one in the file: see `text_to_ldm`."""
    if part == "T":
        return shape[::-1]
    return (shape[0] // 3, *shape[1:]) if part and shape else shape


def _from_components(
    kind: Any, contents: CheckpointContents, components: Path | None, part: str, **keywords: Any
) -> Any:
    """A part that the file lacks, from `components`. Raises ModelError without `components`."""
    if components is not None:
        return load_strict(kind, components / part, **keywords)
    tiny = part == "vae" and any("taesd" in name for name in contents.others + contents.header.names)
    what = f"no {'VAE' if part == 'vae' else part.replace('_', ' ')}"
    ending = "decoder.conv_in.weight" if part == "vae" else "token_embedding.weight"
    strange = next((name for name in contents.others if name.endswith(ending)), None)
    if strange is not None:
        what += f" under known names ({safetensors_io.truncated(strange)} may be of one)"
    if tiny:
        what = "only a tiny VAE (TAESD), which is not supported"
    raise ModelError(
        f"{contents.path} has {what}", advice="Give a diffusers folder or hub id that has one as {components}"
    )


def check_parts(contents: CheckpointContents, components: Path | None, prediction_type: str) -> list[str]:
    """Whether `load_parts` would find every tensor, of the shape that is due, without reading any.

    Returns the parts that the file lacks where no `components` are given. Raises ModelError as `load_parts`, except
    for faults of the values (NaN, infinity).
    """
    config_of = _config_reader(contents.family, components)
    empty_unet(contents, config_of(contents.family.network.part), prediction_type)
    if contents.has_vae:
        empty_vae(contents, config_of("vae"))
    lacking = [] if contents.has_vae else ["vae"]
    for index, there in enumerate(contents.text):
        part = numbered("text_encoder", index)
        if there:
            empty_text_encoder(contents, config_of(part), index)
        else:
            lacking.append(part)
    if components is None:
        return lacking
    for part in lacking:
        open_component(components / part)
    for index in range(len(contents.text)):
        check_tokenizer(components / numbered("tokenizer", index))
    return []


def text_tensors(contents: CheckpointContents, names: Iterable[str], index: int) -> tuple[Makers, dict[str, str]]:
    """A text encoder's tensors under transformers' names: how to read each, and its name in the file.

    names: of the encoder as built. Raises ModelError if the file lacks one.
    """
    layout = contents.layouts[index]
    assert layout is not None
    ldm_names = keymap.text_to_ldm(names, layout)
    missing = [ldm_name for ldm_name, _ in ldm_names.values() if ldm_name not in contents.header.entries]
    if missing:
        raise ModelError(f"{contents.path} is incomplete: its text encoder lacks {some(missing)}")

    def maker(ldm_name: str, part: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            stored = _read(contents, ldm_name)
            if part == "T":
                return stored.T.contiguous()
            return stored.chunk(3)["qkv".index(part)].clone() if part else stored

        return make

    return {name: maker(*place) for name, place in ldm_names.items()}, {
        name: ldm_name for name, (ldm_name, _) in ldm_names.items()
    }


def _tokenizer(contents: CheckpointContents, components: Path | None, index: int) -> Any:
    if components is not None:
        check_tokenizer(components / numbered("tokenizer", index))
        return load_tokenizer(components / numbered("tokenizer", index))
    return clip_tokenizer(contents.family.text[index].pad_token)


def _read(contents: CheckpointContents, name: str) -> Tensor:
    return safetensors_io.read_one(contents.path, contents.header, name)
