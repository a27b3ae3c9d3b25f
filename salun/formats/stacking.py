"""Deltas applied to a model: at any strength, several at once, to another dtype, or to a fine-tune of their base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from salun.errors import ConfigError, ModelError
from salun.formats.change import patterns, values
from salun.formats.hashing import Hasher
from salun.progress import Event, Progress, silent

if TYPE_CHECKING:
    from salun.formats.delta import Delta

STRENGTHS = (-0.5, 1.5)
OTHER_DTYPE = "the model is in another dtype than the delta's base: it gets the differences, rounded once"
OTHER_MODEL = "the model is another than the delta's base: it gets the differences, rounded once"


@dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, Tensor]):
    """The tensors that deltas change, each made from the model's when it is asked for.

    model: the whole UNet before. layers: (delta, strength), in the order of the deltas' ids. source: where the old
    values that the deltas start from are known, if not in the model. base_hash, result_hash: of the model before and
    after, where computed. note: what is not exact, in words.
    """

    model: Mapping[str, Tensor]
    layers: tuple[tuple[Delta, float], ...]
    source: Mapping[str, Tensor] | None = None
    base_hash: str = ""
    result_hash: str = ""
    note: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name, self.model[name])

    def __contains__(self, name: object) -> bool:
        return any(name in delta.changes for delta, _ in self.layers)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.model if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def make(self, name: str, tensor: Tensor) -> Tensor:
        """One tensor after, from the model's.

        An entry that one delta alone changes, at strength 1, gets the erased model's bits; others, and all where the
        old values are another source's, get old + Σ s·(new − old) in float32, rounded once.
        """
        changes = [(delta.changes[name], s) for delta, s in self.layers if s and name in delta.changes]
        if self.source is None and [s for _, s in changes] == [1.0]:
            return changes[0][0].flip(tensor)
        old = tensor if self.source is None else self.source[name]
        result = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        bits = patterns(result)
        sums, times = torch.zeros(len(bits)), np.zeros(len(bits), np.uint16)
        for change, strength in changes:
            chosen = change.chosen()
            sums.numpy()[chosen] = torch.from_numpy(sums.numpy()[chosen]) + strength * change.difference(old)
            times[chosen] += 1
        moved = times > 0
        new = values(bits[moved], result.dtype) + torch.from_numpy(sums.numpy()[moved])
        rounded = new.to(result.dtype)
        if (
            not torch.isfinite(rounded.float()).all()
            and torch.isfinite(values(bits[moved], result.dtype).float()).all()
        ):
            raise ModelError(f"{name} would hold a value that {result.dtype} cannot: take a smaller strength")
        bits[moved] = patterns(rounded)
        for change, strength in changes:
            if self.source is None and strength == 1.0:
                chosen = change.chosen()
                bits[chosen] = np.where(times[chosen] == 1, change.flipped(old), bits[chosen])
        return result

    def hashes(self, progress: Progress = silent) -> tuple[str, str]:
        """Base hashes of the model before and after, reading each tensor once; the second is "" if some do not fit."""
        before, after = Hasher(), Hasher()
        there = set(self.model)
        fits = all(name in there for delta, _ in self.layers for name in delta.changes)
        for i, name in enumerate(sorted(self.model), 1):
            tensor = self.model[name]
            before.add(name, tensor)
            fits = fits and self.fits(name, tensor)
            if fits:
                after.add(name, self.make(name, tensor) if name in self else tensor)
            progress(Event("checking", i, len(self.model)))
        return before.hash, after.hash if fits else ""

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor has the shape that the deltas change, and it or the source's the dtype."""
        changes = [delta.changes[name] for delta, _ in self.layers if name in delta.changes]
        old = self.source[name] if changes and self.source is not None else tensor
        return all(
            (change.dtype, change.shape) == (old.dtype, tuple(old.shape)) and old.shape == tensor.shape
            for change in changes
        )

    def misfits(self) -> list[str]:
        """Names of tensors that the deltas change and that do not fit or are not in the model."""
        names, there = {name for delta, _ in self.layers for name in delta.changes}, set(self.model)
        return [name for name in sorted(names) if name not in there or not self.fits(name, self.model[name])]


