"""Numbers that a GPU computes, read a step later, so that the host never waits for the step that it has just queued."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class LateValues(Generic[Key]):
    """Small tensors on their way to the host: a GPU's arrive when the next ones are added, others at once.

    at_once: Wait for a GPU's too.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._at_once = at_once
        self._queue: deque[tuple[Key, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, key: Key, values: Tensor) -> list[tuple[Key, list[float]]]:
        """Send values (n,) on their way; returns those that have arrived by now, with their keys, in order."""
        late = values.device.type == "cuda" and not self._at_once
        copied = values.detach().to("cpu", non_blocking=late)  # into pinned memory
        event = None
        if late:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
        self._queue.append((key, copied, event))
        return self._arrived(keep=1 if late else 0)

    def rest(self) -> list[tuple[Key, list[float]]]:
        """Wait for all that are on their way."""
        return self._arrived(keep=0)

    def drop(self) -> None:
        """Forget all that are on their way."""
        self._queue.clear()

    def _arrived(self, keep: int) -> list[tuple[Key, list[float]]]:
        arrived = []
        while len(self._queue) > keep:
            key, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            arrived.append((key, values.tolist()))
        return arrived
