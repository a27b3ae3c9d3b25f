"""What was applied to a model, as its file's metadata list it: `salun.applied`, `salun.base_hash`, `salun.result_hash`.

`salun.applied` is a JSON list of {"id", "strength", "overlaps": [ids], "notes": {…}}, with "differences": true where a
delta could not be applied to the bit. base_hash: of the UNet before all of them; result_hash: of the UNet as written,
so that a list which another program has copied to other weights is known to be void. Notes (`concept`, `seed`, …) stand
beside as `salun.*` too, of all deltas together, for programs that only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from salun.untrusted import parse_json

OURS, APPLIED, BASE_HASH, RESULT_HASH = "salun.", "salun.applied", "salun.base_hash", "salun.result_hash"


@dataclass(frozen=True)
class Applied:
    """A delta that a model lists.

    overlaps: ids of deltas that change some of the same entries, or may, since they came on top. exact: whether its
    entries hold the bits that it gives its own base. notes: what the delta says of itself, as of `notes_in`.
    """

    id: str
    strength: float = 1.0
    overlaps: tuple[str, ...] = ()
    exact: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.id} at strength {self.strength:g}" + ("" if self.exact else " as differences")


def applied_in(metadata: Mapping[str, str], found: str) -> list[Applied]:
    """The deltas that an untrusted file's metadata list; none if its weights, of the hash `found`, are others now."""
    if metadata.get(RESULT_HASH) != found or BASE_HASH not in metadata:
        return []
    try:
        return [
            Applied(
                id=str(e["id"]),
                strength=float(e["strength"]),
                overlaps=tuple(map(str, e["overlaps"])),
                exact=not e.get("differences"),
                notes={str(k): str(v) for k, v in e.get("notes", {}).items()},
            )
            for e in parse_json(metadata[APPLIED])
        ]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return []


def notes_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `salun.*` metadata tell beside the list of what was applied, without the `salun.`."""
    return {
        key.removeprefix(OURS): text
        for key, text in sorted(metadata.items())
        if key.startswith(OURS) and key not in (APPLIED, BASE_HASH, RESULT_HASH)
    }


def joined(notes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Notes of several deltas under `salun.*`, several values of one key in a row."""
    every = list(notes)
    keys = sorted({key for one in every for key in one})
    return {OURS + key: ", ".join(dict.fromkeys(one[key] for one in every if key in one)) for key in keys}


def with_added(
    added: Sequence[Applied], metadata: Mapping[str, str], base_hash: str, result_hash: str
) -> dict[str, str]:
    """Metadata of a model to which deltas were applied.

    metadata, base_hash: of the model before; result_hash: after. What it listed already stays, as possibly overlapping
    with what came on top. An empty text stands for a key that no longer holds.
    """
    earlier = applied_in(metadata, base_hash)
    ids = {one.id for one in added}
    under = [replace(one, overlaps=tuple(sorted({*one.overlaps, *ids}))) for one in earlier]
    new = _listed([*under, *added], metadata[BASE_HASH] if earlier else base_hash, result_hash)
    return {**{key: "" for key in metadata if key.startswith(OURS)}, **new}


def without(delta: str, listed: Sequence[Applied], metadata: Mapping[str, str], result_hash: str) -> dict[str, str]:
    """Metadata of a model after the delta of this id was taken out. listed: `applied_in` of the metadata before.

    An empty text stands for a key that no longer holds: all of ours, unless something else is known to be applied.
    """
    rest = [
        replace(one, overlaps=tuple(other for other in one.overlaps if other != delta))
        for one in listed
        if one.id != delta
    ]
    known = len(rest) < len(listed)
    new = _listed(rest, metadata[BASE_HASH], result_hash) if rest and known else {}
    return {**{key: "" for key in metadata if key.startswith(OURS)}, **new}


def why_kept(delta: str, listed: Sequence[Applied]) -> str:
    """Why the delta of this id cannot be taken out of a model that lists these; "" if it can."""
    mine = [one for one in listed if one.id == delta]
    if len(mine) != 1:
        return f"applied to it: {', '.join(map(str, listed))}" if listed else "it lists nothing that was applied to it"
    (one,) = mine
    if one.strength != 1.0 or not one.exact:
        return f"applied to it: {one}"
    if one.overlaps:
        return f"{', '.join(one.overlaps)} changed some of the same weights, or came on top of it"
    return ""


def _listed(entries: Sequence[Applied], base_hash: str, result_hash: str) -> dict[str, str]:
    described = [
        {"id": one.id, "strength": one.strength, "overlaps": list(one.overlaps)}
        | ({} if one.exact else {"differences": True})
        | ({"notes": dict(sorted(one.notes.items()))} if one.notes else {})
        for one in entries
    ]
    return {
        **joined(one.notes for one in entries),
        APPLIED: json.dumps(described, separators=(",", ":")),
        BASE_HASH: base_hash,
        RESULT_HASH: result_hash,
    }
