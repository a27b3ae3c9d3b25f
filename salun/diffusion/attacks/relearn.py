"""Relearning: how many training steps on images of the concept, or of other things, bring the concept back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask, Known
    from salun.diffusion.model.protocol import DiffusionModel
    from salun.diffusion.options import Sampling

HALF = 0.5  # of the rate at which the original shows the concept


@dataclass(frozen=True)
class RelearnOptions(Checked):
    """A fine-tuning of the attacked model."""

    steps: int = option(60, "training steps", minimum=1, maximum=1_000_000)
    images: int = option(16, "images that are trained on", minimum=1, maximum=100_000)
    lr: float | None = option(None, "learning rate", auto="the original model's, of a LoRA 1e-4", above=0, maximum=1)
    rank: int = option(0, "rank of a LoRA that is trained; 0 trains all weights", minimum=0, maximum=1024)
    data: str = option("concept", "what the images show: the concept, or what other prompts say",
                       choices=("concept", "unrelated"))  # fmt: skip


def cost(options: RelearnOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    from salun.diffusion.stages import TRAINED

    return options.steps * batch_size * TRAINED + len(looks_of(options.steps)) * n * sampling.passes


def relearn(task: AttackTask, options: RelearnOptions) -> AttackResult:
    """Minimize MSE(ε, ε_θ(x_t, t, prompt)) on some images with Adam, and look at the attacked prompts on the way.

    An attacker keeps the weights that bring most back, so the look with the highest rate counts: one of as many tries
    as there are looks. `facts` has the first step at which the concept shows half as often as in the original (None if
    there is none), and how the network was trained.
    """
    from salun.diffusion.attacks.task import AttackResult

    images = task.known.some(options.images) if options.data == "concept" else task.retained(options.images)
    looks, conditioning = looks_of(options.steps), task.encode(task.prompts)
    curve: list[tuple[float | str, float]] = []
    best: list[tuple[Tensor, np.ndarray]] = []
    lr = options.lr or (1e-4 if options.rank else task.lr)

    def look(step: int) -> bool:
        task.report(step, options.steps)
        if step in looks:
            latents, shown = task.attempt(conditioning, task.seeds)
            curve.append((step, float(shown.mean())))
            if not best or shown.sum() > best[0][1].sum():
                best[:] = [(latents, shown)]
        return False

    with task.victim() as model:
        _train(task, model, images, options, lr, look)
    half = HALF * float(task.calibration.positives.mean())
    reached = next((step for step, rate in curve if rate >= half), None)
    latents, shown = best[0]
    facts = {"steps_to_half": reached, "batch_size": task.batch_size, "lr": lr}
    return AttackResult(shown, latents, len(looks), task.passes, curve, "training steps", facts=facts)


def looks_of(steps: int) -> list[int]:
    """The steps after which images are looked at: 1, 2, 5, 10, 20, 50, … and the last one."""
    early = [digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5)]
    return sorted({step for step in early if step < steps} | {steps})


def _train(
    task: AttackTask,
    model: DiffusionModel,
    images: Known,
    options: RelearnOptions,
    lr: float,
    look: Callable[[int], bool],
) -> None:
    """Train the live network, or a low-rank change of it; look: called after each step."""
    import torch

    from salun.masking.low_rank import LowRank
    from salun.masking.mask import Mask
    from salun.masking.optimizers import adam
    from salun.masking.training import TrainingSettings, constant, train
    from salun.progress import Event, Stage

    conditioning, parameters = task.encode(images.prompts), model.parameters()

    def losses(step: int) -> dict[str, Tensor]:
        generator = task.generator(step)
        rows = torch.randint(len(images.latents), (task.batch_size,), generator=generator)
        t = model.schedule.sample_t(len(rows), generator)
        x_0 = images.latents[rows].to(model.device)
        return {"denoise": task.noise_loss(model, x_0, conditioning[rows.to(model.device)], generator, t)}

    def watched(event: Event) -> None:
        task.progress(Event(Stage.ATTACKING))

    offload = task.plan.options.low_vram
    if not options.rank:
        settings = TrainingSettings(options.steps, constant(lr), adam("adam", lr, parameters, offload),
                                    cpu_offload=offload)  # fmt: skip
        train(parameters, Mask.full(parameters), losses, settings, watched, stop=look)
        return
    original = {name: p.detach().clone() for name, p in parameters.items()}
    with LowRank(parameters, original, options.rank, 1.0, task.seed) as low:

        def led(step: int) -> dict[str, Tensor]:
            low.write()
            return {"denoise": low.lead(losses(step)["denoise"])}

        def written(step: int) -> bool:
            low.write()
            return look(step)

        settings = TrainingSettings(options.steps, constant(lr), adam("adam", lr, low.factors, offload))
        train(low.factors, Mask.full(low.factors), led, settings, watched, stop=written)
