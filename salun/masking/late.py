"""Numbers that a GPU computes, read a step later, so that the host never waits for the step that it has just queued."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class LateValues(Generic[Key]):
    """Small tensors on their way to the host: a GPU's arrive when the next ones are added, others at once."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Key, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, key: Key, values: Tensor) -> list[tuple[Key, list[float]]]:
        """Send values (n,) on their way; returns those that have arrived by now, with their keys, in order."""
        copied = values.detach().to("cpu", non_blocking=True)  # into pinned memory
        event = None
        if values.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._queue.append((key, copied, event))
        return self._arrived(keep=0 if event is None else 1)

    def rest(self) -> list[tuple[Key, list[float]]]:
        """Wait for all that are on their way."""
        return self._arrived(keep=0)

    def _arrived(self, keep: int) -> list[tuple[Key, list[float]]]:
        arrived = []
        while len(self._queue) > keep:
            key, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            arrived.append((key, values.tolist()))
        return arrived
