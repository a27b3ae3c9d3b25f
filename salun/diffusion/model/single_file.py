"""A single file's parts: UNet, VAE and text encoders built from what it holds, the tokenizer from CLIP's vocabulary.

What the file lacks comes from a diffusers folder (`--components`). Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.diffusers_folder import check_tokenizer, open_part
from salun.checkpoints.families.family import Family, numbered
from salun.checkpoints.families.parts import text_config, vae_config
from salun.checkpoints.families.unet import NOT_KNOWN
from salun.checkpoints.single_file import Contents, shapes_of
from salun.diffusion.model.clip_tokenizer import clip_tokenizer
from salun.diffusion.model.configs import check_config, library_class, load_tokenizer, read_object
from salun.diffusion.model.parts import _fill, agree, empty_module, whole
from salun.errors import ModelError, some

Makers = dict[str, Callable[[], Tensor]]
"""Name → what reads that tensor."""


def load_parts(
    contents: Contents, components: Path | None, prediction_type: str, precision: torch.dtype
) -> tuple[Any, Any, list[Any], list[Any]]:
    """(UNet, VAE, text encoders, tokenizers), on the CPU; all in `precision` but the VAE, which is float32.

    Configs are those of `components` where given, else the family's. Raises ModelError naming what is missing, too
    much or misshapen.
    """
    told = _config_reader(contents.family, components)
    unet = _unet(contents, told(contents.family.network.part), prediction_type, precision)
    vae = _vae(contents, components, told("vae"))
    encoders = [
        _text_encoder(contents, components, told(numbered("text_encoder", i)), i, precision)
        for i in range(len(contents.text))
    ]
    tokenizers = [_tokenizer(contents, components, i) for i in range(len(contents.text))]
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        if len(tokenizer) > encoder.config.vocab_size:
            raise ModelError(
                f"{contents.path}: its text encoder knows {encoder.config.vocab_size} words, CLIP has "
                f"{len(tokenizer)}: give the diffusers folder of its own tokenizer by --components"
            )
    return unet, vae, encoders, tokenizers


def _config_reader(family: Family, components: Path | None) -> Callable[[str], dict[str, Any] | None]:
    """Part → its config in `components`; None where there are none."""

    def read(part: str) -> dict[str, Any] | None:
        if components is None:
            return None
        path = components / part / "config.json"
        return check_config(read_object(path, str(components)), library_class(family.class_name(part)), path)

    return read


def _unet(contents: Contents, config: dict[str, Any] | None, prediction_type: str, precision: torch.dtype) -> Any:
    unet, stored = empty_unet(contents, config, prediction_type), contents.unet
    _fill(unet, {name: partial(stored.__getitem__, name) for name in stored}, precision, contents.path, stored.inner)
    return unet


def empty_unet(contents: Contents, config: dict[str, Any] | None, prediction_type: str) -> Any:
    """The UNet that the file's tensors fit, without weights. Raises ModelError naming a tensor that has no place in it,
    is not there, or is of another shape."""
    stored = contents.unet
    shapes = shapes_of(stored)
    network = contents.family.network
    told = config or network.config(shapes, prediction_type)
    unet = empty_module(lambda: library_class(network.class_name).from_config(told), contents, config)
    wanted = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    agree(wanted, shapes, contents.path, stored.inner, "it is not whole" if config else NOT_KNOWN)
    return unet


def _vae(contents: Contents, components: Path | None, config: dict[str, Any] | None) -> Any:
    from diffusers import AutoencoderKL

    if not contents.has_vae:
        return _lent(AutoencoderKL, contents, components, "vae", torch_dtype=torch.float32)
    vae, tensors, inner = empty_vae(contents, config)
    _fill(vae, tensors, torch.float32, contents.path, inner.__getitem__)
    return vae


def empty_vae(contents: Contents, config: dict[str, Any] | None) -> tuple[Any, Makers, dict[str, str]]:
    """The VAE that the file's tensors fit, without weights, how to read each of these, and its name in the file.

    Raises ModelError as `empty_unet`.
    """
    from diffusers import AutoencoderKL

    tensors, shapes, inner = vae_tensors(contents)
    _only_weights(contents, inner.values())
    known = config or vae_config(shapes, contents.family.vae)
    vae = empty_module(lambda: AutoencoderKL.from_config(known), contents, config)
    agree({n: tuple(p.shape) for n, p in vae.named_parameters()}, shapes, contents.path, inner.__getitem__)
    return vae, tensors, inner


def vae_tensors(contents: Contents) -> tuple[Makers, dict[str, tuple[int, ...]], dict[str, str]]:
    """The file's VAE under diffusers' names: how to read each tensor, its shape, and its name in the file.

    Raises ModelError for two tensors of one name.
    """
    entries = contents.header.entries
    inner: dict[str, str] = {}
    for theirs, ours in keymap.vae_from_ldm(contents.header.names).items():
        if ours in inner:
            raise ModelError(
                f"{contents.path} has two tensors in the place of one: {inner[ours]} and {theirs}; fetch it again"
            )
        if _in_vae(ours):
            inner[ours] = theirs
    shapes = {ours: entries[theirs].shape for ours, theirs in inner.items()}
    shapes |= {
        ours: shapes[ours][:2]
        for ours, theirs in inner.items()
        if keymap.is_vae_matrix(theirs) and shapes[ours][2:] == (1, 1)
    }

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: _read(contents, inner[name]).reshape(shapes[name])

    return {name: maker(name) for name in inner}, shapes, inner


def _in_vae(name: str) -> bool:
    return name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # not a training loss's


def _text_encoder(
    contents: Contents, components: Path | None, config: dict[str, Any] | None, index: int, precision: torch.dtype
) -> Any:
    if not contents.text[index]:
        kind = library_class(contents.family.text[index].class_name)
        return _lent(kind, contents, components, numbered("text_encoder", index)).to(precision)
    encoder, tensors, inner = empty_text_encoder(contents, config, index)
    _fill(encoder, tensors, precision, contents.path, inner.__getitem__)
    return encoder


def empty_text_encoder(
    contents: Contents, config: dict[str, Any] | None, index: int
) -> tuple[Any, Makers, dict[str, str]]:
    """The text encoder that the file's tensors fit, without weights, how to read each, and its name in the file.

    Raises ModelError as `empty_unet`.
    """
    from transformers import CLIPTextConfig

    kind = library_class(contents.family.text[index].class_name)
    layout, entries = contents.layouts[index], contents.header.entries
    assert layout is not None
    own = {n.removeprefix(layout.prefix): e.shape for n, e in entries.items() if n.startswith(layout.prefix)}
    known = config or text_config(own, contents.family.text[index])
    encoder = empty_module(lambda: kind(CLIPTextConfig.from_dict(known)), contents, config)
    tensors, inner = text_tensors(contents, encoder.state_dict(), index)
    _only_weights(contents, inner.values())
    places = keymap.text_to_ldm(encoder.state_dict(), layout)
    shapes = {name: _shape_in(entries[theirs].shape, part) for name, (theirs, part) in places.items()}
    agree({n: tuple(p.shape) for n, p in encoder.named_parameters()}, shapes, contents.path, inner.__getitem__)
    return encoder, tensors, inner


def _only_weights(contents: Contents, names: Iterable[str]) -> None:
    for name in names:
        dtype = contents.header.entries[name].dtype
        if not safetensors_io.DTYPES[dtype].is_floating_point:
            raise ModelError(f"{contents.path}: {name} is of dtype {dtype}, and no weights are")


def _shape_in(shape: tuple[int, ...], part: str) -> tuple[int, ...]:
    """Of a text encoder's tensor, from that of the one in the file: see `text_to_ldm`."""
    if part == "T":
        return shape[::-1]
    return (shape[0] // 3, *shape[1:]) if part and shape else shape


def _lent(kind: Any, contents: Contents, components: Path | None, part: str, **keywords: Any) -> Any:
    """A part that the file lacks, from `components`. Raises ModelError if there are none."""
    if components is not None:
        return whole(kind, components / part, **keywords)
    tiny = part == "vae" and any("taesd" in name for name in contents.others + contents.header.names)
    what = f"no {'VAE' if part == 'vae' else part.replace('_', ' ')}"
    ending = "decoder.conv_in.weight" if part == "vae" else "token_embedding.weight"
    strange = next((name for name in contents.others if name.endswith(ending)), None)
    if strange is not None:
        what += f" under names that salun knows ({safetensors_io.truncated(strange)} may be of one)"
    if tiny:
        what = "only a tiny VAE (TAESD), which salun does not read"
    raise ModelError(f"{contents.path} holds {what}: name a diffusers folder or hub id that has one by --components")


def check_parts(contents: Contents, components: Path | None, prediction_type: str) -> list[str]:
    """Whether `load_parts` would find every tensor, of the shape that is due, without reading any.

    Returns the parts that the file lacks where no `components` are given. Raises ModelError as `load_parts`, but for
    what only the values tell (NaN, infinity).
    """
    told = _config_reader(contents.family, components)
    empty_unet(contents, told(contents.family.network.part), prediction_type)
    if contents.has_vae:
        empty_vae(contents, told("vae"))
    lacking = [] if contents.has_vae else ["vae"]
    for index, there in enumerate(contents.text):
        part = numbered("text_encoder", index)
        if there:
            empty_text_encoder(contents, told(part), index)
        else:
            lacking.append(part)
    if components is None:
        return lacking
    for part in lacking:
        open_part(components / part)
    for index in range(len(contents.text)):
        check_tokenizer(components / numbered("tokenizer", index))
    return []


def text_tensors(contents: Contents, names: Iterable[str], index: int) -> tuple[Makers, dict[str, str]]:
    """A text encoder's tensors under transformers' names: how to read each, and its name in the file.

    names: of the encoder as built. Raises ModelError if the file lacks one.
    """
    layout = contents.layouts[index]
    assert layout is not None
    places = keymap.text_to_ldm(names, layout)
    missing = [theirs for theirs, _ in places.values() if theirs not in contents.header.entries]
    if missing:
        raise ModelError(f"{contents.path} lacks {some(missing)} of its text encoder: it is not whole")

    def maker(theirs: str, part: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            whole = _read(contents, theirs)
            if part == "T":
                return whole.T.contiguous()
            return whole.chunk(3)["qkv".index(part)].clone() if part else whole

        return make

    return {name: maker(*place) for name, place in places.items()}, {
        name: theirs for name, (theirs, _) in places.items()
    }


def _tokenizer(contents: Contents, components: Path | None, index: int) -> Any:
    if components is not None:
        check_tokenizer(components / numbered("tokenizer", index))
        return load_tokenizer(components / numbered("tokenizer", index))
    return clip_tokenizer(contents.family.text[index].pad_token)


def _read(contents: Contents, name: str) -> Tensor:
    return safetensors_io.read_one(contents.path, contents.header, name)
