"""LoRA files: what an erasure changed, for ComfyUI, A1111 and Forge without salun.

`full_difference` writes every difference (`.diff`, `.diff_b`); `low_rank` keeps the best approximation of each matrix
by one of low rank (LoRA), and reports what that loses. The names are those that all three hosts match to a module for
each family of models; docs/formats.md says what was tried. Anyone with such a file can undo the erasure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.families.classes import DIT, PIXELS
from salun.checkpoints.families.registry import family_for_hosts, recognize
from salun.checkpoints.lazy_tensors import Planned, PlannedTensors, reporting
from salun.checkpoints.outputs import DIFF
from salun.delta.delta import Delta
from salun.delta.provenance import BASE_HASH, RESULT_HASH, joined, notes_in
from salun.errors import ConfigError, ModelError, some
from salun.progress import Event, Progress, Stage, silent

_KINDS = {  # a part of a parameter's name → its kind; the first that is there counts
    "time_emb_proj": "time",
    "time_embedding": "time",
    "add_embedding": "time",
    "attn1": "attn1",
    "attn2": "attn2",
    "ff": "feed-forward",
    "resnets": "resnet",
}
_HARDLY_SMALLER = 0.8  # of the full difference's bytes
_NOISE = 1e-13  # squared singular values below this fraction of the largest are float64's rounding, not the difference


# -- names ------------------------------------------------------------------------------------------------------------


def module_keys(names: Iterable[str]) -> dict[str, str]:
    """diffusers name → key of its module in LoRA files (`lora_unet_…`), the same for its weight and its bias.

    names: of all the network's tensors. Raises KeyError naming a tensor that no network of its family has.
    """
    names = list(names)
    labeled = next((of.network for of in (PIXELS, DIT) if of.network.is_conditioned(dict.fromkeys(names, ()))), None)
    if labeled is not None:
        return labeled.lora_modules(names)
    return recognize(dict.fromkeys(names, ())).network.lora_modules(names)


def host_metadata(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata by which A1111 and Forge list the file under its family of models.

    Without it A1111 takes any file that has metadata for one of SD 1, and hides it while another family is loaded.
    base: all the network's tensors, of which one is read.
    """
    family = family_for_hosts(base)
    return {**family.lora_metadata, "modelspec.architecture": f"{family.architecture}/lora"}


# -- full differences -------------------------------------------------------------------------------------------------


def full_difference(
    base: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float16,
    progress: Progress = silent,
) -> PlannedTensors:
    """Key in LoRA files → new − old, in the tensor's shape: `.diff` for weights, `.diff_b` for biases, of norms too.

    Each is made on access: together they take as much memory as the network. Where a bias changed alone, its
    weight gets a `.diff` of zeros: A1111 rejects a file that has a `.diff_b` without.

    Args:
        base: All the network's tensors by diffusers' names, read one at a time.
        changed: Those that changed.

    Raises:
        ModelError: Nothing changed, the tensors do not pair up, or a difference is not finite or too large for dtype.
            Each tensor is checked once before the first is made.
    """
    keys = module_keys(base)
    planned: dict[str, Planned] = {}
    for name, difference in _differences(base, reporting(changed, Stage.COMPARING, progress)):
        key = f"{keys[name]}.{'diff_b' if name.endswith('.bias') else 'diff'}"
        shape = tuple(_cast(difference, dtype, name).shape)
        planned[key] = Planned(dtype, shape, partial(_cast_difference, base, changed, name, dtype))
    if not planned:
        raise _nothing_changed()
    for name, module in keys.items():
        key = f"{module}.diff"
        if name.endswith(".weight") and f"{module}.diff_b" in planned and key not in planned:
            shape = tuple(base[name].shape)
            planned[key] = Planned(dtype, shape, partial(torch.zeros, shape, dtype=dtype))
    return PlannedTensors(planned)


# -- low rank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyKept:
    """How much of a difference a low-rank file holds.

    energy: the squared Frobenius norm of the difference. held: the part of it that the file holds. ranks: of the layers
    that it holds; empty for a norm or a bias, which low rank cannot hold.
    """

    energy: float
    held: float
    ranks: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """held ÷ energy, from 0 to 1."""
        return self.held / self.energy

    @classmethod
    def of(cls, parts: Iterable[EnergyKept]) -> EnergyKept:
        """The sum of several."""
        parts = list(parts)
        ranks = tuple(rank for part in parts for rank in part.ranks)
        return cls(sum(part.energy for part in parts), sum(part.held for part in parts), ranks)


