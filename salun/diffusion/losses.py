"""The three losses of SalUn for diffusion models: saliency, forget, retain. All draws are fixed by seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.compute.device import to_device
from salun.compute.processes import ALONE, Processes
from salun.diffusion.model.protocol import Conditioning, Denoiser
from salun.randomness import step_generator

EMPTY_PROMPT_FRACTION = 0.1  # of retain samples, as classifier-free guidance was trained


@dataclass(frozen=True)
class ErasureData:
    """Latents and encoded prompts of one erasure, all on the model's device.

    Args:
        forget_latents, anchor_latents: float32 (n, c, h, w), scaled by the VAE's factor, sampled under forget prompt i
            and anchor prompt i.
        retain_latents: Likewise, (m, c, h, w).
        forget, anchor, retain: Their conditionings, (n,), (n,) and (m,).
        empty: The empty prompt, (1,).
        notes: What a user should know of the images that it was made from.
        forget_rows: Of each forget sample the number of its prompt among its concept's; empty where a host does not
            tell.
    """

    forget_latents: Tensor
    anchor_latents: Tensor
    retain_latents: Tensor
    forget: Conditioning
    anchor: Conditioning
    retain: Conditioning
    empty: Conditioning
    notes: tuple[str, ...] = ()
    forget_rows: tuple[int, ...] = ()

    def forgetting(self, rows: slice) -> ErasureData:
        """The same with these rows of the forget samples only, such as those of one concept of several."""
        return replace(
            self,
            forget_latents=self.forget_latents[rows],
            anchor_latents=self.anchor_latents[rows],
            forget=self.forget[rows],
            anchor=self.anchor[rows],
            forget_rows=self.forget_rows[rows],
        )


@dataclass(frozen=True)
class Draw:
    """The batch of one training step: 2·b samples, the first b to forget and the rest to retain.

    Args:
        x_0, noise: float32 (2b, c, h, w).
        t: int64 (2b,).
        prompts: Conditionings of the trained model, (2b,).
        targets: Conditionings of the frozen model, (2b,): the anchor for forget samples, else the same prompt.
        picked: Which of the forget samples, int64 (b,), on the CPU.
    """

    x_0: Tensor
    noise: Tensor
    t: Tensor
    prompts: Conditioning
    targets: Conditioning
    picked: Tensor

    def shard(self, rank: int, count: int) -> Draw:
        """The rows of one of several processes: every count-th forget and retain sample, from sample `rank` on."""
        if count == 1:
            return self
        half = len(self.x_0) // 2
        device = self.x_0.device
        rows = torch.cat([torch.arange(start, start + half, count, device=device) for start in (rank, half + rank)])
        picked = self.picked[torch.arange(rank, half, count)]
        return Draw(self.x_0[rows], self.noise[rows], self.t[rows], self.prompts[rows], self.targets[rows], picked)


def saliency_losses(
    denoiser: Denoiser,
    data: ErasureData,
    guidance: float,
    batch_size: int,
    passes: int,
    seed: int,
    processes: Processes = ALONE,
) -> Iterator[tuple[Tensor, int]]:
    """−MSE(target, (1+w)·ε(x_t, c_f) − w·ε(x_t, ∅)) over the forget set, `passes` times, t uniform (SalUn eq. 3).

    Yields (mean loss, samples). Guidance is inside the loss, so the empty prompt's pass carries gradients too; both
    passes share one batch. Several processes take turns with the batches.
    """
    for rows, generator in _saliency_batches(len(data.forget), batch_size, passes, seed, processes):
        x_0 = data.forget_latents[rows]
        k = len(x_0)
        t, noise = _noise(denoiser, x_0, generator)
        both = Conditioning.cat([data.forget[rows], data.empty.expand(k)])
        x_t = denoiser.schedule.add_noise(x_0, noise, t)
        conditional, empty = denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        guided = (1 + guidance) * conditional - guidance * empty
        yield -F.mse_loss(guided, denoiser.schedule.target(x_0, noise, t)), k


def retain_saliency_losses(
    denoiser: Denoiser,
    data: ErasureData,
    picked: Sequence[int],
    batch_size: int,
    passes: int,
    seed: int,
    processes: Processes = ALONE,
) -> Iterator[tuple[Tensor, int]]:
    """MSE(target, ε(x_t, c_r)) of retain samples: SalUn's retain loss (eq. 5) with the noise as its target.

    (The gradient of the loss towards the original's own prediction is 0 at the original weights.) With as many samples
    as there are forget samples, t and noise are those of `saliency_losses`. Yields (mean loss, samples).

    Args:
        picked: Which of the retain samples.
    """
    chosen = torch.tensor(picked)
    for rows, generator in _saliency_batches(len(picked), batch_size, passes, seed, processes):
        samples = to_device(chosen[rows], data.retain_latents.device)
        x_0 = data.retain_latents[samples]
        t, noise = _noise(denoiser, x_0, generator)
        predicted = denoiser.predict(denoiser.schedule.add_noise(x_0, noise, t), t, data.retain[samples])
        yield F.mse_loss(predicted, denoiser.schedule.target(x_0, noise, t)), len(x_0)


def _saliency_batches(
    n: int, batch_size: int, passes: int, seed: int, processes: Processes
) -> Iterator[tuple[slice, torch.Generator]]:
    """Rows of n samples, a batch at a time and all of them `passes` times, each with its random numbers."""
    batches = -(-n // batch_size)
    for index in range(passes * batches):
        if processes.owns(index):
            start = index % batches * batch_size
            yield slice(start, min(start + batch_size, n)), step_generator(seed, -1 - index)


def draw(
    denoiser: Denoiser,
    data: ErasureData,
    batch_size: int,
    anchor_share: float,
    seed: int,
    step: int,
    frequencies: Sequence[float] | None = None,
    retain_frequencies: Sequence[float] | None = None,
    forget_timesteps: tuple[float, float] = (0.0, 1.0),
) -> Draw:
    """The samples of a training step. `anchor_share` of the forget latents come from the anchor's own samples.

    (The paper takes all of them from forget samples. Once early denoising steps follow the anchor, later steps
    see states that such training never produces; the anchor's samples cover them.)

    Args:
        frequencies: How often the samples of each concept are drawn, relative to each other; None for equally often.
        retain_frequencies: Likewise the first retain samples; 1 for the others.
        forget_timesteps: Part of the schedule from which t of the forget samples is drawn, as two fractions of it; that
            of the retain samples comes from all of it.
    """
    generator = step_generator(seed, step)
    device = data.forget_latents.device
    if frequencies is None:
        pick = torch.randint(len(data.forget), (batch_size,), generator=generator)
    else:
        weights = torch.tensor(frequencies).repeat_interleave(len(data.forget) // len(frequencies))
        pick = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
    from_anchor = torch.rand(batch_size, generator=generator) < anchor_share
    if retain_frequencies is None:
        keep = torch.randint(len(data.retain), (batch_size,), generator=generator)
    else:
        often = torch.ones(len(data.retain))
        often[: len(retain_frequencies)] = torch.tensor(retain_frequencies)
        keep = torch.multinomial(often, batch_size, replacement=True, generator=generator)
    emptied = torch.rand(batch_size, generator=generator) < EMPTY_PROMPT_FRACTION
    picked = pick
    pick, from_anchor, keep, emptied = (to_device(v, device) for v in (pick, from_anchor, keep, emptied))
    forget_x = torch.where(from_anchor.view(-1, 1, 1, 1), data.anchor_latents[pick], data.forget_latents[pick])
    x_0 = torch.cat([forget_x, data.retain_latents[keep]])
    parts = [denoiser.schedule.sample_t(batch_size, generator, part) for part in (forget_timesteps, (0.0, 1.0))]
    t, noise = (to_device(v, device) for v in (torch.cat(parts), torch.randn(x_0.shape, generator=generator)))
    retain = Conditioning.cat([data.retain, data.empty])[torch.where(emptied, len(data.retain), keep)]
    prompts, targets = (Conditioning.cat([of[pick], retain]) for of in (data.forget, data.anchor))
    return Draw(x_0, noise, t, prompts, targets, picked)


def training_losses(
    denoiser: Denoiser, sample: Draw, frozen: Tensor | None, target: str, retain_target: str, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """(forget, retain) losses of one step.

    forget: MSE(ε_θ(x_t, c_f), target) with the anchor's prediction on the same x_t, t and noise, of the frozen model or
    of the one being trained (`online`), never with a graph. retain: MSE(ε_θ(x_t, c_r), the frozen model's prediction
    or the noise). frozen: the original model's predictions on this draw (2b, c, h, w), where a target needs them.
    apart: each loss has a graph of its own.
    """
    half = len(sample.x_0) // 2
    x_t = denoiser.schedule.add_noise(sample.x_0, sample.noise, sample.t)
    if target == "online":
        with torch.no_grad():
            wanted = denoiser.predict(x_t[:half], sample.t[:half], sample.targets[slice(0, half)])
    else:
        assert frozen is not None
        wanted = frozen[:half]
    if retain_target == "noise":
        held = denoiser.schedule.target(sample.x_0, sample.noise, sample.t)[half:]
    else:
        assert frozen is not None
        held = frozen[half:]
    parts = [slice(0, half), slice(half, 2 * half)] if apart else [slice(0, 2 * half)]
    predictions = [denoiser.predict(x_t[part], sample.t[part], sample.prompts[part]) for part in parts]
    forget, retain = predictions if apart else (predictions[0][:half], predictions[0][half:])
    return F.mse_loss(forget, wanted), F.mse_loss(retain, held)


@torch.no_grad()
def frozen_predictions(denoiser: Denoiser, sample: Draw, guidance: float = 0.0) -> Tensor:
    """The original model's predictions on a draw, under the target prompts; call before training changes it.

    guidance: η of the forget samples' target ε*(c_a) − η·(ε*(c_f) − ε*(c_a)), which leads past the anchor, away from
    the concept (as negative guidance does in ESD).
    """
    x_t = denoiser.schedule.add_noise(sample.x_0, sample.noise, sample.t)
    wanted = denoiser.predict(x_t, sample.t, sample.targets)
    if guidance:
        half = slice(0, len(x_t) // 2)
        of_concept = denoiser.predict(x_t[half], sample.t[half], sample.prompts[half])
        wanted[half] += guidance * (wanted[half] - of_concept)
    return wanted


def _noise(denoiser: Denoiser, x_0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t (n,) as training draws it, and ε like x_0."""
    t = denoiser.schedule.sample_t(len(x_0), generator)
    noise = torch.randn(x_0.shape, generator=generator)
    return to_device(t, x_0.device), to_device(noise, x_0.device)
