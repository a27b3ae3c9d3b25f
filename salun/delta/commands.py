"""Deltas as files: extracted from two models, applied to one, stacked, undone, exported for LoRA loaders.

A model is whatever `find` knows: an alias, a hub id, a diffusers folder or a single file. Outputs are written
atomically. Anyone with a delta can undo the erasure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.lazy_tensors import Stored, reporting
from salun.checkpoints.locate import find
from salun.checkpoints.outputs import DELTA, DIFF, LORA, check_output, output_layout
from salun.checkpoints.patch import excluded_weights, external_links, size_of, write_patched
from salun.checkpoints.pickled import as_safetensors
from salun.checkpoints.single_file import open_unet
from salun.delta import stacking
from salun.delta.delta import Delta
from salun.delta.provenance import (
    APPLIED,
    BASE_HASH,
    PREFIX,
    Applied,
    applied_in,
    notes_in,
    reason_not_undoable,
    with_added,
    with_removed,
)
from salun.delta.stacking import AppliedDeltas, BaseMismatch
from salun.delta.stock_formats import check_rank, stock_notes, write_stock
from salun.errors import ConfigError, ModelError, literal, some
from salun.files import check_disk_space, placed
from salun.options import FileOptions
from salun.progress import Event, Progress, Stage, StageCost, silent

FILE = ".safetensors"


def extract(
    base: str,
    erased: str,
    output: str,
    *,
    options: FileOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the delta that leads from one model to another; both may be single files or folders.

    options: where models are found, of every function here. Returns facts for people and programs. Raises ConfigError
    for an output that must not be written; ModelError for models that do not pair up or do not differ.
    """
    output = os.path.expanduser(output)
    old, new = open_model(base, options), open_model(erased, options)
    _check(output, force, old.path, new.path, endings=(DELTA,))
    notes = {PREFIX + key: text for key, text in notes_in(new.metadata).items()}
    delta = Delta.between(old, new, notes, progress)
    if not delta.changes:
        raise ModelError(f"{base} and {erased} have the same weights: there is nothing to extract")
    progress(Event(Stage.WRITING, message=f"writing {output}"))
    with placed(Path(output), force) as place:
        delta.save(place)
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
    fine_tune_of_base: str | None = None,
    keep_ema: bool = False,
    options: FileOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a copy of a model with the delta applied: at strength 1 byte-identical to the erased model.

    fine_tune_of_base: the base that the delta was made from, where the model is another, such as a fine-tune of it;
    then the differences are added. See `stack`.
    """
    return stack(
        model,
        [delta],
        output,
        [strength],
        fine_tune_of_base=fine_tune_of_base,
        keep_ema=keep_ema,
        options=options,
        force=force,
        progress=progress,
    )


def stack(
    model: str,
    deltas: Sequence[str | Delta],
    output: str,
    strengths: Sequence[float] = (),
    *,
    fine_tune_of_base: str | None = None,
    keep_ema: bool = False,
    options: FileOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a copy of a model with several deltas of it applied, in whatever order: see `salun.delta.stacking.stack`.

    deltas: files, or deltas in memory. strengths: one for each delta; 1 by default. keep_ema: keep a
    single file's second copy of the weights, in which nothing is erased. The output's metadata list what was applied.
    Returns facts, `notes` among them: lines on what is not exact, on overlaps, and on skipped files. Raises ConfigError
    for an output that must not be written or options that contradict; ModelError for a model that is not the deltas'
    base.
    """
    if strengths and len(strengths) != len(deltas):
        raise ConfigError(
            f"has {len(strengths)} values for {len(deltas)} deltas",
            option="strength",
            advice="Give one value for each delta, in order, or none",
        )
    output = os.path.expanduser(output)
    stacking.check_strengths(strengths)
    stored = open_model(model, options)
    other = open_model(fine_tune_of_base, options) if fine_tune_of_base is not None else None
    files = [Path(delta) for delta in deltas if not isinstance(delta, Delta)]
    loaded = [delta if isinstance(delta, Delta) else Delta.load(delta) for delta in deltas]
    _check(output, force, *(m.path for m in (stored, other) if m is not None), *files, layout_of=stored)
    layers = list(zip(loaded, strengths or [1.0] * len(deltas), strict=True))
    _announce(progress, stored, loaded, {Stage.CHECKING: 2, Stage.WRITING: 3})
    try:
        made = stacking.stack(stored, layers, fine_tune_of_base=other, progress=progress)
    except BaseMismatch as error:
        _check_stackable(stored, layers, error)
        raise
    overlaps = {
        pair: n for pair, n in stacking.overlaps([delta for delta, strength in layers if strength]).items() if n
    }
    added = [
        Applied(delta.id, float(strength), _partners(delta.id, overlaps), not made.note, notes_in(delta.metadata))
        for delta, strength in layers
        if strength
    ]
    metadata = with_added(added, stored.metadata, made.base_hash, made.result_hash) if added else {}
    notes = _stack_notes(stored, made, overlaps, keep_ema)
    _write(stored, output, made, metadata, progress, force, keep_ema)
    return {
        "output": output,
        "applied": [{"id": delta.id, "strength": strength} for delta, strength in layers],
        "exact": not made.note and not overlaps and all(each.strength == 1.0 for each in added),
        "base_hash": made.base_hash,
        "result_hash": made.result_hash,
        "overlaps": [{"deltas": list(pair), "entries": n} for pair, n in overlaps.items()],
        "notes": notes,
    }


