"""The sparse delta: what an erasure changed, small, bit-exact in both directions, and scaled by a strength.

Per changed tensor it holds which entries changed (packed bits, or their indices where those are smaller) and the XOR of
the old and new bit patterns in the checkpoint's dtype, split into byte planes. XOR makes `apply` at strength 1 and
`undo` exact; with the base at hand new − old gives any other strength. In memory a delta takes what its file takes;
tensors are made one at a time.

Anyone with the delta can undo the erasure: if a concept must not come back, publish the checkpoint, not the delta.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.hashing import Hasher
from salun.delta.provenance import Applied, notes_in, with_added
from salun.delta.stacking import AppliedDeltas, damaged, stack
from salun.delta.xor import Change
from salun.errors import ModelError, some
from salun.progress import Event, Progress, Stage, silent
from salun.untrusted import parse_json

FORMAT = "salun-delta-1"
DAMAGED = "Download or make it again"
PARTS = ("where", "xor")  # of a tensor, in the file's names


@dataclass(frozen=True, eq=False)
class Delta:
    """The difference between two states of a model's UNet.

    changes: name → what changed, sorted by name. base_hash, result_hash: of the whole UNet before and after (see
    `base_hash`). dtypes: those of the unchanged tensors, "" standing for all that are not named. metadata: strings
    saved with them.
    """

    changes: dict[str, Change]
    base_hash: str
    base_hash_fp16: str
    result_hash: str
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        progress: Progress = silent,
    ) -> Delta:
        """The delta from `base` to `new`, all tensors of the UNet each. Raises ModelError if they do not pair up.

        Either may read its tensors lazily: each is read once, and one of each is held at a time.
        """
        lone = sorted(set(base) ^ set(new))
        if lone:
            raise ModelError(f"the two models do not have the same tensors: only one of them has {some(lone)}")
        return cls.of_changed(base, new, metadata, progress)

    @classmethod
    def of_changed(
        cls,
        base: Mapping[str, Tensor],
        changed: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        progress: Progress = silent,
    ) -> Delta:
        """`between`, where `changed` holds only the tensors that may differ from the base's."""
        before, after = Hasher(rounded=True), Hasher()
        changes: dict[str, Change] = {}
        dtypes: dict[str, torch.dtype] = {}
        for i, name in enumerate(sorted(base), 1):
            old = base[name]
            new = changed.get(name, old)
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                raise ModelError(
                    f"{name} is {old.dtype} {list(old.shape)} in the base, "
                    f"but {new.dtype} {list(new.shape)} in the other model",
                    advice="Give two states of one model in one dtype",
                )
            before.add(name, old)
            after.add(name, new)
            change = Change.between(old, new) if new is not old else None
            if change is None:
                dtypes[name] = old.dtype
            else:
                changes[name] = change
            progress(Event(Stage.COMPARING, i, len(base)))
        most = max(count := Counter(dtypes.values()), key=count.__getitem__, default=torch.float32)
        others = {name: dtype for name, dtype in dtypes.items() if dtype != most}
        return cls(changes, before.hash, before.fp16, after.hash, {"": most, **others}, dict(metadata or {}))

    @property
    def id(self) -> str:
        """The delta's name in the metadata of models: 16 hex digits made of both hashes."""
        return hashlib.sha256(f"{self.base_hash}\0{self.result_hash}".encode()).hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        return list(self.changes)

    @property
    def changed(self) -> int:
        """Entries that changed, in all."""
        return sum(change.count for change in self.changes.values())

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor of the base."""
        change = self.changes.get(name)
        return change.dtype if change else self.dtypes.get(name, self.dtypes[""])

    # -- use ------------------------------------------------------------------------------------------------------

    def apply(
        self, tensors: Mapping[str, Tensor], strength: float = 1.0, *, known_hash: str | None = None
    ) -> dict[str, Tensor]:
        """The changed tensors, as new ones. tensors: all of the base UNet, which is not touched.

        Strength 1 is bit-exact, which the result's hash confirms; others give round(old + s·(new − old)), in
        float32, rounded once. See `stack` for a base in another dtype, for several deltas, and for what is raised.
        known_hash: the base hash of `tensors`, where it is known; then neither hash is computed.
        """
        return dict(stack(tensors, [(self, strength)], known_hash=known_hash))

    def undo(self, tensors: Mapping[str, Tensor], *, known_hash: str | None = None) -> dict[str, Tensor]:
        """The base's tensors, bit-exact, from the erased UNet. Raises ModelError for any other.

        known_hash: as in `apply`.
        """
        flipped = AppliedDeltas(tensors, ((self, 1.0),))
        current, _, back = (known_hash, known_hash, "") if known_hash else flipped.hashes()
        if current != self.result_hash:
            raise ModelError(
                f"the delta's erased model is {self.result_hash[:12]}…, but this is {current[:12]}…",
                advice=f"Start from its base ({self.base_hash[:12]}…), which needs no undo",
            )
        if back != self.base_hash if back else flipped.incompatible_names():
            raise damaged("its result is not its base")
        return dict(flipped)

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write `*.salun.safetensors`; equal deltas give equal bytes."""
        items: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            items[f"{name}.where"] = torch.from_numpy(change.indices)
            items[f"{name}.xor"] = torch.from_numpy(change.planes).view(-1)
        metadata = {
            "format": FORMAT,
            "base_hash": self.base_hash,
            "base_hash_fp16": self.base_hash_fp16,
            "result_hash": self.result_hash,
            "content": _content(self.changes),
            "dtypes": _json({name: safetensors_io.NAMES[dtype] for name, dtype in self.dtypes.items()}),
            "tensors": _json(
                {n: [safetensors_io.NAMES[c.dtype], list(c.shape), c.kind] for n, c in self.changes.items()}
            ),
        }
        safetensors_io.write(Path(path), items, {**self.metadata, **metadata})

    @classmethod
    def load(cls, path: Path | str) -> Delta:
        """Read a delta file, untrusted, into as much memory as it takes on disk.

        Raises ModelError if it is not a delta, is inconsistent, or its content is not what was written.
        """
        path = Path(path).expanduser()
        header = safetensors_io.read_header(path)
        metadata = dict(header.metadata)
        if metadata.pop("format", None) != FORMAT:
            raise ModelError(f"{path} is not a salun delta (its header names no format {FORMAT})")
        try:
            described = parse_json(metadata.pop("tensors"))
            dtypes = {name: safetensors_io.DTYPES[dtype] for name, dtype in parse_json(metadata.pop("dtypes")).items()}
            hashes = [metadata.pop(key) for key in ("base_hash", "base_hash_fp16", "result_hash")]
            content = metadata.pop("content")
            if "" not in dtypes or not all(re.fullmatch("[0-9a-f]{64}", text) for text in hashes):
                raise ValueError("its hashes or dtypes are not all there")
            if set(header.names) != {f"{name}.{part}" for name in described for part in PARTS}:
                raise ValueError("it lists other tensors than it holds")
            changes = {}
            with path.open("rb") as file:
                for name in sorted(described):
                    where, xor = (
                        safetensors_io.read_tensor(file, header.entries[f"{name}.{part}"], path) for part in PARTS
                    )
                    dtype, shape, kind = described[name]
                    changes[name] = Change.checked(dtype, shape, kind, where, xor)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"the delta {path} is damaged: {str(error)[:200]}", advice=DAMAGED) from error
        if _content(changes) != content:
            raise ModelError(f"the delta {path} is damaged: its content is not what was written", advice=DAMAGED)
        return cls(changes, hashes[0], hashes[1], hashes[2], dtypes, metadata)


def _content(changes: Mapping[str, Change]) -> str:
    """sha256, in hex, over what the file holds of every tensor."""
    digest = hashlib.sha256()
    for change in changes.values():
        digest.update(change.indices.data)
        digest.update(change.planes.data)
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def applied_metadata(delta: Delta, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the metadata of a model say to which the delta was applied at strength 1, or that was erased so.

    metadata: of the file that the delta was applied to; deltas that it lists stay listed.
    """
    return with_added(
        [Applied(delta.id, notes=notes_in(delta.metadata))], metadata or {}, delta.base_hash, delta.result_hash
    )
