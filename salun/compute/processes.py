"""The processes of one run under `accelerate launch`, and their collectives; one process without a launcher."""

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
    """A group of processes.

    Args:
        rank: Index of this process, from 0.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place. The order must be the same in all of them."""
        if self.count > 1:
            for tensor in tensors:
                if tensor.device.type == "cpu" and torch.distributed.get_backend() == "nccl":
                    on_gpu = tensor.cuda()  # nccl sums on GPUs only
                    torch.distributed.all_reduce(on_gpu)
                    tensor.copy_(on_gpu)
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

    def least(self, value: int) -> int:
        """The least of all processes' values, in all of them."""
        if self.count == 1:
            return value
        values = [0] * self.count
        torch.distributed.all_gather_object(values, value)
        return min(values)

    def gather(
        self, parts: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> list[Tensor]:
        """All tensors of a list that is spread over the processes, in all of them.

        Args:
            parts: Index → float32 tensor, of the indices that this process owns (see `mine`).
            shapes: Shape of every tensor of the list.
            device: Device of the tensors.
        """
        tensors = []
        for i, shape in enumerate(shapes):
            tensor = parts[i] if i in parts else torch.empty(shape, device=device)
            if self.count > 1:
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor, src=i % self.count)
            tensors.append(tensor)
        return tensors

    def owns(self, index: int) -> bool:
        """Whether this process does the index-th piece of work."""
        return index % self.count == self.rank


ALONE = Processes()


def current_processes() -> Processes:
    """The processes of `accelerate launch` or torchrun; `ALONE` without a launcher, which needs no accelerate."""
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
    """Close the group and wait for its threads before the interpreter ends: a thread that frees the last tensor later
    aborts the process, and the launcher takes a finished run for a failed one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
