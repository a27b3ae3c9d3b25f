"""Weights from earlier in a training, which may be taken at its end: in a file next to its state, or in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.errors import ModelError, TrainingError

logger = logging.getLogger("salun")


class EarlierWeights:
    """Holds one set of master weights; the next one that is written takes its place.

    Args:
        path: The file, so that a resumed training has them too; None to hold them in memory.
        fingerprint: What a file must carry to be of this training.
        writes: Whether this process writes the file; all of them read it.
    """

    def __init__(self, path: Path | None, fingerprint: str = "", writes: bool = True) -> None:
        self._path, self._fingerprint, self._writes = path, fingerprint, writes
        self._held, self._step = dict[str, Tensor](), 0

    def write(self, masters: Mapping[str, Tensor], step: int) -> None:
        """Keep a copy of the weights after a step, float32 by name; on a full disk in this process's memory."""
        if self._path is not None and not self._writes:
            return
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in masters.items()}
        self._held, self._step = {}, step
        if self._path is None:
            self._held = tensors
            return
        try:
            safetensors_io.write(self._path, tensors, self._facts(step))
        except ModelError as error:
            logger.warning("weights that a goal may come back to could not be saved: %s", error)
            self._held = tensors

    def _facts(self, step: int) -> dict[str, str]:
        return {"fingerprint": self._fingerprint, "step": str(step)}

    def read(self, like: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Those that were written last; the file may be untrusted input.

        Args:
            like: Tensors of the same names and shapes.
            step: After which they were written.

        Raises:
            TrainingError: There are none, or they are not those of this training.
        """
        if self._held and self._step == step:
            return self._held
        if self._path is None:
            raise TrainingError(f"there are no weights of step {step}")
        try:
            header = safetensors_io.read_header(self._path)
        except ModelError as error:
            raise TrainingError(f"there are no weights of step {step}: {error}") from error
        shapes = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        expected = {name: ("F32", tuple(tensor.shape)) for name, tensor in like.items()}
        facts = {name: header.metadata.get(name) for name in ("fingerprint", "step")}
        if facts != self._facts(step) or shapes != expected:
            raise TrainingError(f"{self._path} does not hold weights of this training after step {step}")
        read = dict(safetensors_io.tensors(self._path, list(expected)))
        if not all(torch.isfinite(tensor).all() for tensor in read.values()):
            raise TrainingError(f"{self._path} holds weights that are not finite")
        return read
