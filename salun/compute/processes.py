"""Several processes, one run: who am I, and sums over all. Made by accelerate's launcher; one process without it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """rank: this process, from 0. count: how many there are."""

    rank: int = 0
    count: int = 1

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place. The order must be the same on all of them."""
        if self.count > 1:
            for tensor in tensors:
                if tensor.device.type == "cpu" and torch.distributed.get_backend() == "nccl":
                    there = tensor.cuda()  # nccl sums on GPUs only
                    torch.distributed.all_reduce(there)
                    tensor.copy_(there)
                else:
                    torch.distributed.all_reduce(tensor)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
        tensors = list(tensors)
        self.all_reduce_sum(tensors)
        for tensor in tensors:
            tensor.div_(self.count)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all of them; for what one must decide, such as whether a file is there."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(
        self, parts: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> list[Tensor]:
        """All of `shapes` float32 tensors, of which tensor i is in the `parts` of process i mod count."""
        found = []
        for i, shape in enumerate(shapes):
            tensor = parts[i] if i in parts else torch.empty(shape, device=device)
            if self.count > 1:
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor, src=i % self.count)
            found.append(tensor)
        return found

    def owns(self, index: int) -> bool:
        """Whether this process does the index-th piece of work."""
        return index % self.count == self.rank


ALONE = Processes()


def current() -> Processes:
    """The processes of `accelerate launch` (or torchrun); `ALONE` without a launcher, and no accelerate needed."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch.distributed.nn  # its defaults would keep a group that exists by then, and with it the group's threads
    from accelerate import PartialState

    begins = not torch.distributed.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available())
    if begins:
        atexit.register(_leave)
    return Processes(state.process_index, state.num_processes)


def _leave() -> None:
    """Close the group, and wait for its threads, before the interpreter ends: one that lets go of the last tensor
    after that aborts the process, and the launcher takes a finished run for a failed one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
