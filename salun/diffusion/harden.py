"""Hardening: adversarial embeddings that are kept and improved while a model unlearns, so that none brings it back.

Each member of the pool stands for the concept's words in its prompts, as in concept inversion. At each step one member
takes one step on the inversion loss against the network in training, and then its prompts are led to the anchor too
(the inner attack of AdvUnlearn, Zhang et al. 2024, arXiv:2405.15234, here on the UNet and kept over all steps). A pool
that is only kept is soon fooled where it stands, while embeddings that are learned anew still succeed; so in rounds
members are learned anew, and so is one before it is decided whether attacks fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from salun.diffusion.attacks.soft_tokens import phrases_of, replaced
from salun.diffusion.attacks.task import gradients
from salun.diffusion.losses import Draw
from salun.diffusion.model.protocol import Conditioning, TokenEncoder
from salun.diffusion.task import ErasureTask
from salun.errors import TrainingError
from salun.randomness import step_generator

RATE, BETAS, EPSILON = 0.02, (0.9, 0.999), 1e-8  # of Adam on the embeddings
SALT, AGAIN, JUDGING = 1 << 40, 1 << 41, 1 << 42  # so that random numbers are not those of the training
EVERY, ROUND = 8, 40  # steps of the training after which the next member is learned anew, and steps of that
LONGER = 100  # steps of that before it is decided whether attacks fail


class Pool:
    """Adversarial embeddings of each concept, and their moments.

    Args:
        task: Its network is attacked as it is at each step; all processes improve the same pool.
        size: Members of each concept.
    """

    def __init__(self, task: ErasureTask, size: int) -> None:
        assert isinstance(task.model, TokenEncoder)  # checked when the run began
        self.task, self.size, self.tokens = task, size, task.model
        self.rows: list[list[list[int]]] = []  # of each concept, its prompts' tokens; −1 stands for a member
        self.phrases: list[list[list[int]]] = []  # tokens of the words that a member stands for
        members: list[list[Tensor]] = [[] for _ in self.tokens.token_embeddings]
        for i, each in enumerate(task.plan.prompts.concepts):
            self.phrases.append(phrases_of(task.plan, i, self.tokens))
            self.rows.append([replaced(self.tokens.tokens(p.text), self.phrases[i], [-1]) for p in each.forget])
            for encoder, vectors in enumerate(self._starts(i)):
                members[encoder].append(vectors)
        self.vectors = [torch.cat(parts) for parts in members]  # (concepts · size, d) of each text encoder
        self.moments = [[torch.zeros_like(v) for v in self.vectors] for _ in BETAS]
        self.counts = torch.zeros(len(self.vectors[0]), dtype=torch.int64)

    def _starts(self, concept: int) -> list[Tensor]:
        """Where its members start, (size, d) for each encoder: the concept, the anchor, then any tokens."""
        subject = self.task.plan.subjects[concept]
        named = [self.tokens.tokens(text)[:1] for text in (subject.phrase, subject.anchor_phrase)]
        choices = torch.tensor(self.tokens.searchable_tokens)
        generator = step_generator(self.task.plan.options.seed, SALT + concept)
        drawn = choices[torch.randint(len(choices), (self.size,), generator=generator)].tolist()
        ids = [*(id for each in named for id in each), *drawn][: self.size]
        return [matrix[ids].float().cpu().clone() for matrix in self.tokens.token_embeddings]

    def loss(self, step: int, batch: Draw, wanted: Tensor) -> Tensor:
        """Improve a member, and the loss by which its prompts give the anchor's predictions.

        Args:
            batch: Of the training; the forget samples of one concept are taken.
            wanted: The forget targets on them, (b, c, h, w).
        """
        each = len(self.task.training_set.forget) // len(self.rows)  # forget samples of a concept
        concept = int(batch.picked[0]) // each
        member = concept * self.size + step % self.size
        with self.tokens.encoding():  # backward passes go through the encoders too
            if step % EVERY == 0:
                self._renew(concept, step // EVERY % self.size, AGAIN + step * ROUND, ROUND)
            self._improve(SALT + step, concept, member)
        chosen = (batch.picked // each == concept).nonzero().flatten()
        with torch.no_grad():
            conditioning = self._conditioning(concept, member, (batch.picked[chosen] % each).tolist())
        rows = chosen.to(wanted.device)
        model = self.task.model
        x_t = model.schedule.add_noise(batch.x_0[rows], batch.noise[rows], batch.t[rows])
        return F.mse_loss(model.predict(x_t, batch.t[rows], conditioning), wanted[rows])

    def judge(self, step: int, concept: int) -> list[Tensor]:
        """An embedding of a concept for each text encoder, (1, d), learned for longer against the network after a step.

        It is no member, so that the look that it is for can be repeated.
        """
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        number = min(1, self.size - 1)
        with self.tokens.encoding():
            self._renew(concept, number, JUDGING + step * LONGER, LONGER)
        member = concept * self.size + number
        learned = [matrix[member : member + 1].clone() for matrix in self.vectors]
        self.load_state(before)
        return learned

    def _renew(self, concept: int, number: int, salt: int, steps: int) -> None:
        """Learn a member anew, those of even number from the concept, the others from the anchor, if there is one."""
        member = concept * self.size + number
        for i, start in enumerate(self._starts(concept)):
            self.vectors[i][member] = start[min(number % 2, len(start) - 1)]
            for moment in self.moments:
                moment[i][member] = 0
        self.counts[member] = 0
        for k in range(steps):
            self._improve(salt + k, concept, member)

    def attacking(self, concept: int, prompts: Sequence[str], vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Prompts (n,) of a concept with its members in turn, or another embedding, in place of its words."""
        count, first = (1, 0) if vectors else (self.size, concept * self.size)
        rows = [
            replaced(self.tokens.tokens(prompt), self.phrases[concept], [-1 - first - i % count])
            for i, prompt in enumerate(prompts)
        ]
        return self.tokens.encode_tokens(rows, vectors or self.vectors)

    def _conditioning(
        self, concept: int, member: int, samples: Sequence[int], vectors: Sequence[Tensor] | None = None
    ) -> Conditioning:
        """Of forget samples of a concept, with a member in place of its words."""
        prompts = self.rows[concept]
        data = self.task.training_set
        order = data.forget_rows[concept * len(data.forget) // len(self.rows) :]
        used = vectors or [matrix[member : member + 1] for matrix in self.vectors]
        return self.tokens.encode_tokens([prompts[order[i]] for i in samples], used)

    def _improve(self, salt: int, concept: int, member: int) -> None:
        """One step of Adam on MSE(target, output(x_t, t, prompt with the member)), x_0 images of the concept."""
        task, model = self.task, self.task.model
        each = len(task.training_set.forget) // len(self.rows)
        generator = step_generator(task.plan.options.seed, salt)
        samples = torch.randint(each, (task.plan.recipe.batch_size,), generator=generator)
        x_0 = task.training_set.forget_latents[(concept * each + samples).to(model.device)]
        t = model.schedule.sample_t(len(samples), generator).to(model.device)
        noise = torch.randn(x_0.shape, generator=generator).to(model.device)
        vectors = [matrix[member : member + 1].clone().requires_grad_(True) for matrix in self.vectors]
        conditioning = self._conditioning(concept, member, samples.tolist(), vectors)
        output = model.predict(model.schedule.add_noise(x_0, noise, t), t, conditioning)
        loss = F.mse_loss(output, model.schedule.target(x_0, noise, t))
        self.counts[member] += 1
        count, (b1, b2) = int(self.counts[member]), BETAS
        for i, gradient in enumerate(gradients(loss, vectors, model.dtype)):
            g, first, second = gradient[0].cpu(), self.moments[0][i], self.moments[1][i]
            first[member] = b1 * first[member] + (1 - b1) * g
            second[member] = b2 * second[member] + (1 - b2) * g.square()
            size = (second[member] / (1 - b2**count)).sqrt() + EPSILON
            self.vectors[i][member] -= RATE * first[member] / (1 - b1**count) / size

    # -- resuming -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs."""
        named = {"vectors": self.vectors, "first": self.moments[0], "second": self.moments[1]}
        tensors = {f"{name} {i}": tensor for name, of in named.items() for i, tensor in enumerate(of)}
        return {**tensors, "counts": self.counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, which may be untrusted input. Raises TrainingError for one of another pool."""
        mine = self.state()
        for name in {*mine, *state}:
            known, given = mine.get(name), state.get(name)
            fits = known is not None and given is not None and known.shape == given.shape and known.dtype == given.dtype
            if not fits or (given is not None and not torch.isfinite(given).all()):
                raise TrainingError(f"the saved state's adversarial embeddings do not fit ({name[:40]})")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
