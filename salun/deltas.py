"""Deltas as files: made from two models, applied to one, stacked, taken out again, written for stock loaders.

A model is whatever `find` knows: an alias, a hub id, a diffusers folder or a single file. Outputs appear whole or not
at all. Who has a delta can undo the erasure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from salun.diffusion.finding import find
from salun.diffusion.output import DELTA, DIFF, LORA, check_output, output_layout, write_stock
from salun.errors import ConfigError, ModelError
from salun.formats import stacking, tensorfile
from salun.formats.applied import (
    APPLIED,
    BASE_HASH,
    OURS,
    RESULT_HASH,
    Applied,
    applied_in,
    why_kept,
    with_added,
    without,
)
from salun.formats.checkpoint import Stored, open_unet
from salun.formats.delta import Delta
from salun.formats.patch import left_out, write_patched
from salun.formats.stacking import Stacked
from salun.progress import Event, Progress, silent

FILE = ".safetensors"


def extract(base: str, erased: str, output: str, *, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Write the delta that leads from one model to another; both may be single files or folders.

    Returns facts for people and programs. Raises ConfigError for an output that must not be written; ModelError for
    models that do not pair up or do not differ.
    """
    old, new = open_model(base), open_model(erased)
    _check(output, force, old.path, new.path, endings=(DELTA,))
    notes = {k: v for k, v in new.metadata.items() if k.startswith(OURS) and k not in (APPLIED, BASE_HASH, RESULT_HASH)}
    delta = Delta.between(old, new, notes, progress)
    if not delta.changes:
        raise ModelError(f"{base} and {erased} hold the same UNet: there is nothing to extract")
    progress(Event("writing", message=f"writing {output}"))
    delta.save(output)
    total = sum(prod(old.entry(name).shape) for name in old)
    return {
        "output": output,
        "bytes": Path(output).stat().st_size,
        "id": delta.id,
        "base_hash": delta.base_hash,
        "result_hash": delta.result_hash,
        "tensors": len(delta.names),
        "changed": delta.changed,
        "total": total,
        "density": delta.changed / total,
    }


