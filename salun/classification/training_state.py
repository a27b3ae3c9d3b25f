"""The saved state of a classifier's training: weights, moments, BatchNorm's statistics, random numbers, seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from salun.errors import TrainingError
from salun.masking.training_state import AGAIN, StateFile, read_saved_history

_RANDOM, _SECONDS = "random numbers", "seconds"  # with the model's buffers


class TrainingState:
    """A file from which an interrupted training continues to the same bytes. Fulfills `Alongside`.

    Args:
        path: The safetensors file; None for nowhere.
        fingerprint: All that the training depends on, as a hash.
        save_every: As in `StateFile`.

    Attributes:
        seconds_before: Time that the training took before it was resumed.
    """

    def __init__(self, path: Path | None, fingerprint: str, save_every: float = 60.0) -> None:
        self.path, self.fingerprint, self.save_every = path, fingerprint, save_every
        self.seconds_before = 0.0
        self._began = time.perf_counter()
        self._buffers: dict[str, Tensor] = {}
        self._random: dict[str, Tensor] = {}

    def file(self, model: nn.Module) -> StateFile | None:
        """Where the training of this model keeps its state. A file that cannot be read is removed."""
        if self.path is None:
            return None
        self._buffers = dict(model.named_buffers())
        self._device = next(model.parameters()).device
        try:
            read_saved_history(self.path, self.fingerprint)
        except TrainingError:
            self.remove()
        return StateFile(self.path, self.fingerprint, self.save_every, self)

    def remove(self) -> None:
        """Remove the file: the training is done."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def state(self) -> dict[str, Tensor]:
        """The model's buffers, the state of torch's random numbers, and the seconds taken so far."""
        numbers = {f"{_RANDOM} cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            numbers[f"{_RANDOM} cuda"] = torch.cuda.get_rng_state(self._device)
        seconds = self.seconds_before + time.perf_counter() - self._began
        return {**self._buffers, **numbers, _SECONDS: torch.tensor(seconds, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state of the same model. Raises TrainingError for another one's."""
        given = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        if given != {name: (tensor.dtype, tensor.shape) for name, tensor in self.state().items()}:
            raise TrainingError(f"the saved state {self.path} is of another model", advice=AGAIN)
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(state[name])
        self._random = {name: tensor for name, tensor in state.items() if name.startswith(_RANDOM)}
        self.seconds_before = float(state[_SECONDS])

    def restore_random_numbers(self) -> None:
        """Set torch's random numbers to where the saved training was."""
        try:
            torch.set_rng_state(self._random[f"{_RANDOM} cpu"])
            if f"{_RANDOM} cuda" in self._random:
                torch.cuda.set_rng_state(self._random[f"{_RANDOM} cuda"], self._device)
        except RuntimeError as error:
            raise TrainingError(f"the saved state {self.path} is damaged ({error})", advice=AGAIN) from error
