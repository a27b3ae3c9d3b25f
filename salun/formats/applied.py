"""What was applied to a model, as its file's metadata list it: `salun.applied`, `salun.base_hash`, `salun.result_hash`.

`salun.applied` is a JSON list of {"id", "strength", "overlaps": [ids]}, with "differences": true where a delta could
not be applied to the bit. base_hash: of the UNet before all of them; result_hash: of the UNet as written, so that a
list which another program has copied to other weights is known to be void.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

OURS, APPLIED, BASE_HASH, RESULT_HASH = "salun.", "salun.applied", "salun.base_hash", "salun.result_hash"


@dataclass(frozen=True)
class Applied:
    """A delta that a model lists.

    overlaps: ids of deltas that change some of the same entries, or may, since they came on top. exact: whether its
    entries hold the bits that it gives its own base.
    """

    id: str
    strength: float = 1.0
    overlaps: tuple[str, ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.id} at strength {self.strength:g}" + ("" if self.exact else " as differences")


def applied_in(metadata: Mapping[str, str], found: str) -> list[Applied]:
    """The deltas that an untrusted file's metadata list; none if its weights, of the hash `found`, are others now."""
    if metadata.get(RESULT_HASH) != found or BASE_HASH not in metadata:
        return []
    try:
        return [
            Applied(str(e["id"]), float(e["strength"]), tuple(map(str, e["overlaps"])), not e.get("differences"))
            for e in json.loads(metadata[APPLIED])
        ]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return []


def with_added(
    added: Sequence[Applied], metadata: Mapping[str, str], base_hash: str, result_hash: str
) -> dict[str, str]:
    """Metadata of a model to which deltas were applied.

    metadata, base_hash: of the model before; result_hash: after. What it listed already stays, as possibly overlapping
    with what came on top.
    """
    earlier = applied_in(metadata, base_hash)
    ids = {one.id for one in added}
    under = [replace(one, overlaps=tuple(sorted({*one.overlaps, *ids}))) for one in earlier]
    return _listed([*under, *added], metadata[BASE_HASH] if earlier else base_hash, result_hash)


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
        for one in entries
    ]
    return {
        APPLIED: json.dumps(described, separators=(",", ":")),
        BASE_HASH: base_hash,
        RESULT_HASH: result_hash,
    }