def apply(
    model: str,
    delta: str,
    output: str,
    strength: float = 1.0,
    *,
    fine_tune_of: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a copy of a model with the delta applied: at strength 1 the erased model to the bit.

    fine_tune_of: the base that the delta was made from, where the model is another, such as a fine-tune of it; then the
    differences are added. See `stack`.
    """
    return stack(model, [delta], output, [strength], fine_tune_of=fine_tune_of, force=force, progress=progress)


def stack(
    model: str,
    deltas: Sequence[str | Delta],
    output: str,
    strengths: Sequence[float] = (),
    *,
    fine_tune_of: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a copy of a model with several deltas of it applied, in whatever order: see `salun.formats.stacking.stack`.

    deltas: files, or deltas in memory. strengths: one for each delta; none stands for 1 throughout. The output's
    metadata list what was applied. Returns facts, `notes` among them: lines on what is not exact, overlaps, and what
    was left out. Raises ConfigError for an
    output that must not be written or options that contradict; ModelError for a model that is not the deltas' base.
    """
    if strengths and len(strengths) != len(deltas):
        raise ConfigError(f"{len(strengths)} --strength for {len(deltas)} deltas: give one for each, in order, or none")
    stored = open_model(model)
    other = open_model(fine_tune_of) if fine_tune_of is not None else None
    files = [Path(one) for one in deltas if not isinstance(one, Delta)]
    _check(output, force, *(m.path for m in (stored, other) if m is not None), *files, layout_of=stored)
    loaded = [one if isinstance(one, Delta) else Delta.load(one) for one in deltas]
    layers = list(zip(loaded, strengths or [1.0] * len(deltas), strict=True))
    made = stacking.stack(stored, layers, fine_tune_of=other, progress=progress)
    active = [delta for delta, strength in layers if strength]
    shared = {pair: n for pair, n in stacking.overlaps(active).items() if n}
    exact = made.source is None
    added = [
        Applied(delta.id, float(strength), _partners(delta.id, shared), exact) for delta, strength in layers if strength
    ]
    metadata = with_added(added, stored.metadata, made.base_hash, made.result_hash) if added else {}
    dropped = left_out(stored)
    _write(stored, output, made, {**_notes(active), **metadata}, progress)
    notes = [made.note] if made.note else []
    notes += [
        f"{one} and {two} both change {n:,} entries: these get the sum of both, and neither can be undone alone"
        for (one, two), n in shared.items()
    ]
    if dropped:
        notes.append(f"left out, since other copies of the weights still hold what was erased: {_some(dropped)}")
    return {
        "output": output,
        "applied": [{"id": delta.id, "strength": strength} for delta, strength in layers],
        "exact": exact and not shared and all(one.strength == 1.0 for one in added),
        "base_hash": made.base_hash,
        "result_hash": made.result_hash,
        "overlaps": [{"deltas": list(pair), "entries": n} for pair, n in shared.items()],
        "notes": notes,
    }


def undo(model: str, delta: str, output: str, *, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Write a copy of a model with the delta taken out, exact to the bit, which hashes confirm.

    The model must be what the delta gives its own base, or list the delta at strength 1 without overlap. Raises
    ModelError for any other, saying what was applied to it and from which base to start instead.
    """
    stored = open_model(model)
    _check(output, force, stored.path, Path(delta), layout_of=stored)
    loaded = Delta.load(delta)
    flipped = Stacked(stored, ((loaded, 1.0),))
    found, back = flipped.hashes(progress)
    listed = applied_in(stored.metadata, found)
    whole = found == loaded.result_hash
    if not whole and (why := why_kept(loaded.id, listed)):
        raise ModelError(
            f"the delta {loaded.id} cannot be taken out of {model} (hash {found[:12]}…, not the "
            f"{loaded.result_hash[:12]}… that it gives): {why}; start from its base (hash {loaded.base_hash[:12]}…)"
        )
    metadata = without(loaded.id, listed, stored.metadata, back)
    expected = loaded.base_hash if whole else back if metadata[APPLIED] else stored.metadata[BASE_HASH]
    if not back or back != expected:
        raise stacking.damaged("what it leaves is not the model that it was applied to")
    _write(stored, output, flipped, metadata, progress, keep_ema=True)
    remaining = [{"id": one.id, "strength": one.strength} for one in applied_in(metadata, back)]
    return {"output": output, "id": loaded.id, "base_hash": back, "result_hash": found, "applied": remaining}


def export(
    delta: str,
    base: str,
    output: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a delta for stock loaders: `x.lora.safetensors` of low rank, or every difference, `x.diff.safetensors`.

    rank, energy: of the low-rank file, as in `low_rank`; without either, ranks that keep 90 % of each layer's energy.
    Returns facts, with `kept` as `Account.as_json` tells it. Raises ConfigError for options that contradict; ModelError
    for a base that is not the delta's.
    """
    stored = open_model(base)
    _check(output, force, stored.path, Path(delta), endings=(LORA, DIFF))
    if output.endswith(DIFF) and not rank is energy is None:
        raise ConfigError(f"--rank and --energy are of low-rank files: end --output in {LORA}, or leave them out")
    loaded = Delta.load(delta)
    made = stacking.stack(stored, [(loaded, 1.0)], progress=progress)
    old = stored if made.source is None else made.source
    new = _Told(Stacked(old, made.layers), "exporting", progress)
    facts: dict[str, Any] = {"output": output, "id": loaded.id, "notes": [made.note] if made.note else []}
    metadata = {
        **_notes([loaded]),
        "salun.delta": loaded.id,
        BASE_HASH: loaded.base_hash,
        RESULT_HASH: loaded.result_hash,
    }
    account = write_stock(Path(output), old, new, metadata, rank, energy)
    if account is not None:
        facts["kept"] = account.as_json()
    header = tensorfile.read_header(Path(output))
    return {**facts, "bytes": Path(output).stat().st_size, "tensors": len(header.names)}


def open_model(name: str) -> Stored:
    """The UNet of a model by its name. Raises ModelError if it is not found or is none that salun handles."""
    return open_unet(find(name)[0])


def _check(
    output: str, force: bool, *inputs: Path, endings: tuple[str, ...] = (), layout_of: Stored | None = None
) -> None:
    """Raises ConfigError for an output of another ending or layout, or that would overwrite something or an input."""
    if endings and not output.endswith(endings):
        raise ConfigError(f"--output {output}: end it in {' or '.join(endings)}")
    if layout_of is not None and layout_of.single and not (output_layout(output) == "file" and output.endswith(FILE)):
        raise ConfigError(f"--output {output}: {layout_of.path} is a single file, so end it in {FILE} alone")
    if layout_of is not None and not layout_of.single and output_layout(output) != "folder":
        raise ConfigError(f"--output {output}: {layout_of.path} is a diffusers folder, so end it in /")
    for given in inputs:
        one, other = Path(output).resolve(), given.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ConfigError(f"--output {output} is, holds or is inside {given}, which is read: write somewhere else")
    check_output(output, force)


def _write(
    stored: Stored,
    output: str,
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Progress,
    keep_ema: bool = False,
) -> None:
    progress(Event("writing", message=f"writing {output}"))
    write_patched(stored, Path(output), _Told(changed, "writing", progress), metadata, keep_ema)


class _Told(Mapping[str, Tensor]):
    """Tensors whose making is told to a progress."""

    def __init__(self, tensors: Mapping[str, Tensor], stage: str, progress: Progress) -> None:
        self._tensors, self._stage, self._progress = tensors, stage, progress
        self._place = {name: i for i, name in enumerate(tensors, 1)}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._progress(Event(self._stage, self._place[name], len(self._place)))
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _notes(deltas: Sequence[Delta]) -> dict[str, str]:
    """What deltas say of themselves under `salun.*`; several values of one key in a row."""
    keys = dict.fromkeys(key for delta in deltas for key in delta.metadata if key.startswith(OURS))
    return {key: ", ".join(dict.fromkeys(d.metadata[key] for d in deltas if key in d.metadata)) for key in keys}


def _partners(delta: str, shared: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    return tuple(sorted({one for pair in shared if delta in pair for one in pair if one != delta}))


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
