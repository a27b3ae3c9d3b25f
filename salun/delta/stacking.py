"""Deltas applied to a model: at any strength, several at once, to another dtype, or to a fine-tune of their base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from salun.checkpoints.hashing import Hasher
from salun.delta.xor import Change, patterns, values
from salun.errors import ConfigError, ModelError
from salun.progress import Event, Progress, Stage, silent

STRENGTHS = (-0.5, 1.5)
OTHER_DTYPE = "the model is in another dtype than the delta's base: it gets the differences, rounded once"
OTHER_MODEL = "the model is another than the delta's base: it gets the differences, rounded once"


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
    """A model that a delta is not for. due, found: the base hash that it should have and the one that it has."""

    def __init__(self, due: str, found: str, advice: str) -> None:
        text = f"this delta is for another base (hash {due[:12]}…, given {found[:12]}…): {advice}"
        super().__init__(text, code="wrong-base")
        self.due, self.found = due, found


class Hashes(NamedTuple):
    """Base hashes around an application of deltas.

    before: of the model. start: of the old values that the deltas start from: the model's in the dtypes of the deltas'
    base, or the source's. after: of the result, "" if some tensors do not fit.
    """

    before: str
    start: str
    after: str


@dataclass(frozen=True, eq=False)
class AppliedDeltas(Mapping[str, Tensor]):
    """The tensors that deltas change, each made from the model's when it is asked for.

    model: the whole UNet before. layers: (delta, strength), in the order of the deltas' ids. source: where the old
    values that the deltas start from are known, if not in the model. base_hash, result_hash: of the model before and
    after, where computed. note: what is not exact, in words.
    """

    model: Mapping[str, Tensor]
    layers: tuple[tuple[SparseDelta, float], ...]
    source: Mapping[str, Tensor] | None = None
    base_hash: str = ""
    result_hash: str = ""
    note: str = ""

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.model[name]
        return self.make(name, tensor, self.old(name, tensor))

    def __contains__(self, name: object) -> bool:
        return any(name in delta.changes for delta, _ in self.layers)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.model if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def old(self, name: str, tensor: Tensor) -> Tensor:
        """What the deltas start from in a tensor of the model: itself where it is as their base has it."""
        return tensor.to(self.layers[0][0].dtype_of(name)) if self.source is None else self.source[name]

    @property
    def start(self) -> Mapping[str, Tensor]:
        """All tensors that the deltas start from."""
        return _Start(self) if self.source is None else self.source

    def make(self, name: str, tensor: Tensor, old: Tensor) -> Tensor:
        """One tensor after, from the model's and what `old` gives for it.

        An entry that one delta alone changes, at strength 1, gets the erased model's bits; others, and all where the
        old values are not the model's own, get the model's + Σ s·(new − old) in float32, rounded once.
        """
        changes = [(delta.changes[name], s) for delta, s in self.layers if s and name in delta.changes]
        if old is tensor and [s for _, s in changes] == [1.0]:
            return changes[0][0].flip(tensor)
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
            if old is tensor and strength == 1.0:
                chosen = change.chosen()
                bits[chosen] = np.where(times[chosen] == 1, change.flipped(old), bits[chosen])
        return result

    def hashes(self, progress: Progress = silent) -> Hashes:
        """All three, reading each tensor once."""
        before, after = Hasher(), Hasher()
        start: Hasher | None = None  # from the first tensor on that is not as the deltas' base has it
        there = set(self.model)
        fits = all(name in there for delta, _ in self.layers for name in delta.changes)
        for i, name in enumerate(sorted(self.model), 1):
            tensor = self.model[name]
            old = self.old(name, tensor)
            if old is not tensor and start is None:
                start = before.copy()
            before.add(name, tensor)
            if start is not None:
                start.add(name, old)
            fits = fits and self.fits(name, tensor, old)
            if fits:
                after.add(name, self.make(name, tensor, old) if name in self else tensor)
            progress(Event(Stage.CHECKING, i, len(self.model)))
        return Hashes(before.hash, (start or before).hash, after.hash if fits else "")

    def fits(self, name: str, tensor: Tensor, old: Tensor) -> bool:
        """Whether a tensor, and what the deltas start from in it, have the shape and dtype that the deltas change."""
        changes = [delta.changes[name] for delta, _ in self.layers if name in delta.changes]
        return all(
            (change.dtype, change.shape) == (old.dtype, tuple(old.shape)) and old.shape == tensor.shape
            for change in changes
        )

    def misfits(self) -> list[str]:
        """Names of tensors that the deltas change and that do not fit or are not in the model."""
        names, there = {name for delta, _ in self.layers for name in delta.changes}, set(self.model)
        found = []
        for name in sorted(names):
            tensor = self.model[name] if name in there else None
            if tensor is None or not self.fits(name, tensor, self.old(name, tensor)):
                found.append(name)
        return found


@dataclass(frozen=True, eq=False)
class _Start(Mapping[str, Tensor]):
    """A model's tensors as the deltas' base has them."""

    stacked: AppliedDeltas

    def __getitem__(self, name: str) -> Tensor:
        return self.stacked.old(name, self.stacked.model[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stacked.model)

    def __len__(self) -> int:
        return len(self.stacked.model)


def check_strengths(strengths: Iterable[float]) -> None:
    """Raises ConfigError for one outside −0.5…1.5."""
    for strength in strengths:
        if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
            raise ConfigError(f"strength is {strength}, but must be from {STRENGTHS[0]} to {STRENGTHS[1]}")


def stack(
    model: Mapping[str, Tensor],
    layers: Sequence[tuple[SparseDelta, float]],
    *,
    fine_tune_of: Mapping[str, Tensor] | None = None,
    known_hash: str | None = None,
    progress: Progress = silent,
) -> AppliedDeltas:
    """The tensors that deltas of one base make of it, each with its strength; in which order they come is the same.

    model: the whole UNet; it may read its tensors lazily, and each is read once. A copy of the base in another dtype,
    which gives the base when cast to its dtypes, gets the differences where the dtypes differ, and so does any model of
    the same names and shapes with the deltas' base as `fine_tune_of`; `note` says so. known_hash: the model's base
    hash, where it is known; no hash is computed then. Raises ConfigError for a strength outside −0.5…1.5 or a delta
    that comes twice; ModelError for deltas of several bases, for another model than theirs, telling both hashes, and
    for a result whose hash is not the delta's.
    """
    layers = tuple(sorted(layers, key=lambda layer: layer[0].id))
    check_strengths(strength for _, strength in layers)
    first = layers[0][0]
    for (one, _), (other, _) in combinations(layers, 2):
        if one.id == other.id:
            raise ConfigError(f"the delta {one.id} is given twice: give it once, with the strength that it should have")
        if one.base_hash != other.base_hash:
            raise ModelError(
                f"the deltas {one.id} and {other.id} are for different bases (hashes {one.base_hash[:12]}… and "
                f"{other.base_hash[:12]}…): stack deltas of one base"
            )
    stacked = AppliedDeltas(model, layers)
    if known_hash == first.base_hash:
        found = Hashes(known_hash, known_hash, "")
    else:
        if fine_tune_of is not None:
            stacked = replace(stacked, source=_of_the_same_names(model, fine_tune_of), note=OTHER_MODEL)
        found = stacked.hashes(progress)
        if fine_tune_of is not None and found.before == first.base_hash:  # no fine-tune, but the base itself
            stacked = AppliedDeltas(model, layers)
            found = stacked.hashes(progress)
    if found.start != first.base_hash:
        raise _other_base(first, found, model, fine_tune_of is not None, progress)
    if found.start != found.before and not stacked.note:
        stacked = replace(stacked, note=OTHER_DTYPE)
    wrong = [] if found.after else stacked.misfits()
    if wrong:
        raise ModelError(f"the model's {', '.join(wrong[:3])} are of other shapes than the delta's, or not there")
    if not stacked.note and [s for _, s in layers] == [1.0] and found.after not in ("", first.result_hash):
        raise damaged("what it gives is not its erased model")
    return replace(stacked, base_hash=found.before, result_hash=found.after)


def _of_the_same_names(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The base. Raises ModelError if the model holds other tensors."""
    lone = sorted(set(base) ^ set(model))
    if lone:
        raise ModelError(f"the model and the base do not hold the same tensors: {', '.join(lone[:3])} only on one side")
    return base


