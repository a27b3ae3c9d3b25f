"""From a model's name to a `Model`: a diffusers folder or a single file is described, checked and loaded.

Parts are loaded one by one, so that no pipeline's safety checker or feature extractor is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from salun.checkpoints.diffusers_folder import check_links, check_tokenizer, open_component
from salun.checkpoints.families.family import Family, numbered
from salun.checkpoints.families.registry import FOLDER_FAMILIES, families_of
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.locate import SETTINGS, find
from salun.checkpoints.pickled import as_safetensors
from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.single_file import UNCONDITIONED, CheckpointContents, open_folder, shapes_of
from salun.compute.device import pick_device, pick_dtype
from salun.diffusion.model.class_conditional import ClassModel
from salun.diffusion.model.configs import (
    check_config,
    check_part,
    check_tokenizer_fits,
    library_class,
    load_tokenizer,
    read_object,
    read_scheduler,
)
from salun.diffusion.model.few_steps import find_few_steps
from salun.diffusion.model.labels import read_labels, vocabulary_of
from salun.diffusion.model.parts import load_strict
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.model.settings import ModelSettings, read_settings
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import ModelOptions
from salun.diffusion.prompts.vocabulary import Vocabulary
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation.detectors.attribute import load_classifier


@dataclass(frozen=True)
class ModelSpec:
    """A model on disk, read without loading weights.

    contents: what a single file holds; None for a folder. folder: the diffusers folder
    with configs and tokenizer: the model's own, or the `components` of a single file.
    prediction_from: the source of the scheduler's prediction type.
    """

    name: str
    stored: Stored
    family: Family
    settings: ModelSettings
    scheduler_config: dict[str, Any]
    prediction_from: str
    contents: CheckpointContents | None
    folder: Path | None


def describe(name: str, options: ModelOptions | None = None) -> ModelSpec:
    """Find a model and read what its files say of it. Raises ModelError for what salun cannot handle."""
    options = options or ModelOptions()
    path, entry = find(name, options.models_dir)
    if path.is_dir():
        if options.components is not None:
            raise ConfigError(f"is only for single files, but {name} is a folder", option="components")
        return _described_folder(name, path, entry, options)
    contents = CheckpointContents.of(as_safetensors(path, options.allow_pickle))
    folder = None
    if options.components is not None:
        folder, entry = find(options.components, options.models_dir, unet=False)
        family = _family_of_folder(options.components, folder)
        if family != contents.family:
            raise ModelError(
                f"is {options.components} of the family {family}, but {name} is of {contents.family}",
                option="components",
            )
    guess, source = contents.prediction
    if folder is not None and contents.declared_prediction_type is None:
        scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json", str(options.components))
        guess, source = str(scheduler.get("prediction_type", "epsilon")), "the scheduler config of components"
    if options.prediction_type is not None:
        guess, source = options.prediction_type, "prediction_type"
    if folder is not None:
        scheduler = {**read_scheduler(folder / "scheduler" / "scheduler_config.json", name), "prediction_type": guess}
        if contents.zero_snr:
            scheduler["rescale_betas_zero_snr"] = True
    else:
        scheduler = contents.family.scheduler_config(guess, contents.zero_snr)
    side = contents.family.resolution(guess)
    if folder is not None:
        side = _resolution(folder, contents.family, str(options.components)) or side
    settings = read_settings(folder, contents.family.name, entry, side)
    few_steps = find_few_steps({"the file name": path.name}, contents.header.metadata, scheduler)
    settings = replace(settings, few_steps=few_steps)
    return ModelSpec(name, contents.unet, contents.family, settings, scheduler, source, contents, folder)


def _family_of_folder(name: str, folder: Path) -> Family:
    """By its configs alone. Raises ModelError for what salun does not handle."""
    if not folder.is_dir():
        raise ModelError(f"is {folder}, which is a single file, not a diffusers folder", option="components")
    if (folder / "model_index.json").is_file():
        check_links(folder)
    pipeline = str(read_object(folder / "model_index.json", name).get("_class_name"))
    families = families_of(pipeline)
    if not families:
        pipelines = dict.fromkeys(family.pipeline for family in FOLDER_FAMILIES.values())
        raise ModelError(f"{name} is a {truncated(pipeline)}; salun supports {' and '.join(pipelines)}")
    config = _network_config(folder, families[0], name)
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != out and families[0].text:
        raise ModelError(f"{name} has a UNet with {channels} input channels (inpainting?), which is not supported")
    return next(family for family in families if family.matches_config(config))


def _network_config(folder: Path, family: Family, name: str) -> dict[str, Any]:
    path = folder / family.network.part / "config.json"
    return check_config(read_object(path, name), library_class(family.network.class_name), path)


def _described_folder(name: str, folder: Path, entry: Mapping[str, Any], options: ModelOptions) -> ModelSpec:
    family = _family_of_folder(name, folder)
    scheduler, source = read_scheduler(folder / "scheduler" / "scheduler_config.json", name), "its scheduler config"
    if options.prediction_type is not None:
        scheduler, source = {**scheduler, "prediction_type": options.prediction_type}, "prediction_type"
    stored = open_folder(folder)
    settings = read_settings(folder, family.name, entry, _resolution(folder, family, name))
    if not family.text:
        settings = replace(settings, vocabulary=_labels(settings, folder, family, name), labels=True)
    names = {"the model name": Path(name).name, "the folder name": folder.name}
    settings = replace(settings, few_steps=find_few_steps(names, stored.metadata, scheduler))
    return ModelSpec(name, stored, family, settings, scheduler, source, None, folder)


def _labels(settings: ModelSettings, folder: Path, family: Family, name: str) -> Vocabulary:
    """The labels of a class-conditional model. Raises ModelError if its settings name another vocabulary."""
    if settings.vocabulary is not None:
        raise ModelError(f"{name} has a vocabulary in its {SETTINGS}, but a class-conditional model has labels alone")
    return vocabulary_of(read_labels(folder, _network_config(folder, family, name), family.vae is not None))


def _resolution(folder: Path, family: Family, name: str) -> int | None:
    """Pixels a side that a model was trained at, where its configs say so (SD 2.1 is 768, its base 512)."""
    network = read_object(folder / family.network.part / "config.json", name)
    vae = read_object(folder / "vae" / "config.json", name) if family.vae is not None else {"block_out_channels": [1]}
    latent, levels = network.get("sample_size"), vae.get("block_out_channels")
    if isinstance(latent, list) and len(latent) == 2 and latent[0] == latent[1]:
        latent = latent[0]
    if isinstance(latent, int) and isinstance(levels, list) and 1 <= len(levels) <= 16:
        return int(latent * 2 ** (len(levels) - 1))
    if not family.text:
        raise ModelError(f"the config of {name}'s network has no sample_size, one number or twice the same")
    return None


def load(name: str, device: str = "auto", dtype: str = "auto", **given: Any) -> Model:
    """Load a model: an alias (`salun models`), a hub id, a diffusers folder, or a single `.safetensors` file.

    The arguments are the fields of `ModelOptions`. Raises ModelError for a model that is missing, incomplete or
    unsupported.
    """
    return load_with(name, ModelOptions(device=device, dtype=dtype, **given))


def load_with(name: str, options: ModelOptions) -> Model:
    """`load`, with the options of `ModelOptions` taken from `options`."""
    model_options = ModelOptions(**{item.name: getattr(options, item.name) for item in fields(ModelOptions)})
    spec = describe(name, model_options)
    schedule_of(spec.scheduler_config, name)  # before minutes of loading
    _check_detector(spec.settings, name)
    where = pick_device(model_options.device)
    precision = pick_dtype(model_options.dtype, where)
    quiet_libraries()
    if spec.contents is None:
        parts = _load_folder(spec, precision)
    else:
        from salun.diffusion.model.single_file import load_parts

        parts = load_parts(spec.contents, spec.folder, spec.scheduler_config["prediction_type"], precision)
    unet, vae, encoders, tokenizers = parts
    _check_fit(spec, *parts)
    for module in (unet, vae, *encoders):
        if module is not None:
            module.eval().requires_grad_(False)
    unet.to(where)  # the others come when they are needed
    bad = next((n for n, p in unet.named_parameters() if not torch.isfinite(p).all()), None)
    if bad is not None:
        raise ModelError(f"{name}: the weight {bad} is not finite (NaN or infinity)")
    if not spec.family.network.is_conditioned(shapes_of(spec.stored)):
        raise ModelError(f"{name} {UNCONDITIONED}")
    kind = Model if spec.family.text else ClassModel
    return kind(
        name=name,
        stored=spec.stored,
        family=spec.family,
        settings=spec.settings,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler_config=spec.scheduler_config,
        device=where,
        dtype=precision,
        contents=spec.contents,
        components=spec.folder if spec.contents is not None else None,
    )


def _check_fit(spec: ModelSpec, unet: Any, vae: Any, encoders: list[Any], tokenizers: list[Any]) -> None:
    """Raises ModelError for parts that do not belong together."""
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        check_tokenizer_fits(tokenizer, encoder, spec.name)
    if vae is not None and vae.config.latent_channels != unet.config.in_channels:
        raise ModelError(
            f"{spec.name}: its VAE has {vae.config.latent_channels} latent channels, but its UNet takes "
            f"{unet.config.in_channels}"
        )
    if not spec.family.text:
        return
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{spec.name}: its text encoders give {width} features a token, but its UNet takes "
            f"{unet.config.cross_attention_dim}"
        )


def _check_detector(settings: ModelSettings, name: str) -> None:
    """Raises DataError for a detector that cannot be used: better now than after the training."""
    if settings.detector is None or settings.vocabulary is None:
        return
    known = load_classifier(settings.detector).labels
    for attribute, values in settings.vocabulary.attributes.items():
        unknown = [value for value in values if value not in known.get(attribute, [])]
        if unknown:
            raise DataError(f"{name}: its detector does not know the {attribute} {unknown[0]!r} of its vocabulary")


def quiet_libraries() -> None:
    """No bars and remarks of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


