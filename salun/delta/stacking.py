"""Deltas applied to a model: at any strength, several at once, in another dtype, or to a fine-tune of their base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from salun.checkpoints.hashing import Hasher
from salun.checkpoints.lazy_tensors import LazyTensors
from salun.delta.xor import Change, patterns, values
from salun.errors import ConfigError, ModelError, some
from salun.progress import Event, Progress, Stage, silent

STRENGTHS = (-0.5, 1.5)
ADD_DIFFERENCES = "With its base as {fine_tune_of_base}, `salun delta apply` adds the differences"
OTHER_DTYPE = "the model is in another dtype than the delta's base: the differences are added, rounded once"
OTHER_MODEL = "the model is not the delta's base: the differences are added, rounded once"


class SparseDelta(Protocol):
    """What must be known of a delta to apply it; `salun.delta.delta.Delta` is one."""

    @property
    def changes(self) -> dict[str, Change]:
        """Tensor name → its changed entries."""

    @property
    def base_hash(self) -> str:
        """Hash of the model that the delta was made from."""

    @property
    def base_hash_fp16(self) -> str:
        """The same over tensors rounded to fp16."""

    @property
    def result_hash(self) -> str:
        """Hash of the model with the delta in it."""

    @property
    def id(self) -> str:
        """The delta's own hash."""

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor of the base has."""


class BaseMismatch(ModelError):
    """A delta applied to a model that is not its base. expected, actual: the two base hashes."""

    def __init__(self, expected: str, actual: str, reason: str, advice: str = "") -> None:
        what = f"the delta was made for the base {expected[:12]}…, but this is {actual[:12]}…"
        super().__init__(what + (f": {reason}" if reason else ""), advice=advice, code="wrong-base")
        self.expected, self.actual = expected, actual


class Hashes(NamedTuple):
    """Base hashes around an application of deltas.

    before: of the model. start: of the old values that the deltas start from: the model's in the dtypes of the deltas'
    base, or the source's. after: of the result, "" if some tensors do not fit.
    """

    before: str
    start: str
    after: str


@dataclass(eq=False)
class AppliedDeltas(LazyTensors):
    """The tensors that deltas change, each made from the model's on access.

    model: the whole UNet before. layers: (delta, strength), in the order of the deltas' ids. source: where the old
    values that the deltas start from are known, if not in the model. base_hash, result_hash: of the model before and
    after, where computed. note: a sentence on what is not exact.
    """

    model: Mapping[str, Tensor]
    layers: tuple[tuple[SparseDelta, float], ...]
    source: Mapping[str, Tensor] | None = None
    base_hash: str = ""
    result_hash: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        changed = {name for delta, _ in self.layers for name in delta.changes}
        super().__init__((name for name in self.model if name in changed), self._changed)

    def _changed(self, name: str) -> Tensor:
        tensor = self.model[name]
        return self.compute(name, tensor, self.base_of(name, tensor))

    def base_of(self, name: str, tensor: Tensor) -> Tensor:
        """What the deltas start from in a tensor of the model: itself where it is as their base has it."""
        return tensor.to(self.layers[0][0].dtype_of(name)) if self.source is None else self.source[name]

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """All tensors that the deltas start from."""
        if self.source is not None:
            return self.source
        return LazyTensors(self.model, lambda name: self.base_of(name, self.model[name]))

    def compute(self, name: str, tensor: Tensor, old: Tensor) -> Tensor:
        """One tensor after, from the model's and what `old` gives for it.

        An entry that one delta alone changes, at strength 1, gets the erased model's bits; others, and all where the
        old values are not the model's own, get the model's + Σ s·(new − old) in float32, rounded once.
        """
        changes = [(delta.changes[name], s) for delta, s in self.layers if s and name in delta.changes]
        if old is tensor and [s for _, s in changes] == [1.0]:
            return changes[0][0].apply(tensor)
        result = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        bits = patterns(result)
        sums, times = torch.zeros(len(bits)), np.zeros(len(bits), np.uint16)
        for change, strength in changes:
            chosen = change.as_index()
            sums.numpy()[chosen] = torch.from_numpy(sums.numpy()[chosen]) + strength * change.difference(old)
            times[chosen] += 1
        moved = times > 0
        new = values(bits[moved], result.dtype) + torch.from_numpy(sums.numpy()[moved])
        rounded = new.to(result.dtype)
        if (
            not torch.isfinite(rounded.float()).all()
            and torch.isfinite(values(bits[moved], result.dtype).float()).all()
        ):
            raise ModelError(f"{name} overflows {result.dtype}", advice="Use a smaller {strength}")
        bits[moved] = patterns(rounded)
        for change, strength in changes:
            if old is tensor and strength == 1.0:
                chosen = change.as_index()
                bits[chosen] = np.where(times[chosen] == 1, change.xor_bits(old), bits[chosen])
        return result

    def hashes(self, progress: Progress = silent) -> Hashes:
        """All three, reading each tensor once."""
        before, after = Hasher(), Hasher()
        start: Hasher | None = None  # from the first tensor on that is not as the deltas' base has it
        there = set(self.model)
        fits = all(name in there for delta, _ in self.layers for name in delta.changes)
        for i, name in enumerate(sorted(self.model), 1):
            tensor = self.model[name]
            old = self.base_of(name, tensor)
            if old is not tensor and start is None:
                start = before.copy()
            before.add(name, tensor)
            if start is not None:
                start.add(name, old)
            fits = fits and self.is_compatible(name, tensor, old)
            if fits:
                after.add(name, self.compute(name, tensor, old) if name in self else tensor)
            progress(Event(Stage.CHECKING, i, len(self.model)))
        return Hashes(before.hash, (start or before).hash, after.hash if fits else "")

    def is_compatible(self, name: str, tensor: Tensor, old: Tensor) -> bool:
        """Whether a tensor, and what the deltas start from in it, have the shape and dtype that the deltas change."""
        changes = [delta.changes[name] for delta, _ in self.layers if name in delta.changes]
        return all(
            (change.dtype, change.shape) == (old.dtype, tuple(old.shape)) and old.shape == tensor.shape
            for change in changes
        )

    def incompatible_names(self) -> list[str]:
        """Names of tensors that the deltas change and that do not fit or are not in the model."""
        names, there = {name for delta, _ in self.layers for name in delta.changes}, set(self.model)
        incompatible = []
        for name in sorted(names):
            tensor = self.model[name] if name in there else None
            if tensor is None or not self.is_compatible(name, tensor, self.base_of(name, tensor)):
                incompatible.append(name)
        return incompatible


def check_strengths(strengths: Iterable[float]) -> None:
    """Raises ConfigError for one outside −0.5…1.5."""
    for strength in strengths:
        if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
            raise ConfigError(f"is {strength}, but must be from {STRENGTHS[0]} to {STRENGTHS[1]}", option="strength")


def stack(
    model: Mapping[str, Tensor],
    layers: Sequence[tuple[SparseDelta, float]],
    *,
    fine_tune_of_base: Mapping[str, Tensor] | None = None,
    known_hash: str | None = None,
    progress: Progress = silent,
) -> AppliedDeltas:
    """The tensors of a base with deltas applied, each at its strength; the order of the deltas does not matter.

    model: the whole UNet; it may read its tensors lazily, and each is read once. A copy of the base in another dtype,
    which gives the base when cast to its dtypes, gets the differences where the dtypes differ, and so does any model of
    the same names and shapes with the deltas' base as `fine_tune_of_base`; `note` says so. known_hash: the model's base
    hash, where it is known; no hash is computed then. Raises ConfigError for a strength outside −0.5…1.5 or a delta
    that comes twice; ModelError for deltas of several bases, for another model than their base, with both hashes, and
    for a result whose hash is not the delta's.
    """
    layers = tuple(sorted(layers, key=lambda layer: layer[0].id))
    check_strengths(strength for _, strength in layers)
    first = layers[0][0]
    for (delta, _), (other, _) in combinations(layers, 2):
        if delta.id == other.id:
            raise ConfigError(f"the delta {delta.id} is given twice", advice="Give it once, with the total {strength}")
        if delta.base_hash != other.base_hash:
            raise ModelError(
                f"the deltas {delta.id} and {other.id} are for different bases (hashes {delta.base_hash[:12]}… and "
                f"{other.base_hash[:12]}…)",
                advice="Stack deltas of one base",
            )
    stacked = AppliedDeltas(model, layers)
    if known_hash == first.base_hash:
        hashes = Hashes(known_hash, known_hash, "")
    else:
        if fine_tune_of_base is not None:
            stacked = replace(stacked, source=_of_the_same_names(model, fine_tune_of_base), note=OTHER_MODEL)
        hashes = stacked.hashes(progress)
        if fine_tune_of_base is not None and hashes.before == first.base_hash:  # no fine-tune, but the base itself
            stacked = AppliedDeltas(model, layers)
            hashes = stacked.hashes(progress)
    if hashes.start != first.base_hash:
        raise _other_base(first, hashes, model, fine_tune_of_base is not None, progress)
    if hashes.start != hashes.before and not stacked.note:
        stacked = replace(stacked, note=OTHER_DTYPE)
    wrong = [] if hashes.after else stacked.incompatible_names()
    if wrong:
        raise ModelError(f"the model's {some(wrong)} are missing or have other shapes than in the delta")
    if not stacked.note and [s for _, s in layers] == [1.0] and hashes.after not in ("", first.result_hash):
        raise damaged("its result is not its erased model")
    return replace(stacked, base_hash=hashes.before, result_hash=hashes.after)


def _of_the_same_names(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The base. Raises ModelError if the model holds other tensors."""
    lone = sorted(set(base) ^ set(model))
    if lone:
        raise ModelError(f"the model and the base do not have the same tensors: only one of them has {some(lone)}")
    return base