@dataclass(frozen=True)
class LowRankReport:
    """How much of each changed parameter a low-rank file holds.

    layers: diffusers name → EnergyKept, in the network's order. size: bytes of its tensors;
    full_size: bytes of the full difference.
    """

    layers: dict[str, EnergyKept]
    size: int
    full_size: int

    @property
    def groups(self) -> dict[str, EnergyKept]:
        """The same per block and kind of layer, such as "up_blocks.1 attn2": see `group_of`."""
        members: dict[str, list[EnergyKept]] = {}
        for name, energy in self.layers.items():
            members.setdefault(group_of(name), []).append(energy)
        return {group: EnergyKept.of(parts) for group, parts in members.items()}

    @property
    def total(self) -> EnergyKept:
        """The same over all layers."""
        return EnergyKept.of(self.layers.values())

    @property
    def left_out(self) -> list[str]:
        """Norms and biases that changed and that the file does not hold."""
        return [name for name, energy in self.layers.items() if not energy.ranks]

    @property
    def warning(self) -> str:
        """A warning if the file is hardly smaller than the full difference, else ""."""
        if self.size < _HARDLY_SMALLER * self.full_size:
            return ""
        return (
            f"the file has {self.size / self.full_size:.0%} of the size of the full difference (x.diff.safetensors), "
            "which loses nothing: use a fixed rank, such as 16, for a small file"
        )

    def as_json(self) -> dict[str, Any]:
        """`kept` (a fraction) in total, per `groups` and per `layers`, with the lowest and highest rank.

        `left_out`: names. `bytes` and `bytes_in_full`: of its tensors, and of the full difference's.
        """

        def row(energy: EnergyKept) -> dict[str, Any]:
            return {"kept": energy.fraction, "ranks": [min(energy.ranks), max(energy.ranks)] if energy.ranks else None}

        return {
            **row(self.total),
            "groups": {group: row(energy) for group, energy in self.groups.items()},
            "layers": {name: row(energy) for name, energy in self.layers.items()},
            "left_out": self.left_out,
            "bytes": self.size,
            "bytes_in_full": self.full_size,
        }


def low_rank(
    base: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], LowRankReport]:
    """Stock key → tensor of a LoRA, and what it holds.

    Each changed linear or convolution (out, in[, kh, kw]), as a matrix (out, in·kh·kw), becomes `.lora_up.weight`
    (out, r[, 1, 1]), `.lora_down.weight` (r, in[, kh, kw]) and `.alpha` = r: the nearest matrix of rank r (Eckart and
    Young). r is `rank`, or the layer's if that is less; or the least that holds the fraction `energy` of the squared
    norm. base, changed, and ModelError as in `full_difference`; also if only norms and biases changed.
    Raises ConfigError unless exactly one of rank (≥ 1) and energy (in (0, 1]) is given.
    """
    check_rank(rank, energy)
    keys = module_keys(base)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, EnergyKept] = {}
    full_size = 0
    for name, difference in _differences(base, changed):
        full_size += difference.numel() * dtype.itemsize
        if difference.dim() < 2:
            layers[name] = EnergyKept(float(difference.square().sum()), 0.0, ())
            continue
        up, down, layers[name] = _truncated_svd(difference.flatten(1), rank, energy)
        r, ones = up.shape[1], (1,) * (difference.dim() - 2)
        tensors[f"{keys[name]}.lora_up.weight"] = _cast(up.reshape(-1, r, *ones), dtype, name)
        tensors[f"{keys[name]}.lora_down.weight"] = _cast(down.reshape(r, *difference.shape[1:]), dtype, name)
        tensors[f"{keys[name]}.alpha"] = torch.tensor(float(r))
    if not layers:
        raise _nothing_changed()
    if not tensors:
        raise ModelError(
            "only norms and biases changed, which low rank cannot hold", advice="Write the full difference"
        )
    return tensors, LowRankReport(layers, sum(t.numel() * t.element_size() for t in tensors.values()), full_size)


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raises ConfigError unless exactly one of the two is given, in its range."""
    if (rank is None) == (energy is None):
        raise ConfigError("a low-rank file needs either a rank or an energy", advice="Give one of {rank} and {energy}")
    if rank is not None and rank < 1:
        raise ConfigError(f"is {rank}, but must be at least 1", option="rank")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"is {energy}, but must be over 0 and at most 1", option="energy")


def _truncated_svd(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, EnergyKept]:
    """(up (out, r), down (r, n), what they hold) of a float64 matrix (out, n) that is not zero.

    From the eigenvectors of the smaller side's Gram matrix: as exact as an SVD far beyond float16's precision, and many
    times faster for a wide matrix. Both factors get the square root of the singular values, so that neither is small.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    sums = values.cumsum(0)
    r = rank if energy is None else int(torch.searchsorted(sums, energy * sums[-1])) + 1
    r = min(r or 1, int((values > _NOISE * values[0]).sum()))
    basis = vectors[:, :r]
    rows = basis.T @ wide
    scale = rows.norm(dim=1).sqrt()
    left, right = basis * scale, rows / scale[:, None]
    up, down = (right.T, left.T) if tall else (left, right)
    return up, down, EnergyKept(float(sums[-1]), float(sums[r - 1]), (r,))


