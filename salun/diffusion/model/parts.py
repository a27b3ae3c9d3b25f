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
from salun.checkpoints.single_file import Contents
from salun.checkpoints.sizes import check_size, first_line
from salun.diffusion.model.configs import check_part
from salun.errors import ModelError, some


def whole(kind: Any, folder: Path, **keywords: Any) -> Any:
    """A part of a diffusers folder, by the library's own `from_pretrained`, which makes up tensors that are missing.

    Its weights are those that `weights_of` chooses. Raises ModelError for tensors that are missing, too many or
    misshapen, and for NaN or infinity.
    """
    config = check_part(kind, folder, str(folder.parent))
    keywords |= {"use_safetensors": True, "variant": weights_of(folder).variant, "local_files_only": True}
    if config is not None:
        keywords |= {"config": config, "trust_remote_code": False}
    try:
        part, told = kind.from_pretrained(folder, output_loading_info=True, **keywords)
    except Exception as error:  # the libraries raise many kinds; each means that the files hold no such part
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
    faults = (
        ("lacks", told.get("missing_keys")),
        ("holds, though no model of its kind does,", told.get("unexpected_keys")),
        ("has in another shape", told.get("mismatched_keys")),
    )
    for what, names in faults:
        some = sorted(str(name) for name in names or () if not str(name).endswith("position_ids"))
        if some:
            raise ModelError(f"{folder} {what} {', '.join(some[:3])}: it is not whole; fetch it again")
    bad = next((n for n, p in part.named_parameters() if not torch.isfinite(p.float()).all()), None)
    if bad is not None:
        raise ModelError(f"{folder}: {bad} holds NaN or infinity, so nothing can be computed with it")
    return part


def empty_module(make: Callable[[], Any], contents: Contents, config: Mapping[str, Any] | None) -> Any:
    """A module without memory for its parameters, to be filled. (Buffers are real: the file does not hold them.)

    config: of --components, if the module is built by it.
    """
    from accelerate import init_empty_weights

    if config is not None:
        check_size(make, sum(prod(entry.shape) for entry in contents.header.entries.values()), contents.path)
    try:
        with init_empty_weights(include_buffers=False):
            return make()
    except Exception as error:  # the libraries raise many kinds; each means that the shapes are of no such part
        raise ModelError(
            f"{contents.path}: no model can be built of its shapes ({first_line(error)}); --components may tell more"
        ) from error


def _fill(
    module: Any,
    tensors: Mapping[str, Callable[[], Tensor]],
    precision: torch.dtype,
    path: Path,
    inner: Callable[[str], str],
) -> None:
    """Give a module its parameters, one at a time. Raises ModelError naming tensors missing, too many or misshapen."""
    wanted = dict(module.named_parameters())
    agree(wanted, tensors, path, inner)
    for name, parameter in wanted.items():
        tensor = tensors[name]()
        if tensor.shape != parameter.shape:
            raise _misshapen(path, inner(name), tensor.shape, parameter.shape)
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{path}: {inner(name)} holds NaN or infinity, so nothing can be computed with it")
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner).register_parameter(
            last, torch.nn.Parameter(tensor.to(precision), requires_grad=False)
        )


def agree(
    wanted: Mapping[str, Any],
    there: Mapping[str, Any],
    path: Path,
    inner: Callable[[str], str],
    why: str = "it is not whole",
) -> None:
    """Raises ModelError where names differ, or shapes where both sides hold shapes. why: what a missing name means."""
    missing, extra = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    if missing:
        raise ModelError(f"{path} lacks {some(missing)} (diffusers' names): {why}")
    if extra:
        raise ModelError(
            f"{path} holds {some([safetensors_io.truncated(inner(n)) for n in extra])}, which no model of its kind has"
        )
    for name, shape in wanted.items():
        if isinstance(shape, tuple) and shape != there[name]:
            raise _misshapen(path, inner(name), there[name], shape)


def _misshapen(path: Path, name: str, found: Sequence[int], due: Sequence[int]) -> ModelError:
    return ModelError(f"{path}: {name} has the shape {list(found)}, where {list(due)} is due")
