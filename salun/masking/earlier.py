"""Weights from earlier in a training, which may be taken at its end: in a file next to its state, or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.errors import TrainingError

ADVICE = "Delete it and the training state next to it to start from the first step"


class EarlierWeights:
    """Holds one set of master weights; the next one that is written takes its place.

    Args:
        path: The file, so that a resumed training has them too; None to hold them in memory.
        fingerprint: What a file must carry to be of this training.
        writes: Whether this process writes the file; all of them read it.
    """

    def __init__(self, path: Path | None, fingerprint: str = "", writes: bool = True) -> None:
        self._path, self._fingerprint, self._writes = path, fingerprint, writes
        self._held: dict[str, Tensor] = {}

    def write(self, masters: Mapping[str, Tensor]) -> None:
        """Keep a copy of these, float32 by name. Raises ModelError if the disk is full."""
        if self._path is None:
            self._held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in masters.items()}
        elif self._writes:
            tensors = {name: tensor.detach().cpu() for name, tensor in masters.items()}
            safetensors_io.write(self._path, tensors, {"fingerprint": self._fingerprint})

    def read(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that were written last; the file may be untrusted input.

        Args:
            like: Tensors of the same names and shapes.

        Raises:
            TrainingError: There are none, or they are not those of this training.
        """
        if self._path is None:
            return self._held
        header = safetensors_io.read_header(self._path)
        shapes = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        expected = {name: ("F32", tuple(tensor.shape)) for name, tensor in like.items()}
        if header.metadata.get("fingerprint") != self._fingerprint or shapes != expected:
            raise TrainingError(f"{self._path} does not hold weights of this training", advice=ADVICE)
        read = dict(safetensors_io.tensors(self._path, list(expected)))
        if not all(torch.isfinite(tensor).all() for tensor in read.values()):
            raise TrainingError(f"{self._path} holds weights that are not finite", advice=ADVICE)
        return read
