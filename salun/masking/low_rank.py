"""Low-rank changes of weights, trained in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn


class LowRank:
    """ΔW = s·BA of every matrix and convolution among some parameters: A (r, in) is random at first, and B (out, r) 0.

    The network's modules stay as they are: `write` puts W₀ + ΔW into the live parameters, and `lead` leads the gradient
    of W on to A and B by the chain rule. A context manager: the live parameters have gradients inside it alone.

    Args:
        parameters: Live ones, by name; those of fewer than two dimensions stay as they are.
        original: W₀ by name.
        rank: r, or less where a matrix is smaller.
        scale: s.
        loss_scale: What a loss is multiplied by before its gradient is taken, so that none vanishes in fp16.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        original: Mapping[str, Tensor],
        rank: int,
        scale: float,
        seed: int,
        loss_scale: float = 1.0,
    ) -> None:
        self._live = {name: p for name, p in parameters.items() if p.ndim >= 2}
        self._original, self._scale, self._loss_scale = original, scale, loss_scale
        self.factors: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, live in self._live.items():
            rows, columns = len(live), live[0].numel()
            r = min(rank, rows, columns)
            a = (2 * torch.rand(r, columns, generator=generator) - 1) / columns**0.5
            self.factors[f"{name}.A"] = nn.Parameter(a.to(live.device))
            self.factors[f"{name}.B"] = nn.Parameter(torch.zeros(rows, r, device=live.device))

    def __enter__(self) -> LowRank:
        self._required = {name: live.requires_grad for name, live in self._live.items()}
        for live in self._live.values():
            live.requires_grad_(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, live in self._live.items():
            live.requires_grad_(self._required[name])

    def change(self, name: str) -> Tensor:
        """ΔW of a parameter, float32, of its shape."""
        product = self.factors[f"{name}.B"] @ self.factors[f"{name}.A"]
        return (self._scale * product).view(self._live[name].shape)

    @torch.no_grad()
    def write(self) -> None:
        """Put W₀ + ΔW into the live parameters."""
        for name, live in self._live.items():
            live.copy_(self._original[name].to(live.device).float() + self.change(name))

    def lead(self, loss: Tensor) -> Tensor:
        """A loss of the live parameters as one of A and B: of the same value, and of the gradient by the chain rule."""
        names = list(self._live)
        gradients = torch.autograd.grad(
            loss * self._loss_scale, [self._live[name] for name in names], allow_unused=True
        )
        parts = [
            (gradient.float() / self._loss_scale * self.change(name)).sum()
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None
        ]
        led = torch.stack(parts).sum()
        return led + (loss.detach() - led.detach())

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """W₀ + ΔW, float32 and flat, on the CPU."""
        return {name: (self._original[name].float().cpu() + self.change(name).cpu()).flatten() for name in self._live}
