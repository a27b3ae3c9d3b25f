"""Tensors on disk behind one face, in however many files they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.safetensors_io import Entry, Header


@dataclass(frozen=True, eq=False)
class Stored(Mapping[str, Tensor]):
    """A model's part on disk, mostly its UNet: diffusers name → tensor, each read when it is asked for.

    path: the single file or the diffusers folder. places: diffusers name → (file, the tensor's name in it).
    headers: of every file that holds some of them, as first read; a file that changes after that is an error.
    """

    path: Path
    places: dict[str, tuple[Path, str]]
    headers: dict[Path, Header]

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self.places[name]
        return safetensors_io.read_one(file, self.headers[file], inner)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.places

    @property
    def single(self) -> bool:
        """Whether this is one file with the whole model, not a diffusers folder."""
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
        file, inner = self.places[name]
        return self.headers[file].entries[inner]

    def inner(self, name: str) -> str:
        """A tensor's name in its file."""
        return self.places[name][1]

    @property
    def metadata(self) -> dict[str, str]:
        """The files' own metadata; of several files the first one's."""
        return next(iter(self.headers.values())).metadata
