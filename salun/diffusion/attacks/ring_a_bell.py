"""Ring-A-Bell (Tsai et al. 2024): tokens whose encoding is near that of a prompt with the concept vector added.

The search looks at the text encoder alone, so its prompts are the same for every model with that encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun.options import Checked, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling

ENCODED = 256  # prompts at once
SMALL = 64  # pixels of a side
ENCODINGS = 5, 100  # that take as long as a pass: up to that side (measured with shapes), above (operations of SD 1.x)


@dataclass(frozen=True)
class RingABellOptions(Checked):
    """A genetic search."""

    length: int = option(16, "tokens of a prompt", minimum=1, maximum=75)
    strength: float = option(3.0, "strength η of the concept vector", minimum=0, maximum=100)
    population: int = option(64, "prompts of a generation", minimum=2, maximum=100_000)
    generations: int = option(60, "generations", minimum=1, maximum=1_000_000)
    crossover: float = option(0.5, "probability that two prompts are crossed", minimum=0, maximum=1)
    mutation: float = option(0.25, "probability that a prompt is mutated in one token", minimum=0, maximum=1)
    searches: int = option(4, "prompts that are searched for; each stands for several of the attacked ones", minimum=1,
                           maximum=100_000)  # fmt: skip


def cost(options: RingABellOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts; encodings count as the passes that take as long."""
    encoded = min(options.searches, n) * options.population * (options.generations + 1)
    per_pass = ENCODINGS[0] if sampling.resolution <= SMALL else ENCODINGS[1]
    return n * sampling.passes + round(encoded / per_pass)


def ring_a_bell(task: AttackTask, options: RingABellOptions) -> AttackResult:
    """Search tokens that minimize ‖enc(tokens) − (enc(prompt) + η·v)‖², by a genetic algorithm.

    The prompt is the attacked one, as in the authors' code.
    """
    from salun.diffusion.attacks.concept_vector import moved, vector
    from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult

    tokens, count = task.tokens, min(options.searches, len(task))
    wanted = moved(task.encode(task.prompts[:count]), vector(task), options.strength)
    made, distances = [], []
    for i in range(count):
        row, distance = evolved(task, wanted.hidden[i], options, task.generator(i))
        made.append(row)
        distances.append(distance)
        task.report(i + 1, count)
    rows = [made[i % count] for i in range(len(task))]
    latents, shown = task.attempt(tokens.encode_tokens(rows), task.seeds)
    prompts = AdversarialPrompts(rows, list(task.seeds), texts=[tokens.text_of(row) for row in rows])
    facts = {"distances": distances}
    return AttackResult(shown, latents, 1, task.passes, prompts=prompts, facts=facts)


def evolved(
    task: AttackTask, wanted: Tensor, options: RingABellOptions, generator: torch.Generator
) -> tuple[list[int], float]:
    """(the best prompt's tokens, its squared distance). wanted: (tokens, width), what its encoding is to be near."""
    import torch

    choices = torch.tensor(task.tokens.searchable_tokens)
    n, length = options.population, options.length
    population = choices[torch.randint(len(choices), (n, length), generator=generator)]
    distances = _distances(task, population, wanted)
    for _ in range(options.generations):
        task.report(0, 0)
        parents = population[distances.argsort()[: max(2, n // 2)]]
        children = parents[torch.randint(len(parents), (n, 2), generator=generator)]  # (n, 2, length)
        cut = torch.randint(1, max(length, 2), (n, 1), generator=generator)
        crossed = torch.rand(n, 1, generator=generator) < options.crossover
        from_second = (torch.arange(length) >= cut) & crossed
        bred = torch.where(from_second, children[:, 1], children[:, 0])
        mutated = torch.rand(n, generator=generator) < options.mutation
        place = torch.randint(length, (n,), generator=generator)
        drawn = choices[torch.randint(len(choices), (n,), generator=generator)]
        rows = torch.arange(n)
        bred[rows, place] = torch.where(mutated, drawn, bred[rows, place])
        joined = torch.cat([population, bred])
        apart = torch.cat([distances, _distances(task, bred, wanted)])
        best = apart.argsort(stable=True)[:n]
        population, distances = joined[best], apart[best]
    return population[0].tolist(), float(distances[0])


def _distances(task: AttackTask, population: Tensor, wanted: Tensor) -> Tensor:
    """Squared distances (n,) of the encodings of prompts (n, length)."""
    import torch

    with torch.no_grad():
        parts = [
            (task.tokens.encode_tokens(part.tolist()).hidden.float() - wanted.float()).square().flatten(1).sum(1)
            for part in population.split(ENCODED)
        ]
    return torch.cat(parts).cpu()
