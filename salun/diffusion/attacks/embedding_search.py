"""P4D (Chin et al. 2024): tokens under which the attacked network predicts what the original does for the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask, Best
    from salun.diffusion.model.protocol import DiffusionModel
    from salun.diffusion.options import Sampling


@dataclass(frozen=True)
class EmbeddingSearchOptions(Checked):
    """A search over embeddings that are projected to tokens."""

    length: int = option(8, "tokens of a prompt, which has no others", minimum=1, maximum=75)
    steps: int = option(100, "optimization steps", minimum=1, maximum=100_000)
    every: int = option(50, "steps between looks at images", minimum=1, maximum=100_000)
    lr: float = option(0.1, "learning rate", above=0, maximum=10)
    weight_decay: float = option(0.1, "weight decay", minimum=0, maximum=10)


def cost(options: EmbeddingSearchOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts, none of which succeeds before the end."""
    from salun.diffusion.stages import TRAINED

    looks = -(-options.steps // options.every)
    return n * (options.steps * (1 + TRAINED) + looks * sampling.passes)


def embedding_search(task: AttackTask, options: EmbeddingSearchOptions) -> AttackResult:
    """min over embeddings e of MSE(ε_θ₀(x_t, t, prompt), ε_θ(x_t, t, proj(e))), proj the nearest tokens.

    The gradient at proj(e) moves e. After a prompt's first success its images are looked at no more.
    """
    from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult, Best
    from salun.diffusion.data.latents import batch_size_of

    best, rows = Best(len(task)), [[0]] * len(task)
    size = max(batch_size_of(task.attacked), task.batch_size)
    starts = range(0, len(task), size)
    looks = -(-options.steps // options.every)
    for start in starts:
        _search(task, options, list(range(start, min(start + size, len(task)))), rows, best)
    prompts = AdversarialPrompts(rows, list(task.seeds), texts=[task.tokens.text_of(row) for row in rows])
    return AttackResult(best.shown, best.latents, looks, task.passes, best.curve, "steps", prompts)


def _search(
    task: AttackTask, options: EmbeddingSearchOptions, part: list[int], rows: list[list[int]], best: Best
) -> None:
    """Attack some of the prompts; their tokens go into `rows`."""
    import torch

    tokens, n = task.tokens, len(part)
    matrices, choices = tokens.token_embeddings, tokens.searchable_tokens
    generator = task.generator(part[0])
    start = torch.tensor(choices)[torch.randint(len(choices), (n * options.length,), generator=generator)]
    vectors = [matrix[start].float().clone().requires_grad_(True) for matrix in matrices]
    optimizer = torch.optim.AdamW(vectors, lr=options.lr, weight_decay=options.weight_decay)
    for done in range(0, options.steps, options.every):
        steps = range(done, min(done + options.every, options.steps))
        targets = _targets(task, part, steps)
        with task.victim() as model, task.tokens.encoding():
            for step in steps:
                _step(task, model, vectors, optimizer, part, step, targets[step])
        projected = _projected(task, vectors, n)
        left = [k for k, i in enumerate(part) if not best.shown[i]]
        for k in left:
            rows[part[k]] = projected[k]
        if left:
            conditioning = tokens.encode_tokens([projected[k] for k in left])
            latents, shown = task.attempt(conditioning, [task.seeds[part[k]] for k in left])
            best.add(latents, shown, [part[k] for k in left])
        best.mark(steps[-1] + 1, part)
        task.report(part[0] * options.steps + n * (steps[-1] + 1), len(task) * options.steps)


def _noisy(task: AttackTask, model: DiffusionModel, part: list[int], step: int) -> tuple[Tensor, Tensor]:
    """(x_t, t) of a step, the same for both models."""
    import torch

    generator = task.generator(1_000_000 + step)
    t = model.schedule.sample_t(len(part), generator).to(model.device)
    x_0 = task.latents[part].to(model.device)
    noise = torch.randn(x_0.shape, generator=generator).to(model.device)
    return model.schedule.add_noise(x_0, noise, t), t


def _targets(task: AttackTask, part: list[int], steps: range) -> dict[int, Tensor]:
    """The original's predictions for the plain prompts at each step."""
    import torch

    with task.unerased() as model, torch.no_grad():
        conditioning, targets = model.encode([task.prompts[i] for i in part]), {}
        for step in steps:
            x_t, t = _noisy(task, model, part, step)
            targets[step] = model.predict(x_t, t, conditioning).cpu()
            task.passes += len(part)
            task.report(0, 0)
    return targets


def _step(
    task: AttackTask,
    model: DiffusionModel,
    vectors: list[Tensor],
    optimizer: torch.optim.Optimizer,
    part: list[int],
    step: int,
    target: Tensor,
) -> None:
    import torch
    from torch.nn import functional as F

    from salun.diffusion.attacks.task import BACKWARD, gradients

    ids = torch.tensor(_projected(task, vectors, len(part))).flatten()
    at = [matrix[ids].float().clone().requires_grad_(True) for matrix in task.tokens.token_embeddings]
    length = len(ids) // len(part)
    slots = [[-1 - (k * length + j) for j in range(length)] for k in range(len(part))]
    x_t, t = _noisy(task, model, part, step)
    output = model.predict(x_t, t, task.tokens.encode_tokens(slots, at))
    loss = len(part) * F.mse_loss(output, target.to(model.device))
    for vector, gradient in zip(vectors, gradients(loss, at, model.dtype), strict=True):
        vector.grad = gradient
    optimizer.step()
    task.passes += len(part) * (1 + BACKWARD)
    task.report(0, 0)


def _projected(task: AttackTask, vectors: list[Tensor], n: int) -> list[list[int]]:
    """The nearest tokens of each of n prompts."""
    from salun.diffusion.attacks.soft_tokens import nearest

    detached = [vector.detach() for vector in vectors]
    rows: list[list[int]] = (
        nearest(detached, task.tokens.token_embeddings, task.tokens.searchable_tokens).view(n, -1).tolist()
    )
    return rows
