"""The saliency mask: which entries of which parameters are trained. Bit-packed in memory and on disk.

Bits follow `numpy.packbits(mask.ravel(), bitorder="little")`, one uint8 array a parameter; bits past the last entry
are zero. Names are the parameters' own (for a UNet: diffusers' names).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salun.errors import MaskError, ModelError
from salun.masking.threshold import Selection, select_largest
from salun.untrusted import parse_json

_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
FORMAT = "salun-mask-1"


@dataclass(frozen=True, eq=False)
class Mask:
    """Selected entries of named parameters.

    bits: name → uint8 (⌈n/8⌉,), in module order. shapes: name → the parameter's shape.
    metadata: strings saved with it (method, requested density, scope, base hash, concept, seed, …).
    """

    bits: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)

    # -- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_scores(cls, scores: Mapping[str, Tensor], density: float | str | Decimal = 0.5) -> Mask:
        """The mask of exactly ⌊density·N⌋ entries with the largest scores over all parameters together.

        scores: name → float32 tensor, not negative; their order breaks ties (earlier parameter, then earlier index).
        Raises MaskError for a density outside (0, 1], one that selects nothing, or a score that is not finite.
        """
        return cls.from_selection(
            select_largest(scores, entries(sum(s.numel() for s in scores.values()), density)), scores
        )

    @classmethod
    def from_selection(cls, selection: Selection, parameters: Mapping[str, Tensor]) -> Mask:
        """The mask of what `select_largest` selected from tensors of these shapes."""
        return cls(selection.bits, {name: tuple(p.shape) for name, p in parameters.items()})

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> Mask:
        """The mask that boolean tensors describe."""
        return cls(
            {name: pack(tensor.flatten().cpu().numpy()) for name, tensor in dense.items()},
            {name: tuple(tensor.shape) for name, tensor in dense.items()},
        )

    @classmethod
    def full(cls, parameters: Mapping[str, Tensor]) -> Mask:
        """Every entry of every parameter."""
        bits = {}
        for name, parameter in parameters.items():
            n = parameter.numel()
            row = np.full((n + 7) // 8, 255, np.uint8)
            if n % 8:
                row[-1] = (1 << n % 8) - 1
            bits[name] = row
        return cls(bits, {name: tuple(p.shape) for name, p in parameters.items()})

    @classmethod
    def random(cls, parameters: Mapping[str, Tensor], density: float | str | Decimal, seed: int) -> Mask:
        """⌊density·N⌋ entries at random: the control that ignores the concept."""
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(p.shape, generator=generator) for name, p in parameters.items()}
        return cls.from_scores(scores, density)

    def shuffled(self, seed: int) -> Mask:
        """As many entries in each parameter as here, at random indices.

        Compared with `saliency`, it shows whether *which weights* matters, or only *how many per layer*.
        """
        generator = torch.Generator().manual_seed(seed)
        bits = {}
        for name, count in self.counts().items():
            scores = {name: torch.rand(self.shapes[name], generator=generator)}
            bits[name] = select_largest(scores, count).bits[name] if count else np.zeros_like(self.bits[name])
        return Mask(bits, self.shapes, dict(self.metadata))

    # -- reading --------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Selected entries of each parameter."""
        return {name: int(_POPCOUNT[row].sum(dtype=np.int64)) for name, row in self.bits.items()}

    @property
    def selected(self) -> int:
        """Number of selected entries."""
        return sum(self.counts().values())

    @property
    def total(self) -> int:
        """Number of entries."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """Selected entries over all entries."""
        return self.selected / self.total

    def densities(self) -> dict[str, float]:
        """Density of each parameter."""
        return {name: count / max(prod(self.shapes[name]), 1) for name, count in self.counts().items()}

    def dense(self, name: str) -> Tensor:
        """One parameter's mask as a boolean tensor of its shape."""
        n = prod(self.shapes[name])
        row = np.unpackbits(self.bits[name], count=n, bitorder="little").view(np.bool_)
        return torch.from_numpy(row).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __eq__(self, other: object) -> bool:
        """Equal in names, shapes and bits; metadata does not count."""
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shapes == other.shapes and all(np.array_equal(self.bits[k], other.bits[k]) for k in self.bits)

    __hash__ = None  # type: ignore[assignment]

    # -- comparing and combining ----------------------------------------------------------------------------------

    def __or__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_or)

    def __and__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_and)

    def __sub__(self, other: Mask) -> Mask:
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(self, other: Mask, operation) -> Mask:  # type: ignore[no-untyped-def]
        _same_parameters(self.shapes, other.shapes, "the other mask")
        return Mask({name: operation(row, other.bits[name]) for name, row in self.bits.items()}, dict(self.shapes))

    def jaccard(self, other: Mask) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for two empty masks."""
        union = (self | other).selected
        return (self & other).selected / union if union else 1.0

    def validate(self, parameters: Mapping[str, Tensor], what: str = "this model") -> None:
        """Raises MaskError naming parameters that are missing, unknown or of another shape."""
        partial = self.metadata.get("scope", "full") != "full"
        shapes = {name: tuple(p.shape) for name, p in parameters.items() if not partial or name in self.shapes}
        _same_parameters(self.shapes, shapes, what)

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: packed bits a parameter, shapes (JSON) and metadata in its header."""
        from salun.checkpoints import safetensors_io

        shapes = json.dumps({name: list(shape) for name, shape in self.shapes.items()}, separators=(",", ":"))
        tensors = {name: torch.from_numpy(row) for name, row in self.bits.items()}
        safetensors_io.write(Path(path), tensors, {**self.metadata, "format": FORMAT, "shapes": shapes})

    @classmethod
    def load(cls, path: Path | str) -> Mask:
        """Read a mask file, untrusted input. Raises MaskError if it is not one or its bits do not fit its shapes."""
        from salun.checkpoints import safetensors_io

        def damaged(what: str) -> MaskError:
            return MaskError(f"{path} is damaged: {what}")

        try:
            header = safetensors_io.read_header(Path(path))
            metadata = dict(header.metadata)
            if metadata.pop("format", None) != FORMAT:
                raise MaskError(f"{path} is not a salun mask (its header names no format {FORMAT})")
            listed = parse_json(metadata.pop("shapes", ""))
            if not isinstance(listed, dict) or not all(safetensors_io.is_shape(shape) for shape in listed.values()):
                raise damaged("its shape metadata is invalid")
            shapes = {name: tuple(shape) for name, shape in listed.items()}
            if set(shapes) != set(header.entries):
                raise damaged("shapes and bits name different parameters")
            if not any(map(prod, shapes.values())):
                raise damaged("it covers no parameters")
            bits = {}
            for name, tensor in safetensors_io.tensors(Path(path), shapes):
                n = prod(shapes[name])
                if tensor.dtype != torch.uint8 or tensor.shape != ((n + 7) // 8,) or (n % 8 and tensor[-1] >> n % 8):
                    short = safetensors_io.truncated(name)
                    raise damaged(f"the bits of {short} do not fit its shape {list(shapes[name])}")
                bits[name] = tensor.numpy()
        except ModelError as error:  # of the file itself
            raise MaskError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise damaged(f"its shapes are not JSON ({error})") from error
        return cls(bits, shapes, metadata)


def entries(total: int, density: float | str | Decimal) -> int:
    """⌊density·total⌋ in decimal arithmetic (0.29·100 is 29, not 28).

    Raises MaskError for a density outside (0, 1] or one so small that nothing is selected.
    """
    exact = Decimal(str(density))
    if not exact.is_finite() or not 0 < exact <= 1:
        raise MaskError(
            f"density is {density}, but must be above 0 and at most 1 (the fraction of weights that are trained)"
        )
    count = int(exact * total)
    if not count:
        raise MaskError(f"density {density} of {total:,} weights selects none", advice="Use a larger {density}")
    return count


def entries_each(sizes: Mapping[str, int], density: float | str | Decimal) -> dict[str, int]:
    """⌊density·N⌋ entries, N of all sizes, shared among tensors by their sizes: density·n of each, rounded.

    Each gets ⌊density·n⌋, and those with the largest remainders one more (ties go to the earlier tensor). Raises
    MaskError as `entries`.
    """
    exact = Decimal(str(density))
    missing = entries(sum(sizes.values()), density)
    counts = {name: int(exact * n) for name, n in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: exact * sizes[name] - counts[name], reverse=True)
    for name in by_remainder[: missing - sum(counts.values())]:
        counts[name] += 1
    return counts


def pack(selected: np.ndarray) -> np.ndarray:
    """Booleans (n,) → packed bits (⌈n/8⌉,)."""
    return np.packbits(selected, bitorder="little")


def _same_parameters(masked: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing = [name for name in masked if name not in model]
    extra = [name for name in model if name not in masked]
    wrong = [
        f"{name} is {list(model[name])}, the mask has {list(shape)}"
        for name, shape in masked.items()
        if name in model and model[name] != shape
    ]
    faults = [
        f"{len(names)} {label} ({'; '.join(names[:3])}{'; …' if len(names) > 3 else ''})"
        for names, label in ((missing, "not in it"), (extra, "not in the mask"), (wrong, "of another shape"))
        if names
    ]
    if faults:
        raise MaskError(f"the mask does not fit {what}: " + ", ".join(faults) + "; make a mask from this model")
