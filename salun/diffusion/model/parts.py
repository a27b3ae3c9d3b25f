"""Modules built without memory and filled with a file's tensors, every shape checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.diffusers_folder import weights_of
from salun.checkpoints.single_file import CheckpointContents
from salun.checkpoints.sizes import check_size, first_line
from salun.diffusion.model.configs import check_part
from salun.errors import ModelError, some


def load_strict(kind: Any, folder: Path, **keywords: Any) -> Any:
    """A part of a diffusers folder, by the library's own `from_pretrained`, which makes up tensors that are missing.

    Its weights are those that `weights_of` chooses. Raises ModelError for tensors that are missing, too many or
    misshapen, and for NaN or infinity.
    """
    config = check_part(kind, folder, str(folder.parent))
    keywords |= {"use_safetensors": True, "variant": weights_of(folder).variant, "local_files_only": True}
    if config is not None:
        keywords |= {"config": config, "trust_remote_code": False}
    try:
        part, report = kind.from_pretrained(folder, output_loading_info=True, **keywords)
    except Exception as error:  # the libraries raise many kinds; each means that the files hold no such part
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
    faults = (
        ("is incomplete: missing", report.get("missing_keys")),
        ("has unexpected tensors:", report.get("unexpected_keys")),
        ("has tensors of other shapes:", report.get("mismatched_keys")),
    )
    for what, names in faults:
        listed = sorted(str(name) for name in names or () if not str(name).endswith("position_ids"))
        if listed:
            raise ModelError(f"{folder} {what} {some(listed)}", advice="Download it again")
    bad = next((n for n, p in part.named_parameters() if not torch.isfinite(p.float()).all()), None)
    if bad is not None:
        raise ModelError(f"{folder}: {bad} is not finite (NaN or infinity)")
    return part


def empty_module(make: Callable[[], Any], contents: CheckpointContents, config: Mapping[str, Any] | None) -> Any:
    """A module without memory for its parameters, to be filled. (Buffers are real: the file does not hold them.)

    config: from `components`, if the module is built by it.
    """
    from accelerate import init_empty_weights

    if config is not None:
        check_size(make, sum(prod(entry.shape) for entry in contents.header.entries.values()), contents.path)
    try:
        with init_empty_weights(include_buffers=False):
            return make()
    except Exception as error:  # the libraries raise many kinds; each means that the shapes are of no such part
        raise ModelError(
            f"{contents.path}: no model can be built from its shapes ({first_line(error)})",
            advice="Give a diffusers folder with its configs as {components}",
        ) from error


def fill_module(
    module: Any,
    tensors: Mapping[str, Callable[[], Tensor]],
    precision: torch.dtype,
    path: Path,
    inner: Callable[[str], str],
) -> None:
    """Give a module its parameters, one at a time. Raises ModelError naming tensors missing, too many or misshapen."""
    wanted = dict(module.named_parameters())
    check_state_dict(wanted, tensors, path, inner)
    for name, parameter in wanted.items():
        tensor = tensors[name]()
        if tensor.shape != parameter.shape:
            raise _wrong_shape(path, inner(name), tensor.shape, parameter.shape)
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{path}: {inner(name)} is not finite (NaN or infinity)")
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner).register_parameter(
            last, torch.nn.Parameter(tensor.to(precision), requires_grad=False)
        )


def check_state_dict(
    wanted: Mapping[str, Any],
    there: Mapping[str, Any],
    path: Path,
    inner: Callable[[str], str],
    why: str = "the model is incomplete",
) -> None:
    """Raises ModelError where names differ, or shapes where both sides hold shapes. why: what a missing name means."""
    missing, extra = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    if missing:
        raise ModelError(f"{path} lacks {some(missing)} (diffusers' names): {why}")
    if extra:
        raise ModelError(f"{path} has unexpected tensors: {some([safetensors_io.truncated(inner(n)) for n in extra])}")
    for name, shape in wanted.items():
        if isinstance(shape, tuple) and shape != there[name]:
            raise _wrong_shape(path, inner(name), there[name], shape)


def _wrong_shape(path: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> ModelError:
    return ModelError(f"{path}: {name} has the shape {list(shape)}, but {list(expected)} is expected")