def _stack_notes(
    stored: Stored, made: AppliedDeltas, overlaps: Mapping[tuple[str, str], int], keep_ema: bool
) -> list[str]:
    """Notes on what is not exact in the output, and on what is not in it."""
    notes = [made.note] if made.note else []
    notes += [
        f"{first} and {second} both change {n:,} weights: these get the sum of both, and neither can be undone alone"
        for (first, second), n in overlaps.items()
    ]
    if links := external_links(stored):
        notes.append(f"skipped, since they are links out of the model's folder: {some(links)}")
    if not (keep_ema and stored.single) and (excluded := excluded_weights(stored)):
        notes.append(f"skipped, since these copies of the weights still contain the concept: {some(excluded)}")
    return notes


def undo(
    model: str,
    delta: str,
    output: str,
    *,
    options: FileOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a copy of a model with the delta undone, bit-exact, which hashes confirm.

    The model must be what the delta gives its own base, or list the delta at strength 1 without overlap. Raises
    ModelError for any other, saying what was applied to it and from which base to start instead.
    """
    output = os.path.expanduser(output)
    stored = open_model(model, options)
    loaded = Delta.load(delta)
    _check(output, force, stored.path, Path(delta), layout_of=stored)
    flipped = AppliedDeltas(stored, ((loaded, 1.0),))
    _announce(progress, stored, [loaded], {Stage.CHECKING: 2, Stage.WRITING: 3})
    current, _, back = flipped.hashes(progress)
    listed = applied_in(stored.metadata, current)
    if current == loaded.base_hash:
        raise ModelError(f"{model} is the delta's base ({current[:12]}…): there is nothing to undo")
    alone = current == loaded.result_hash
    if not alone and (reason := reason_not_undoable(loaded.id, listed)):
        start = stored.metadata[BASE_HASH] if listed else loaded.base_hash
        raise ModelError(
            f"the delta {loaded.id} cannot be undone in {model} (hash {current[:12]}…, not its result's "
            f"{loaded.result_hash[:12]}…): {reason}",
            advice=f"Start from its base ({literal(start[:12])}…)",
        )
    metadata = with_removed(loaded.id, listed, stored.metadata, back)
    expected = loaded.base_hash if alone else back if metadata[APPLIED] else stored.metadata[BASE_HASH]
    if not back or back != expected:
        raise stacking.damaged("undoing it does not give the model that it was applied to")
    _write(stored, output, flipped, metadata, progress, force, keep_ema=True)
    remaining = [{"id": applied.id, "strength": applied.strength} for applied in applied_in(metadata, back)]
    return {"output": output, "id": loaded.id, "base_hash": back, "result_hash": current, "applied": remaining}


def export(
    delta: str,
    base: str,
    output: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    options: FileOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a delta for LoRA loaders: `x.lora.safetensors` of low rank, or every difference, `x.diff.safetensors`.

    rank, energy: of the low-rank file, as in `low_rank`; without either, ranks that keep 90 % of each layer's energy.
    Returns facts, with `kept` as in `LowRankReport.as_json`. Raises ConfigError for options that contradict; ModelError
    for a base that is not the delta's.
    """
    output = os.path.expanduser(output)
    if output.endswith(DIFF) and not rank is energy is None:
        raise ConfigError(
            f"is {rank if rank is not None else energy}, but only low-rank files have one",
            option="rank" if rank is not None else "energy",
            advice=f"End {{output}} in {LORA}, or omit the option",
        )
    if output.endswith(LORA) and not rank is energy is None:
        check_rank(rank, energy)
    stored, loaded = open_model(base, options), Delta.load(delta)
    _check(output, force, stored.path, Path(delta), endings=(LORA, DIFF))
    written = {Stage.WRITING: 4} if output.endswith(DIFF) else {}
    _announce(progress, stored, [loaded], {Stage.CHECKING: 3, Stage.COMPARING: 7, **written})
    made = stacking.stack(stored, [(loaded, 1.0)], progress=progress)
    old = made.base_tensors
    new = AppliedDeltas(old, made.layers)
    facts: dict[str, Any] = {"output": output, "id": loaded.id, "notes": [made.note] if made.note else []}
    with placed(Path(output), force) as place:
        account = write_stock(place, old, new, stock_notes(loaded), rank, energy, progress)
    if account is not None:
        facts["kept"] = account.as_json()
        facts["notes"] += [account.warning] if account.warning else []
    header = safetensors_io.read_header(Path(output))
    return {**facts, "bytes": Path(output).stat().st_size, "tensors": len(header.names)}


def _announce(progress: Progress, stored: Stored, deltas: Sequence[Delta], takes: Mapping[Stage, int]) -> None:
    """Report the stages. takes: stage → about how long it takes, relative to the others."""
    changed = len({name for delta in deltas for name in delta.changes})
    steps = {stage: len(stored) if stage is Stage.CHECKING else changed for stage in takes}
    stages = [StageCost(stage, steps[stage], forward=len(stored) * each) for stage, each in takes.items()]
    progress(Event(Stage.PLANNING, stages=stages))


def _check_stackable(stored: Stored, layers: Sequence[tuple[Delta, float]], error: BaseMismatch) -> None:
    """Raises ModelError with the exact way, where the model is the deltas' base with others of that base in it."""
    listed = applied_in(stored.metadata, error.actual)
    if listed and stored.metadata[BASE_HASH] == layers[0][0].base_hash:
        raise ModelError(
            f"{stored.path} already has {', '.join(map(str, listed))}, of the same base ({error.expected[:12]}…)",
            advice="Start from that base and apply all of them at once by `salun delta stack`, which is exact",
            code="deltas-applied",
        ) from error


def open_model(name: str, options: FileOptions | None = None) -> Stored:
    """The UNet of a model by its name. Raises ModelError if it is not found or not supported."""
    options = options or FileOptions()
    return open_unet(as_safetensors(find(name, options.models_dir)[0], options.allow_pickle))


def _check(
    output: str, force: bool, *inputs: Path, endings: tuple[str, ...] = (), layout_of: Stored | None = None
) -> None:
    """Raises ConfigError for an output of another ending or layout, or that would overwrite something or an input."""
    ending = ""
    if endings and not output.endswith(endings):
        ending = " or ".join(endings)
    elif layout_of is not None and layout_of.single:
        ending = (
            "" if output_layout(output) == "file" and output.endswith(FILE) else f"{FILE} alone, as {layout_of.path}"
        )
    elif layout_of is not None and output_layout(output) != "folder":
        ending = f"/, as {layout_of.path} is a diffusers folder"
    if ending:
        raise ConfigError(f"is {output}, but must end in {ending}", option="output")
    for source in inputs:
        target, read = Path(os.path.realpath(output)), Path(os.path.realpath(source))
        same = target == read or (target.is_file() and read.exists() and os.path.samefile(target, read))
        if same or target in read.parents or read in target.parents:
            raise ConfigError(
                f"is {output}, which is, contains or is inside the input {source}",
                option="output",
                advice="Write somewhere else",
            )
    check_output(output, force)
    check_disk_space({Path(output): size_of(layout_of) if layout_of is not None else 0})


def _write(
    stored: Stored,
    output: str,
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Progress,
    force: bool,
    keep_ema: bool = False,
) -> None:
    progress(Event(Stage.WRITING, message=f"writing {output}"))
    with placed(Path(output), force) as place:
        write_patched(stored, place, reporting(changed, Stage.WRITING, progress), metadata, keep_ema)


def _partners(delta: str, shared: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    return tuple(sorted({partner for pair in shared if delta in pair for partner in pair if partner != delta}))