def stack(
    model: Mapping[str, Tensor],
    layers: Sequence[tuple[Delta, float]],
    *,
    fine_tune_of: Mapping[str, Tensor] | None = None,
    known_hash: str | None = None,
    progress: Progress = silent,
) -> Stacked:
    """The tensors that deltas of one base make of it, each with its strength; in which order they come is the same.

    model: the whole UNet; it may read its tensors lazily. A copy of the base in another dtype, which gives the base
    when cast to its dtypes, gets the differences, and so does any model of the same names and shapes with the deltas'
    base as `fine_tune_of`; `note` says so. known_hash: the model's base hash, where it is known; no hash is computed
    then. Raises ConfigError for a strength outside −0.5…1.5 or a delta that comes twice; ModelError for deltas of
    several bases, for another model than theirs, telling both hashes, and for a result whose hash is not the delta's.
    """
    layers = tuple(sorted(layers, key=lambda layer: layer[0].id))
    for _, strength in layers:
        if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
            raise ConfigError(f"strength is {strength}, but must be from {STRENGTHS[0]} to {STRENGTHS[1]}")
    first = layers[0][0]
    for (one, _), (other, _) in combinations(layers, 2):
        if one.id == other.id:
            raise ConfigError(f"the delta {one.id} is given twice: give it once, with the strength that it should have")
        if one.base_hash != other.base_hash:
            raise ModelError(
                f"the deltas {one.id} and {other.id} are for different bases (hashes {one.base_hash[:12]}… and "
                f"{other.base_hash[:12]}…): stack deltas of one base"
            )
    stacked = Stacked(model, layers)
    before, after = (known_hash, "") if known_hash else stacked.hashes(progress)
    if before != first.base_hash:
        if fine_tune_of is None:
            source, note = _cast_to(first, model, before, progress), OTHER_DTYPE
        else:
            source, note = _own_base(first, fine_tune_of, model, progress), OTHER_MODEL
        stacked = replace(stacked, source=source, note=note)
        after = "" if known_hash else stacked.hashes(progress)[1]
    wrong = [] if after else stacked.misfits()
    if wrong:
        raise ModelError(f"the model's {', '.join(wrong[:3])} are of other shapes than the delta's, or not there")
    if stacked.source is None and [s for _, s in layers] == [1.0] and after not in ("", first.result_hash):
        raise damaged("what it gives is not its erased model")
    return replace(stacked, base_hash=before, result_hash=after)


def _cast_to(delta: Delta, model: Mapping[str, Tensor], found: str, progress: Progress) -> Mapping[str, Tensor]:
    """The model cast to the dtypes of the delta's base, which must give the base. Raises ModelError otherwise."""
    if found == delta.result_hash:
        raise _other_base(delta, found, "this is what it gives, so it is applied already")
    given, cast = Hasher(rounded=True), Hasher()
    for i, name in enumerate(sorted(model), 1):
        tensor = model[name]
        given.add(name, tensor)
        cast.add(name, tensor.to(delta.dtype_of(name)))
        progress(Event("checking", i, len(model)))
    if cast.hash == delta.base_hash:
        return _Cast(model, delta)
    if given.fp16 == delta.base_hash_fp16:
        raise _other_base(
            delta, found, "it is the same model in another dtype, which has lost bits; --fine-tune-of-base, with the "
            "base that the delta was made from, adds the differences to it"
        )  # fmt: skip
    raise _other_base(
        delta, found, "start from that base, or add the differences to this model by --fine-tune-of-base and that base"
    )


def _own_base(
    delta: Delta, base: Mapping[str, Tensor], model: Mapping[str, Tensor], progress: Progress
) -> Mapping[str, Tensor]:
    """The delta's own base, to be a source for a model with the same tensors. Raises ModelError otherwise."""
    lone = sorted(set(base) ^ set(model))
    if lone:
        raise ModelError(f"the model and the base do not hold the same tensors: {', '.join(lone[:3])} only on one side")
    hasher = Hasher()
    for i, name in enumerate(sorted(base), 1):
        hasher.add(name, base[name])
        progress(Event("checking", i, len(base)))
    if hasher.hash != delta.base_hash:
        raise _other_base(delta, hasher.hash, "--fine-tune-of-base takes the base that the delta was made from")
    return base


@dataclass(frozen=True, eq=False)
class _Cast(Mapping[str, Tensor]):
    """A model's tensors in the dtypes of a delta's base."""

    model: Mapping[str, Tensor]
    delta: Delta

    def __getitem__(self, name: str) -> Tensor:
        return self.model[name].to(self.delta.dtype_of(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)


def _other_base(delta: Delta, found: str, advice: str) -> ModelError:
    return ModelError(f"this delta is for another base (hash {delta.base_hash[:12]}…, given {found[:12]}…): {advice}")


def damaged(what: str) -> ModelError:
    return ModelError(f"the delta is damaged: {what}; fetch or make it again")


def overlaps(deltas: Sequence[Delta]) -> dict[tuple[str, str], int]:
    """How many entries each two deltas of one base both change: (id, id), in order → entries."""
    return {
        (one.id, other.id): sum(
            change.both(other.changes[name]) for name, change in one.changes.items() if name in other.changes
        )
        for one, other in combinations(sorted(deltas, key=lambda delta: delta.id), 2)
    }
