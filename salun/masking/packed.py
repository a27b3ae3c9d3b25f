"""The masked entries of one parameter, packed into a float32 vector that any optimizer can train."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from salun.compute.device import any_order, to_device

_MAX_CACHED = 1 << 18  # entries; the indices of parameters up to this size are cached on every device


class PackedParameter:
    """One parameter and its masked entries.

    master: float32 (count,), the entries' exact values; the parameter holds them rounded to its own dtype. Mask indices
    take four bytes each: in CPU memory they are cached, on a GPU recomputed from the packed bits (not `cached`).
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        bits: np.ndarray,
        count: int,
        source: Tensor,
        cpu_offload: bool = False,
        cached: bool = True,
    ) -> None:
        self.parameter, self.count = parameter, count
        self.is_full = count == parameter.numel()
        keep = cached or parameter.numel() <= _MAX_CACHED
        self._bits = torch.from_numpy(bits) if self.is_full or keep else torch.from_numpy(bits).to(parameter.device)
        self._indices = (
            self._indices_from_bits().to(torch.int32).to(parameter.device) if keep and not self.is_full else None
        )
        values = self.gather(source.to(parameter.device), self.indices()).float()
        self.master = nn.Parameter(values.to("cpu" if cpu_offload else values.device, copy=True))

    def indices(self) -> Tensor | None:
        """Flat indices of the masked entries, (count,), ascending; None for all of them."""
        if self.is_full:
            return None
        return self._indices if self._indices is not None else self._indices_from_bits()

    def gather(self, tensor: Tensor, indices: Tensor | None) -> Tensor:
        """The masked entries of a tensor of the parameter's shape, (count,)."""
        flat = tensor.detach().flatten()
        return flat if indices is None else flat.index_select(0, indices)

    @torch.no_grad()
    def scatter(self, indices: Tensor | None) -> None:
        """Write the master, rounded to nearest, into the parameter's masked entries."""
        values = to_device(self.master.to(self.parameter.dtype), self.parameter.device)
        if indices is None:
            self.parameter.copy_(values.view_as(self.parameter))
        elif self.parameter.is_contiguous():
            with any_order():  # each entry is written once
                self.parameter.data.view(-1).index_copy_(0, indices.long(), values)
        else:
            self.parameter.copy_(self.parameter.flatten().index_copy(0, indices.long(), values).view_as(self.parameter))

    def _indices_from_bits(self) -> Tensor:
        """The indices from the packed bits: bit k of byte i is entry 8·i + k."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self._bits.device)
        dense = (self._bits.unsqueeze(1) >> shifts).bitwise_and_(1).view(torch.bool).flatten()
        return _nonzero(dense[: self.parameter.numel()], self.count)


def _nonzero(dense: Tensor, count: int) -> Tensor:
    """Where a boolean vector of `count` true entries is true: of known size, so that the host need not wait for it."""
    try:
        return torch.nonzero_static(dense, size=count).view(-1)
    except NotImplementedError:  # on a GPU by an old torch
        return dense.nonzero().view(-1)
