"""What was applied to a model, as its file's metadata list it: `salun.applied`, `salun.base_hash`, `salun.result_hash`.

`salun.applied` is a JSON list of {"id", "strength", "overlaps": [ids], "notes": {…}}, with "differences": true where a
delta could not be applied bit-exactly. base_hash: of the UNet before all of them; result_hash: of the UNet as written,
so that a list which another program has copied to other weights is known to be void. Notes (`concept`, `seed`, …) are
repeated as `salun.*`, of all deltas together, for programs that only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from salun.untrusted import parse_json

PREFIX, APPLIED, BASE_HASH, RESULT_HASH = "salun.", "salun.applied", "salun.base_hash", "salun.result_hash"


@dataclass(frozen=True)
class Applied:
    """A delta that a model's metadata list.

    overlaps: ids of deltas that change some of the same entries, or may, since they came on top. exact: whether its
    weights are bit-exact. notes: the delta's metadata, as from `notes_in`.
    """

    id: str
    strength: float = 1.0
    overlaps: tuple[str, ...] = ()
    exact: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.id} at strength {self.strength:g}" + ("" if self.exact else " as differences")


def applied_in(metadata: Mapping[str, str], actual: str) -> list[Applied]:
    """The deltas that an untrusted file's metadata list; none if its weights, of the hash `actual`, are others."""
    if metadata.get(RESULT_HASH) != actual or BASE_HASH not in metadata:
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
    """The `salun.*` metadata besides the list of applied deltas, without their `salun.`."""
    return {
        key.removeprefix(PREFIX): text
        for key, text in sorted(metadata.items())
        if key.startswith(PREFIX) and key not in (APPLIED, BASE_HASH, RESULT_HASH)
    }


def joined(notes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Notes of several deltas under `salun.*`, the values of a key joined by commas."""
    every = list(notes)
    keys = sorted({key for each in every for key in each})
    return {PREFIX + key: ", ".join(dict.fromkeys(each[key] for each in every if key in each)) for key in keys}


def with_added(
    added: Sequence[Applied], metadata: Mapping[str, str], base_hash: str, result_hash: str
) -> dict[str, str]:
    """Metadata of a model to which deltas were applied.

    metadata, base_hash: of the model before; result_hash: after. What it listed already stays, as possibly overlapping
    with what came on top. An empty text stands for a key that no longer holds.
    """
    earlier = applied_in(metadata, base_hash)
    ids = {each.id for each in added}
    under = [replace(each, overlaps=tuple(sorted({*each.overlaps, *ids}))) for each in earlier]
    new = _listed([*under, *added], metadata[BASE_HASH] if earlier else base_hash, result_hash)
    return {**{key: "" for key in metadata if key.startswith(PREFIX)}, **new}


def with_removed(
    delta: str, listed: Sequence[Applied], metadata: Mapping[str, str], result_hash: str
) -> dict[str, str]:
    """Metadata of a model after the delta of this id was undone. listed: `applied_in` of the metadata before.

    An empty text stands for a key that no longer holds: all `salun.*`, unless something else is known to be applied.
    """
    rest = [
        replace(each, overlaps=tuple(other for other in each.overlaps if other != delta))
        for each in listed
        if each.id != delta
    ]
    known = len(rest) < len(listed)
    new = _listed(rest, metadata[BASE_HASH], result_hash) if rest and known else {}
    return {**{key: "" for key in metadata if key.startswith(PREFIX)}, **new}


def reason_not_undoable(delta: str, listed: Sequence[Applied]) -> str:
    """Why the delta of this id cannot be undone in a model that lists these; "" if it can."""
    matching = [each for each in listed if each.id == delta]
    if len(matching) != 1:
        return f"applied to it: {', '.join(map(str, listed))}" if listed else "its metadata list no applied delta"
    (applied,) = matching
    if applied.strength != 1.0 or not applied.exact:
        return f"applied to it: {applied}"
    if applied.overlaps:
        return f"{', '.join(applied.overlaps)} changed some of the same weights, or came on top of it"
    return ""


def _listed(entries: Sequence[Applied], base_hash: str, result_hash: str) -> dict[str, str]:
    described = [
        {"id": each.id, "strength": each.strength, "overlaps": list(each.overlaps)}
        | ({} if each.exact else {"differences": True})
        | ({"notes": dict(sorted(each.notes.items()))} if each.notes else {})
        for each in entries
    ]
    return {
        **joined(each.notes for each in entries),
        APPLIED: json.dumps(described, separators=(",", ":")),
        BASE_HASH: base_hash,
        RESULT_HASH: result_hash,
    }
