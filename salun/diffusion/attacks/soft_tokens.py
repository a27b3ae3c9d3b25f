"""Prompts some of whose tokens are free vectors, and their optimization through the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from salun.diffusion.attacks.task import AttackTask, gradients
from salun.diffusion.model.protocol import Conditioning, DiffusionModel, TextAttention, TokenEncoder
from salun.diffusion.plan import Plan


def replaced(prompt: Sequence[int], phrases: Sequence[Sequence[int]], slots: Sequence[int]) -> list[int]:
    """A prompt's tokens with each occurrence of a phrase replaced by slots; without any they come first.

    Args:
        phrases: Tokens of what is to be replaced; the longest that fits counts.
    """
    row: list[int] = []
    done = 0
    for start, end in occurrences(prompt, phrases):
        row += [*prompt[done:start], *slots]
        done = end
    row += prompt[done:]
    return row if any(token < 0 for token in row) else [*slots, *row]


def occurrences(prompt: Sequence[int], phrases: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(start, end) of each occurrence of a phrase in a prompt, in order; of those at one start the longest counts.

    Args:
        prompt: Its tokens. phrases: Tokens of each.
    """
    ends: list[tuple[int, int]] = []
    i, ordered = 0, sorted((list(phrase) for phrase in phrases if phrase), key=len, reverse=True)
    while i < len(prompt):
        phrase = next((each for each in ordered if list(prompt[i : i + len(each)]) == each), None)
        if phrase is not None:
            ends.append((i, i + len(phrase)))
        i = ends[-1][1] if phrase is not None else i + 1
    return ends


def phrases_of(plan: Plan, concept: int, tokens: TokenEncoder | TextAttention) -> list[list[int]]:
    """Tokens of the texts that name a concept, by its number."""
    of = plan.concepts[concept]
    texts = dict.fromkeys((of.name, plan.subjects[concept].phrase, *of.synonyms))
    return [tokens.tokens(text) for text in texts if text]


def vectors_of(task: AttackTask, phrase: str, count: int) -> list[Tensor]:
    """`count` vectors for each text encoder: the embeddings of a phrase's tokens in turn, float32 (count, d)."""
    ids = task.tokens.tokens(phrase) or task.tokens.searchable_tokens[:1]
    chosen = [ids[i % len(ids)] for i in range(count)]
    return [matrix[chosen].float().clone() for matrix in task.tokens.token_embeddings]


def nearest(vectors: Sequence[Tensor], matrices: Sequence[Tensor], choices: Sequence[int]) -> Tensor:
    """The tokens whose embeddings are nearest by cosine (P4D's projection), int64 (m,). vectors: (m, d) each."""
    similarity = torch.zeros(len(vectors[0]), len(choices), device=vectors[0].device)
    for vector, matrix in zip(vectors, matrices, strict=True):
        of_choices = torch.nn.functional.normalize(matrix[list(choices)].float(), dim=1)
        similarity += torch.nn.functional.normalize(vector.float(), dim=1) @ of_choices.T
    return torch.tensor(list(choices), device=similarity.device)[similarity.argmax(1)]


def learn(
    task: AttackTask,
    model: DiffusionModel,
    vectors: list[Tensor],
    conditioning: Callable[[Tensor], Conditioning],
    steps: Sequence[int],
    lr: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Textual inversion: minimize the network's own loss on the known images over vectors, in place.

    Args:
        conditioning: Rows of the known images (b,) → their prompts' conditionings, with a graph to the vectors.
        steps: Numbers of the steps to take, which fix the draws.
        optimizer: Of an earlier call, which this one continues.

    Returns:
        The optimizer.
    """
    optimizer = optimizer or torch.optim.Adam(vectors, lr=lr)
    latents = task.known.latents
    for step in steps:
        generator = task.generator(step)
        rows = torch.randint(len(latents), (task.batch_size,), generator=generator)
        t = model.schedule.sample_t(len(rows), generator)
        x_0 = latents[rows].to(model.device)
        loss = task.noise_loss(model, x_0, conditioning(rows), generator, t)
        for vector, gradient in zip(vectors, gradients(loss, vectors, model.dtype), strict=True):
            vector.grad = gradient
        optimizer.step()
        task.report(step + 1, 0)
    return optimizer