def _other_base(
    delta: SparseDelta, hashes: Hashes, model: Mapping[str, Tensor], fine_tune: bool, progress: Progress
) -> ModelError:
    """The error for a model that is not the delta's base; it says which model it is, if that is known."""
    if fine_tune:
        return BaseMismatch(
            delta.base_hash, hashes.start, "", "Give the base that the delta was made from as {fine_tune_of_base}"
        )
    if hashes.before == delta.result_hash:
        return BaseMismatch(delta.base_hash, hashes.before, "it is applied already")
    if _rounded(model, progress) == delta.base_hash_fp16:
        return BaseMismatch(
            delta.base_hash,
            hashes.before,
            "the same model in a dtype of less precision",
            f"{ADD_DIFFERENCES} to this copy",
        )
    return BaseMismatch(delta.base_hash, hashes.before, "", f"Start from that base. {ADD_DIFFERENCES} to another model")


def _rounded(model: Mapping[str, Tensor], progress: Progress) -> str:
    """The model's hash over its tensors rounded to fp16."""
    hasher = Hasher(rounded=True)
    for i, name in enumerate(sorted(model), 1):
        hasher.add(name, model[name])
        progress(Event(Stage.CHECKING, i, len(model)))
    return hasher.fp16


def damaged(what: str) -> ModelError:
    return ModelError(f"the delta is damaged: {what}", advice="Download or make it again")


def overlaps(deltas: Sequence[SparseDelta]) -> dict[tuple[str, str], int]:
    """The number of weights that both deltas of a pair change: (id, id), in order → weights."""
    return {
        (first.id, second.id): sum(
            change.overlap_count(second.changes[name])
            for name, change in first.changes.items()
            if name in second.changes
        )
        for first, second in combinations(sorted(deltas, key=lambda delta: delta.id), 2)
    }
