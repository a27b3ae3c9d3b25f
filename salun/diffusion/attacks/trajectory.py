"""DDIM sampling that attacks can enter half-way, disturb, or hold to a known image (Song et al. 2021, eq. 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from salun.diffusion.attacks.task import AttackTask
from salun.diffusion.data.latents import batch_size_of, noise_of
from salun.diffusion.model.protocol import Conditioning, DiffusionModel


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The sampling of n images with guidance, in DDIM steps.

    Args:
        model: Whose live network denoises.
        prompts: Conditionings (n,). empty: What guidance leads away from, (1,).
        steps, guidance: As of `Sampling`.
        eta: η, the noise added in each step: 0 for none, 1 for as much as DDPM.
        scale: Factor of that noise, beyond what the step makes room for.
        on_step: Called before each step, where a host may cancel.
        known: Images (n, c, h, w) that the samples are held to outside of `hole`, bool (1, 1, h, w); None for none.
    """

    model: DiffusionModel
    prompts: Conditioning
    empty: Conditioning
    steps: int
    guidance: float
    eta: float = 0.0
    scale: float = 1.0
    on_step: Callable[[], None] = lambda: None
    known: Tensor | None = None
    hole: Tensor | None = None

    @torch.no_grad()
    def run(self, x: Tensor, generator: torch.Generator, start: int = 0, end: int | None = None) -> Tensor:
        """From x_t before step `start` to that before step `end`, by default to the image; float32 (n, c, h, w)."""
        size, parts = batch_size_of(self.model), []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            part = replace(self, prompts=self.prompts[rows], known=self.known[rows] if self.known is not None else None)
            batch = x[rows]
            for step in range(start, self.steps if end is None else end):
                self.on_step()
                batch = part._step(batch, step, generator)
            parts.append(batch)
        return torch.cat(parts)

    def _step(self, x: Tensor, step: int, generator: torch.Generator) -> Tensor:
        schedule, n = self.model.schedule, len(x)
        t = self._t(step, n, x)
        if self.guidance > 1:
            both = Conditioning.cat([self.prompts, self.empty.expand(n)])
            of_prompt, of_empty = self.model.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            output = of_empty + self.guidance * (of_prompt - of_empty)
        else:
            output = self.model.predict(x, t, self.prompts)
        x_0 = schedule.x_0(x, output, t)
        if self.known is not None and self.hole is not None:
            x_0 = torch.where(self.hole.to(x.device), x_0, self.known.to(x.device))
        if step == self.steps - 1:
            return x_0
        following = self._t(step + 1, n, x)
        (a, b), (a_next, b_next) = self._scales(t, x), self._scales(following, x)  # √ᾱ and √(1−ᾱ)
        noise = (x - a * x_0) / b
        room = (b_next / b) * (1 - (a / a_next).square()).clamp(min=0).sqrt()
        sigma = self.eta * room
        remaining = (b_next.square() - sigma.square()).clamp(min=0).sqrt()
        added = torch.randn(x.shape, generator=generator).to(x.device) if self.eta else 0.0
        return a_next * x_0 + remaining * noise + self.scale * sigma * added

    def _t(self, step: int, n: int, like: Tensor) -> Tensor:
        """The timestep of a step, (n,)."""
        fraction = (self.steps - step - 0.5) / self.steps
        return torch.full((n,), self.model.schedule.t_at(fraction), device=like.device)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What x_0 and noise are multiplied by at t."""
        one, zero = torch.ones_like(like[:, :1, :1, :1]), torch.zeros_like(like[:, :1, :1, :1])
        return self.model.schedule.add_noise(one, zero, t), self.model.schedule.add_noise(zero, one, t)

    @property
    def passes(self) -> int:
        """Through the network, of each image."""
        return self.steps * (2 if self.guidance > 1 else 1)


def trajectory_of(
    task: AttackTask, model: DiffusionModel, prompts: Conditioning, steps: int, **disturbance: Any
) -> Trajectory:
    """A sampling by one of the task's two models, with the plan's guidance."""
    sampling = task.plan.sampling
    empty = model.encode([sampling.negative_prompt])
    return Trajectory(model, prompts, empty, steps, sampling.guidance, on_step=lambda: task.report(0, 0), **disturbance)


def starting_noise(model: DiffusionModel, seeds: Sequence[int]) -> Tensor:
    """The noise (n, c, h, w) that sampling with these seeds begins with."""
    return noise_of(model, [torch.Generator().manual_seed(seed) for seed in seeds])
