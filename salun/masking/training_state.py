"""The saved state of a training: masters, moments and losses in a file that may be untrusted input when it is read."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.errors import ModelError, TrainingError
from salun.masking.optim import MaskedOptimizer

logger = logging.getLogger("salun")
LossRow = dict[str, float]
"""{"step": 1, "forget": 0.5, …}: the position of a row (a step or an epoch, from 1) and its losses by name."""
AGAIN = "Delete it to start from the first step"
ALONGSIDE = "alongside: "  # before names of tensors that are not the optimizer's


class Alongside(Protocol):
    """Something that the losses change at each step, and that a resumed training needs as it was."""

    def state(self) -> dict[str, Tensor]:
        """Its tensors."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from them; they may be untrusted input. Raises TrainingError for those of something else."""


@dataclass(frozen=True)
class StateFile:
    """Where a training keeps its state.

    Args:
        path: The safetensors file.
        fingerprint: What a saved state must carry to be resumed.
        save_every: Seconds between saves; more where saving itself takes long, so that it costs at most a tenth of the
            time. 0 saves after every step.
        alongside: What is saved and resumed with the weights; None for nothing.
    """

    path: Path
    fingerprint: str = ""
    save_every: float = 60.0
    alongside: Alongside | None = None

    def load(self, optimizer: MaskedOptimizer, steps: int) -> list[LossRow]:
        """Hand the saved tensors and loss scale to the optimizer, which has that of a fresh run; returns the history.

        Args:
            steps: Steps of the run in all.

        Raises:
            TrainingError: The state cannot be read, belongs to another run, or is not one that this run could save.
        """
        history = read_saved_history(self.path, self.fingerprint, steps)
        header = safetensors_io.read_header(self.path)
        largest_scale = float(optimizer.loss_scale)
        scale = _scale(header.metadata.get("scale", ""), largest_scale)
        if scale is None:
            raise TrainingError(
                f"the saved state {self.path} has a loss scale that is not a power of 2 from 1 to {largest_scale:g}",
                advice=AGAIN,
            )
        others = [name for name in header.entries if name.startswith(ALONGSIDE)]
        if bool(others) != (self.alongside is not None):
            raise TrainingError(f"the saved state {self.path} is of another kind of training", advice=AGAIN)
        mine = {name: entry for name, entry in header.entries.items() if name not in others}
        optimizer.check_state({name: (safetensors_io.DTYPES[e.dtype], e.shape) for name, e in mine.items()})
        optimizer.load_state(dict(safetensors_io.tensors(self.path, mine)), len(history))
        optimizer.loss_scale.fill_(scale)
        if self.alongside is not None:
            tensors = dict(safetensors_io.tensors(self.path, others))
            self.alongside.load_state({name.removeprefix(ALONGSIDE): tensor for name, tensor in tensors.items()})
        return history

    def save(self, optimizer: MaskedOptimizer, history: list[LossRow], scale: float) -> None:
        """Write the state. Raises ModelError if the disk is full."""
        metadata = {"history": json.dumps(history), "scale": str(scale), "fingerprint": self.fingerprint}
        more = self.alongside.state() if self.alongside is not None else {}
        tensors = {**optimizer.state(), **{f"{ALONGSIDE}{name}": tensor for name, tensor in more.items()}}
        safetensors_io.write(self.path, {name: t.detach().cpu() for name, t in tensors.items()}, metadata)


class Checkpointer:
    """Saves the state of a running training from time to time."""

    def __init__(self, file: StateFile, optimizer: MaskedOptimizer) -> None:
        self._file, self._optimizer = file, optimizer
        self._wait, self._saved = file.save_every, time.monotonic()

    def is_due(self, last: bool) -> bool:
        """Whether the time to save has come, as it has after the last step."""
        return last or time.monotonic() - self._saved >= self._wait

    def save(self, history: list[LossRow], scale: float) -> str:
        """Save; returns the reason of a failure, else "".

        A full disk does not stop the run, but it cannot be resumed then.
        """
        now, failure = time.monotonic(), ""
        try:
            self._file.save(self._optimizer, history, scale)
        except ModelError as error:
            failure = f"the training state could not be saved: {error}"
        self._saved = time.monotonic()
        self._wait = max(self._file.save_every, 10 * (self._saved - now)) if self._file.save_every else 0.0
        return failure

    def save_on_cancel(self, history: list[LossRow], scale: float) -> None:
        """Save now; a failure is logged, for the run is cancelled nevertheless."""
        try:
            self._file.save(self._optimizer, history, scale)
        except ModelError as error:
            logger.warning("the training state could not be saved: %s", error)


def read_saved_history(path: Path, fingerprint: str, most: int | None = None) -> list[LossRow]:
    """The history of a saved state without its tensors; empty where there is no file.

    Args:
        most: Steps of the run in all.

    Raises:
        TrainingError: The state cannot be read, belongs to another run, or its history is not one of steps 1, 2, …
            with finite losses.
    """
    if not path.exists():
        return []
    try:
        metadata = safetensors_io.read_header(path).metadata
        if metadata.get("fingerprint") == fingerprint:
            history = _history(json.loads(metadata["history"]))
    except (ModelError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"the saved state {path} cannot be read ({error})", advice=AGAIN) from error
    if metadata.get("fingerprint") != fingerprint:
        raise TrainingError(
            f"the saved state {path} is of a run with other options or another model",
            advice="Repeat the run with those, or delete the state",
        )
    if most is not None and len(history) > most:
        raise TrainingError(
            f"the saved state {path} has taken {len(history)} steps, but the run takes {most}", advice=AGAIN
        )
    return history


def _history(rows: Any) -> list[LossRow]:
    """Rows of steps 1, 2, … with finite losses; raises ValueError for anything else."""
    if not isinstance(rows, list):
        raise ValueError("its history is not a list")
    for i, row in enumerate(rows, 1):
        losses = {**row} if isinstance(row, dict) else {}
        step = losses.pop("step", None)
        finite = all(type(loss) is float and math.isfinite(loss) for loss in losses.values())
        if type(step) is not int or step != i or not losses or not finite:
            raise ValueError(f"entry {i} of its history is not step {i} with finite losses")
    return rows


def _scale(text: str, largest: float) -> float | None:
    """The loss scale that halving the largest can lead to; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 1.0 <= value <= largest and math.frexp(value)[0] == 0.5 else None