Parts = tuple[Any, Any, list[Any], list[Any]]
"""(UNet, VAE, text encoders, tokenizers)."""


def _load_folder(spec: ModelSpec, precision: torch.dtype) -> Parts:
    folder, family = spec.stored.path, spec.family
    encoders = {numbered("text_encoder", i): encoder.class_name for i, encoder in enumerate(family.text)}
    tokenizers = [folder / numbered("tokenizer", i) for i in range(len(encoders))]
    parts = (*(("vae",) if family.vae is not None else ()), *encoders)
    for part in parts:
        open_component(folder / part)  # a file that is cut short is reported before minutes of loading
    for tokenizer in tokenizers:
        check_tokenizer(tokenizer)
    network = load_strict(library_class(family.network.class_name), folder / family.network.part, torch_dtype=precision)
    vae = None
    if family.vae is not None:
        vae = load_strict(library_class(family.class_name("vae")), folder / "vae", torch_dtype=torch.float32)
    text = [load_strict(library_class(kind), folder / part).to(precision) for part, kind in encoders.items()]
    return network, vae, text, [load_tokenizer(tokenizer) for tokenizer in tokenizers]


def check_folder(spec: ModelSpec) -> None:
    """Check that a folder has its parts, and its UNet the tensors of its config, without reading any value.

    Raises ModelError naming what is missing, too much, misshapen or not readable.
    """
    from accelerate import init_empty_weights

    from salun.diffusion.model.parts import check_state_dict

    folder, stored, family = spec.stored.path, spec.stored, spec.family
    config, kind = _network_config(folder, family, spec.name), library_class(family.network.class_name)
    place = folder / family.network.part
    check_part(kind, place, spec.name)
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(config)
    check_state_dict(
        {n: tuple(p.shape) for n, p in network.named_parameters()}, shapes_of(stored), place, stored.name_in_file
    )
    parts = ("vae",) if family.vae is not None else ()
    for part in (*parts, *(numbered("text_encoder", i) for i in range(len(family.text)))):
        check_part(library_class(family.class_name(part)), folder / part, spec.name)
    for i in range(len(family.text)):
        check_tokenizer(folder / numbered("tokenizer", i))
