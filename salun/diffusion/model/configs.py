"""Configs of a model's parts, which are untrusted input: checked before a library builds anything of them.

The libraries build what a config says: a billion layers, or a tensor larger than the memory, before they look into the
file of weights. So numbers are bounded here, and a part is first built without memory and compared with the headers of
its weight files.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from salun.checkpoints.diffusers_folder import open_component
from salun.checkpoints.safetensors_io import truncated
from salun.checkpoints.sizes import check_size, first_line
from salun.errors import ModelError
from salun.untrusted import read_json_object, read_text

LARGEST = 1_000_000  # of whole numbers: widths, tokens, timesteps
LONGEST_LIST = 10_000
TOKENIZER_BYTES = 20_000_000
FORBIDDEN = ("auto_map", "quantization_config", "custom_pipelines")  # lead to code or kernels from elsewhere
CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
CLASS_CONDITIONAL: dict[str, dict[str, str]] = {  # the classes of such networks, and what they must have
    "UNet2DModel": {"time_embedding_type": "positional"},
    "DiTTransformer2DModel": {"norm_type": "ada_norm_zero"},
}
FORMER = {"DiTTransformer2DModel": "Transformer2DModel"}  # under which name published folders have it
TEXT = {  # the fields of a CLIP text encoder's config; no others reach the library
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "projection_dim": int, "num_hidden_layers": int,
    "num_attention_heads": int, "max_position_embeddings": int, "bos_token_id": int, "eos_token_id": int,
    "pad_token_id": int, "hidden_act": str, "layer_norm_eps": float, "attention_dropout": float,
    "initializer_range": float, "initializer_factor": float, "dtype": str, "torch_dtype": str,
}  # fmt: skip


def library_class(name: str) -> Any:
    """diffusers' or transformers' class of this name."""
    import diffusers
    import transformers

    return getattr(transformers if name.startswith("CLIP") else diffusers, name)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model `name`. Raises ModelError."""
    try:
        data = read_json_object(path)
    except FileNotFoundError as error:
        raise ModelError(f"{name} is not a diffusers model: {path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    for key in FORBIDDEN:
        if data.get(key):
            raise ModelError(f"{path} has {key}, which can load code from elsewhere and is not followed")
    return data


def read_scheduler(path: Path, name: str) -> dict[str, Any]:
    """A scheduler's config, its types checked; `schedule` checks the numbers. Raises ModelError."""
    config = read_object(path, name)
    _check_class(config, re.compile(r"[A-Za-z0-9]{1,60}Scheduler"), path)
    for key, kinds in (("prediction_type", str), ("rescale_betas_zero_snr", bool | None)):
        if key in config and not isinstance(config[key], kinds):
            raise _wrong(path, key, config[key], "a string" if kinds is str else "true or false")
    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        from diffusers import DPMSolverMultistepScheduler

        _check_types(config, DPMSolverMultistepScheduler, path)
        if not 1 <= config.get("solver_order", 2) <= 3:
            raise _wrong(path, "solver_order", config["solver_order"], "1, 2 or 3")
    return config


def check_config(config: Mapping[str, Any], kind: Any, path: Path) -> dict[str, Any]:
    """A part's config as its library may have it: `kind` is diffusers' or transformers' class of the part.

    Raises ModelError for a value of another type than the class's own defaults have, or out of bounds.
    """
    if kind.__name__.startswith("CLIPText"):
        return _text(config, path)
    former = FORMER.get(kind.__name__)
    _check_class(config, re.compile(f"{kind.__name__}|{former}" if former else kind.__name__), path)
    _check_types(config, kind, path)
    if kind.__name__ in CLASS_CONDITIONAL:
        _check_class_conditional(config, kind.__name__, path)
    if kind.__name__ == "DiTTransformer2DModel":
        return dict(config)
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 16 or not all(_is_size(width) for width in widths):
        raise _wrong(path, "block_out_channels", widths, "a list of 1 to 16 widths")
    if kind.__name__ == "UNet2DConditionModel":
        _check_unet(config, path)
    elif kind.__name__ == "AutoencoderKL":
        _check_vae(config, path)
    return dict(config)


def _check_unet(config: Mapping[str, Any], path: Path) -> None:
    for key in CONDITIONS:
        if config.get(key) is not None:
            raise ModelError(
                f"{path} has {key} {truncated(repr(config[key]))}: models with more inputs are unsupported"
            )
    if config.get("downsample_padding", 1) not in (0, 1):
        raise _wrong(path, "downsample_padding", config["downsample_padding"], "0 or 1")


def _check_class_conditional(config: Mapping[str, Any], kind: str, path: Path) -> None:
    channels = config.get("in_channels", 3 if kind == "UNet2DModel" else 4)
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise ModelError(
            f"{path} has {channels} input and {out} output channels; salun supports as many, and twice as many of a "
            "network that learned the variance too"
        )
    if kind == "UNet2DModel" and channels not in (1, 3):
        raise ModelError(f"{path} has {channels} channels; salun supports pixels of 1 or 3")
    if config.get("class_embed_type") is not None:
        other = truncated(repr(config["class_embed_type"]))
        raise ModelError(f"{path} has class_embed_type {other}; salun supports embeddings of labels (num_class_embeds)")
    for key, known in CLASS_CONDITIONAL[kind].items():
        if config.get(key, known) != known:
            raise ModelError(f"{path} has {key} {truncated(repr(config[key]))}; salun supports {known}")


def _check_vae(config: Mapping[str, Any], path: Path) -> None:
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not _is_number(scale) or scale == 0:
        raise _wrong(path, "scaling_factor", scale, "a number other than 0")
    if shift is not None and not _is_number(shift):
        raise _wrong(path, "shift_factor", shift, "a number")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise _wrong(path, key, config[key], "3")


def _text(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    inner = config.get("text_config")
    if config.get("model_type") == "clip" and isinstance(inner, dict):  # the config of both of CLIP's encoders
        config = inner
    checked = {}
    for key, kind in TEXT.items():
        value = config.get(key)
        if value is None:
            continue
        fits = _is_number(value) if kind is float else type(value) is kind
        if not fits or (kind is int and not -1 <= value <= LARGEST):
            raise _wrong(path, key, value, {int: "an integer", str: "a string", float: "a number"}[kind])
        checked[key] = value
    return checked


def check_part(kind: Any, folder: Path, name: str) -> Any:
    """Check a part's folder before the library loads it; returns the config of a text encoder, None of other parts.

    Raises ModelError as `check_config` and `check_size`.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} has an adapter (adapter_config.json) of another model", advice="Remove it")
    config = check_config(read_object(path, name), kind, path)
    stored = open_component(folder)
    held = sum(prod(stored.entry(tensor).shape) for tensor in stored)
    if not kind.__name__.startswith("CLIPText"):
        check_size(lambda: kind.from_config(config), held, path)
        return None
    from transformers import CLIPTextConfig

    try:
        made = CLIPTextConfig(**config)
    except Exception as error:  # of the library's own validation
        raise ModelError(f"no model can be built from {path}: {first_line(error)}") from error
    check_size(lambda: kind(made), held, path)
    return made


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from a folder, its files bounded. Raises ModelError."""
    from transformers import CLIPTokenizer

    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                read_object(path, str(folder))
            elif path.suffix == ".txt":
                read_text(path, TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the Rust library do not derive from Exception
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def check_tokenizer_fits(tokenizer: Any, encoder: Any, name: str) -> None:
    """Raises ModelError for a tokenizer with tokens that the text encoder lacks, or none for a prompt's ends."""
    known, positions = encoder.config.vocab_size, encoder.config.max_position_embeddings
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if any(type(token) is not int for token in ends):
        raise ModelError(f"{name}: its tokenizer has no start, end or padding token")
    if highest >= known:
        raise ModelError(f"{name}: its tokenizer has tokens up to {highest}, but its text encoder {known} embeddings")
    if positions < 3:
        raise ModelError(f"{name}: its text encoder takes {positions} tokens; at least 3 are needed")
    length = tokenizer.model_max_length
    if not _is_number(length):
        raise ModelError(f"{name}: its tokenizer's model_max_length is {truncated(repr(length))}, but must be a number")
    if type(length) is not int or not 3 <= length <= positions:  # where the files do not say, it is without limit
        tokenizer.model_max_length = positions


def _check_class(config: Mapping[str, Any], pattern: re.Pattern[str], path: Path) -> None:
    named = config.get("_class_name")
    if named is not None and not (isinstance(named, str) and pattern.fullmatch(named)):
        raise _wrong(path, "_class_name", named, f"a {pattern.pattern.rpartition('}')[2]}")


def _check_types(config: Mapping[str, Any], kind: Any, path: Path) -> None:
    """Every value has the type of the default that the class's `__init__` has for it, or is a list of such."""
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name not in config or name == "self":
            continue
        value, default = config[name], parameter.default
        optional = default is None or isinstance(default, bool) or re.search("None|Optional", str(parameter.annotation))
        if value is None and optional:
            continue
        if not _fits(value, default):
            raise _wrong(path, name, value, f"like {truncated(repr(default))}")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, list):
        inner = default[0] if isinstance(default, tuple | list) and default else default
        return not isinstance(default, str) and len(value) <= LONGEST_LIST and all(_fits(item, inner) for item in value)
    if isinstance(default, tuple | list):
        return False
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str) and len(value) <= 200
    if isinstance(default, int | float):
        return _is_size(value) or (isinstance(value, float) and (math.isfinite(value) or not math.isfinite(default)))
    return value is None or isinstance(value, str | bool | float) or _is_size(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and -1 <= value <= LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(path: Path, key: str, value: Any, due: str) -> ModelError:
    return ModelError(f"{path}: {key} is {truncated(repr(value))}, but must be {due}")
