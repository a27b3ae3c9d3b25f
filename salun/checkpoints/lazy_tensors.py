"""Tensors that are read or made on access, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.safetensors_io import Entry, Header
from salun.progress import Event, Progress, Stage


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are made anew at each access.

    Args:
        names: In order.
        make: Name → tensor.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # without making it
        return name in self._names


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> LazyTensors:
    """The same tensors under other names. names: new name → name in `tensors`."""
    return LazyTensors(names, lambda name: tensors[names[name]])


def reporting(tensors: Mapping[str, Tensor], stage: Stage, progress: Progress) -> LazyTensors:
    """The same tensors; each access reports the tensor's position among all."""
    position = {name: i for i, name in enumerate(tensors, 1)}

    def make(name: str) -> Tensor:
        tensor = tensors[name]
        progress(Event(stage, position[name], len(position)))
        return tensor

    return LazyTensors(position, make)


class Planned(NamedTuple):
    """A tensor that `make` gives, of this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class PlannedTensors(LazyTensors):
    """Tensors whose dtypes and shapes are known before they are made, so that they can be written one at a time.

    described: name → (dtype, shape).
    """

    def __init__(self, planned: Mapping[str, Planned]) -> None:
        super().__init__(planned, lambda name: planned[name].make())
        self.described = {name: (each.dtype, each.shape) for name, each in planned.items()}

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, as `safetensors_io.write_lazily`."""
        safetensors_io.write_lazily(path, self.described, self, metadata)


@dataclass(eq=False)
class Stored(LazyTensors):
    """A model's part on disk, mostly its network: diffusers name → tensor, read at each access.

    Args:
        path: The single file or the diffusers folder.
        locations: diffusers name → (file, the tensor's name in it).
        headers: Of every file that holds some of them, as first read; a file that changes after that is an error.
    """

    path: Path
    locations: dict[str, tuple[Path, str]]
    headers: dict[Path, Header]

    def __post_init__(self) -> None:
        super().__init__(self.locations, self._read)

    def _read(self, name: str) -> Tensor:
        file, inner = self.locations[name]
        return safetensors_io.read_one(file, self.headers[file], inner)

    @property
    def single(self) -> bool:
        """Whether this is a single file, not a diffusers folder."""
        return self.path in self.headers

    @property
    def part(self) -> str:
        """The name of the folder with the files: "unet", in a diffusers folder."""
        return self.files[0].parent.name

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(self.headers)

    def entry(self, name: str) -> Entry:
        """dtype and shape of a tensor, without reading it."""
        file, inner = self.locations[name]
        return self.headers[file].entries[inner]

    def name_in_file(self, name: str) -> str:
        """A tensor's name in its file."""
        return self.locations[name][1]

    @property
    def metadata(self) -> dict[str, str]:
        """The files' own metadata; of several files the first one's."""
        return next(iter(self.headers.values())).metadata