def group_of(name: str) -> str:
    """Block and kind of a UNet parameter: "down_blocks.0 attn1", "mid_block resnet", "outside time", ….

    Kinds: attn1, attn2, feed-forward, resnet (convolutions), time, norm, other (projections, samplers, ends). A bias
    goes with its layer.
    """
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        block = ".".join(parts[:2])
    else:
        block = "mid_block" if parts[0] == "mid_block" else "outside"
    if "norm" in parts[-2]:
        return f"{block} norm"
    kinds = (kind for part, kind in _KINDS.items() if part in parts)
    return f"{block} {next(kinds, 'other')}"


# -- differences ------------------------------------------------------------------------------------------------------


def _differences(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, new − old in float64) of each tensor that differs, in the base's order."""
    lone = sorted(set(changed) - set(base))
    if lone:
        raise ModelError(f"the base has no {some(lone)}", advice="Give the model that was changed")
    for name in base:
        if name in changed and (difference := _difference(base, changed, name)).any():
            yield name, difference


def _difference(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], name: str) -> Tensor:
    old, new = base[name], changed[name]
    if old.shape != new.shape:
        raise ModelError(f"{name} is {list(old.shape)} in the base and {list(new.shape)} in the changed model")
    difference = new.detach().cpu().double() - old.detach().cpu().double()
    if not torch.isfinite(difference).all():
        raise ModelError(f"the difference of {name} is not finite: one of the two models is damaged")
    return difference


def _cast_difference(
    base: Mapping[str, Tensor], changed: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> Tensor:
    return _cast(_difference(base, changed, name), dtype, name)


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = value.to(dtype).contiguous()
    if not torch.isfinite(result).all():
        raise ModelError(f"the difference of {name} reaches {float(value.abs().max()):.3g}, too large for {dtype}")
    return result


def _nothing_changed() -> ModelError:
    return ModelError("the two models are equal: there is no difference to write")


ENERGY = 0.9  # default of a low-rank file


def stock_notes(delta: Delta) -> dict[str, str]:
    """Metadata of a stock loader's file: what the delta says of itself, and which it is."""
    identity = {"salun.delta": delta.id, BASE_HASH: delta.base_hash, RESULT_HASH: delta.result_hash}
    return {**joined([notes_in(delta.metadata)]), **identity}


def write_stock(
    path: Path,
    base: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    notes: Mapping[str, str],
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = silent,
) -> LowRankReport | None:
    """Write a stock loader's file, low-rank or full by its name; returns what a low-rank one holds.

    base: the whole UNet. changed: its tensors that differ, as they are to be. rank, energy: of the low-rank file, as in
    `low_rank`; without either, ranks that keep 90 % of the difference.
    """
    held = {**notes, **host_metadata(base)}
    if path.name.endswith(DIFF):
        made = full_difference(base, changed, progress=progress)
        safetensors_io.write_lazily(path, made.described, reporting(made, Stage.WRITING, progress), held)
        return None
    compared = reporting(changed, Stage.COMPARING, progress)
    tensors, account = low_rank(base, compared, rank=rank, energy=ENERGY if rank is energy is None else energy)
    safetensors_io.write(path, tensors, {**held, "salun.energy_kept": f"{account.total.fraction:.6f}"})
    if account.warning:
        progress(Event(Stage.WRITING, message=f"{path.name}: {account.warning}"))
    return account
