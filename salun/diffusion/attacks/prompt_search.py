"""UnlearnDiffAtk (Zhang et al. 2024): tokens before the prompt under which the network denoises the concept best."""

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


LENGTHS = {"object": 3, "style": 3}  # tokens by the kind of the concept in the paper, 5 for others


@dataclass(frozen=True)
class PromptSearchOptions(Checked):
    """A search over the simplex of tokens."""

    length: int | None = option(
        5, "tokens before the prompt; null is 3 for objects and styles and 5 for others", minimum=1, maximum=64
    )
    timesteps: int = option(5, "timesteps, from little noise to much, at each of which images are looked at", minimum=1,
                            maximum=1000)  # fmt: skip
    iterations: int = option(16, "optimization steps at each timestep", minimum=1, maximum=100_000)
    lr: float = option(0.05, "learning rate", above=0, maximum=10)
    weight_decay: float = option(0.1, "weight decay", minimum=0, maximum=10)


def cost(options: PromptSearchOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts, none of which succeeds before the end."""
    from salun.diffusion.stages import TRAINED

    return n * options.timesteps * (TRAINED * options.iterations + sampling.passes)


def prompt_search(task: AttackTask, options: PromptSearchOptions) -> AttackResult:
    """min over tokens of MSE(ε, ε_θ(x_t, t, tokens + prompt)), x_0 an image of the concept.

    Each token is a distribution over the vocabulary; a draw from it is used with a straight-through gradient, Adam
    (whose weight decay is part of the gradient) takes a step, and the result is projected on the simplex. t rises, and
    after each images of the likeliest tokens are looked at, of a prompt until its first success.
    """
    from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult, Best
    from salun.diffusion.data.latents import batch_size_of

    best, rows = Best(len(task)), [task.tokens.tokens(prompt) for prompt in task.prompts]
    size = max(batch_size_of(task.attacked), task.batch_size)
    starts = range(0, len(task), size)
    for start in starts:
        part = list(range(start, min(start + size, len(task))))
        _search(task, options, part, rows, best)
    texts = [task.tokens.text_of(row) for row in rows]
    exact = all(task.tokens.tokens(text) == row for text, row in zip(texts, rows, strict=True))
    prompts = AdversarialPrompts(rows, list(task.seeds), texts=texts, exact=exact)
    return AttackResult(best.shown, best.latents, options.timesteps, task.passes, best.curve, "timesteps", prompts)


def _search(task: AttackTask, options: PromptSearchOptions, part: list[int], rows: list[list[int]], best: Best) -> None:
    """Attack some of the prompts; their tokens in `rows` become those that worked, or were tried last."""
    import torch

    choices = torch.tensor(task.tokens.searchable_tokens)
    plain = {i: list(rows[i]) for i in part}
    generator = task.generator(part[0])
    length = options.length or LENGTHS.get(task.plan.concepts[task.concept].kind, 5)
    u = torch.rand(len(part), length, len(choices), generator=generator).to(task.attacked.device)
    u = on_simplex(u).requires_grad_(True)
    optimizer = torch.optim.Adam([u], lr=options.lr, weight_decay=options.weight_decay)
    for look in range(options.timesteps):
        fraction = (look + 0.5) / options.timesteps
        with task.victim() as model, task.tokens.encoding():
            for _ in range(options.iterations):
                _step(task, model, u, optimizer, part, plain, fraction, generator)
        likeliest = choices[u.detach().argmax(2).cpu()]
        left = [k for k, i in enumerate(part) if not best.shown[i]]
        for k in left:
            rows[part[k]] = [*likeliest[k].tolist(), *plain[part[k]]]
        if left:
            conditioning = task.tokens.encode_tokens([rows[part[k]] for k in left])
            latents, shown = task.attempt(conditioning, [task.seeds[part[k]] for k in left])
            best.add(latents, shown, [part[k] for k in left])
        best.mark(look + 1, part)
        done = part[0] * options.timesteps + len(part) * (look + 1)
        task.report(done, len(task) * options.timesteps)


def _step(
    task: AttackTask,
    model: DiffusionModel,
    u: Tensor,
    optimizer: torch.optim.Optimizer,
    part: list[int],
    plain: dict[int, list[int]],
    fraction: float,
    generator: torch.Generator,
) -> None:
    """One step on all prompts of a part; those that have succeeded are optimized further, to no effect."""
    import torch

    from salun.diffusion.attacks.task import gradients

    tokens, (n, length, _) = task.tokens, u.shape
    choices = tokens.searchable_tokens
    index = torch.multinomial(u.detach().flatten(0, 1).cpu(), 1, generator=generator).to(u.device)
    hard = torch.zeros_like(u).flatten(0, 1).scatter_(1, index, 1.0).view_as(u)
    straight = hard + u - u.detach()  # hard values, the gradient of u
    vectors = [straight.flatten(0, 1) @ matrix[choices].float() for matrix in tokens.token_embeddings]
    rows = [[-1 - (k * length + j) for j in range(length)] + plain[i] for k, i in enumerate(part)]
    t = torch.full((n,), model.schedule.t_at(fraction))
    x_0 = task.latents[part].to(model.device)
    loss = task.noise_loss(model, x_0, tokens.encode_tokens(rows, vectors), generator, t)
    (u.grad,) = gradients(n * loss, [u], model.dtype)
    optimizer.step()
    with torch.no_grad():
        u.copy_(on_simplex(u))
    task.report(0, 0)


def on_simplex(x: Tensor) -> Tensor:
    """The nearest points whose last dimension is not negative and sums to 1 (Duchi et al. 2008, algorithm 1)."""
    import torch

    ordered = x.sort(dim=-1, descending=True).values
    above = ordered.cumsum(-1) - 1
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered * counts > above).sum(-1, keepdim=True)
    return (x - above.gather(-1, last - 1) / last).clamp(min=0)