def _other_base(
    delta: SparseDelta, found: Hashes, model: Mapping[str, Tensor], fine_tune: bool, progress: Progress
) -> ModelError:
    """What to say of a model that the delta is not for: which one it is instead, if that is known."""
    given = found.before
    if fine_tune:
        given, advice = found.start, "--fine-tune-of-base takes the base that the delta was made from"
    elif found.before == delta.result_hash:
        advice = "this is what it gives, so it is applied already"
    elif _rounded(model, progress) == delta.base_hash_fp16:
        advice = (
            "it is the same model in another dtype, which has lost bits; `salun delta apply` with --fine-tune-of-base, "
            "and the base that the delta was made from, adds the differences to it"
        )
    else:
        advice = (
            "start from that base; `salun delta apply` with --fine-tune-of-base, and that base, adds the differences "
            "to another model"
        )
    return BaseMismatch(delta.base_hash, given, advice)


def _rounded(model: Mapping[str, Tensor], progress: Progress) -> str:
    """The model's hash over its tensors rounded to fp16."""
    hasher = Hasher(rounded=True)
    for i, name in enumerate(sorted(model), 1):
        hasher.add(name, model[name])
        progress(Event(Stage.CHECKING, i, len(model)))
    return hasher.fp16


def damaged(what: str) -> ModelError:
    return ModelError(f"the delta is damaged: {what}; fetch or make it again")


def overlaps(deltas: Sequence[SparseDelta]) -> dict[tuple[str, str], int]:
    """How many entries each two deltas of one base both change: (id, id), in order → entries."""
    return {
        (one.id, other.id): sum(
            change.both(other.changes[name]) for name, change in one.changes.items() if name in other.changes
        )
        for one, other in combinations(sorted(deltas, key=lambda delta: delta.id), 2)
    }
