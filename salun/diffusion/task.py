"""What a method works on: one model, its plan, training set and mask; and how it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from salun.compute.processes import ALONE, Processes
from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import Conditioning, DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.plan import Plan
from salun.diffusion.until import Until, kept_step, kept_strength, without_earlier
from salun.errors import ModelError, TrainingError
from salun.masking.earlier import EarlierWeights
from salun.masking.mask import Mask
from salun.masking.optimizers import adam
from salun.masking.rate import first_order_rate
from salun.masking.training import Trained, TrainingSettings, linear_decay, train
from salun.masking.training_state import Alongside, LossRow, StateFile, read_saved_history
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator

if TYPE_CHECKING:
    from salun.diffusion.context import RunContext

FORGETTING = ("forget_latents", "anchor_latents", "forget", "anchor", "forget_rows")  # of a training set
RATE_BATCHES = 4  # behind a measured learning rate
FP16_LOSS_SCALE = 1024.0  # in which small gradients would be 0; a power of 2 changes no other bit


class AdversarialPool(Protocol):
    """Embeddings that bring a concept back, or try to."""

    def judge(self, step: int, concept: int) -> list[Tensor]:
        """One of a concept, by its number, learned for longer against the network after a step."""

    def attacking(self, concept: int, prompts: Sequence[str], vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Prompts (n,) of a concept with its embeddings, in turn, or a given one, in place of its words."""


@dataclass(frozen=True)
class Unlearned:
    """The result of a method.

    Args:
        mask: The weights that it changed, or could change.
        weights: Name → float32 values of the masked entries, flat, to be rounded once to the checkpoint's dtype.
        history: Named losses of each step; empty for a closed form.
    """

    mask: Mask
    weights: Mapping[str, Tensor]
    history: list[LossRow] = field(default_factory=list)


@dataclass
class ErasureTask:
    """One model that is to forget its plan's concepts.

    Args:
        model: In a `training_session`; a method changes its live weights.
        data: The training set; None for methods that need prompts alone.
        mask: What may be trained. For methods without one, all weights in scope.
        until: The goal of the training, and what was found on the way to it; None to take all steps.
        more: Samples a larger training set, from the original weights; None where there is none.
        more_retain: Samples further retain latents, likewise, and encodes their prompts.
        pool: Adversarial embeddings of a hardened training; None for another one.
        state: Where training is saved, and resumed from if this run (by `fingerprint`) stopped before.
    """

    model: DiffusionModel
    plan: Plan
    data: ErasureData | None
    mask: Mask
    progress: Progress = silent
    state: Path | None = None
    fingerprint: str = ""
    processes: Processes = ALONE
    until: Until | None = None
    more: Callable[[], ErasureData] | None = None
    more_retain: Callable[[], tuple[Tensor, Conditioning]] | None = None
    pool: AdversarialPool | None = None

    @classmethod
    def of(cls, context: RunContext, data: ErasureData | None, mask: Mask) -> ErasureTask:
        """The task of a run, whose state is shared by all of its processes."""
        state = context.processes.broadcast(context.record.state("training.safetensors"))
        fingerprint = context.processes.broadcast(context.record.fingerprint)
        return cls(context.model, context.plan, data, mask, context.progress, state, fingerprint, context.processes)

    @property
    def training_set(self) -> ErasureData:
        """The training set, for a method that needs one."""
        assert self.data is not None
        return self.data

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in scope."""
        return parameters_in_scope(self.model, self.plan.scope)

    @cached_property
    def empty(self) -> Conditioning:
        """The empty prompt, (1,)."""
        return self.model.encode([""])

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step (0-based), different ones in each process."""
        return step_generator(self.plan.options.seed, step * self.processes.count + self.processes.rank)

    def drawn(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a step's batch: b rows of the latents, x_0 (b, c, h, w), t (b,) and noise."""
        model, generator = self.model, self.generator(step)
        n = self.plan.recipe.batch_size // self.processes.count
        rows = torch.randint(len(latents), (n,), generator=generator).to(model.device)
        x_0 = latents[rows]
        t = model.schedule.sample_t(n, generator).to(model.device)
        return rows, x_0, t, torch.randn(x_0.shape, generator=generator).to(model.device)

    def encode(self, role: str) -> Conditioning:
        """All prompts of a role: "forget", "anchor" (one for each forget prompt) or "retain"."""
        prompts = self.plan.prompts
        if role == "retain":
            return self.model.encode([prompt.text for prompt in prompts.retain])
        return self.model.encode([prompt.text for each in prompts.concepts for prompt in getattr(each, role)])

    @cached_property
    def steps_done(self) -> int:
        """Steps that an unfinished run of this fingerprint has taken already."""
        saved = read_saved_history(self.state, self.fingerprint, self.plan.budget) if self.state else []
        done: int = self.processes.broadcast(len(saved))
        if done:
            note = f"resuming after step {done}"
            self.progress(Event(Stage.TRAINING, done, self.plan.budget, message=note, restored=done))
        return done

    def train(
        self,
        losses: Callable[[int], Mapping[str, Tensor]],
        weights: Mapping[str, float] | None = None,
        soft_density: float | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        alongside: Alongside | None = None,
    ) -> Trained:
        """Minimize losses over the mask with Adam, by the plan's numbers.

        Args:
            losses: Step (0-based) → the named losses of that step, each a scalar with a graph.
            weights: Factor of a loss in their sum; 1 for those not named.
            soft_density: SalUn-soft's target.
            parameters: What to train whole in place of the model's masked weights.
            alongside: What the losses change besides, to be saved and resumed with the weights.
        """
        options, recipe = self.plan.options, self.plan.recipe
        settings = TrainingSettings(
            self.plan.budget,
            linear_decay(recipe.lr, recipe.steps, recipe.lr_decay),
            adam(options.optimizer, recipe.lr, parameters or self.parameters, options.low_vram),
            weights or {},
            soft_density,
            protected="retain" if options.gradient_surgery else "",
            cpu_offload=options.low_vram,
        )
        state = (
            StateFile(self.state, self.fingerprint, options.save_every, alongside) if self.state is not None else None
        )
        earlier = self._earlier()
        if self.until is not None:
            self.until.write = earlier.write
            self.until.lr = self._measured_rate(losses) if self.until.lr is None else self.until.lr
        trained = train(
            parameters or self.parameters,
            Mask.full(parameters) if parameters else self.mask,
            losses,
            settings,
            self.progress,
            sources=None if parameters else self.model.original(),
            state=state,
            processes=self.processes,
            watch=self.until,
        )
        if self.until is None:
            return trained
        return self._kept(self._with_earlier(trained, earlier))

    def _with_earlier(self, trained: Trained, earlier: EarlierWeights) -> Trained:
        """With the weights of the step that the goal came back to; the last ones, whole, where they were lost."""
        history, step = trained.history, kept_step(trained.history)
        if step == len(history):
            return trained
        read, lost = dict[str, Tensor](), ""
        try:
            read = earlier.read(trained.masters, step)
        except (ModelError, TrainingError) as error:
            lost = error.message
        if not self.processes.broadcast(not lost):
            message = f"the weights after step {step} came nearest to the goal, but the last ones are taken: {lost}"
            self.progress(Event(Stage.TRAINING, message=message))
            return replace(trained, history=[*history[:-1], without_earlier(history[-1])])
        return replace(trained, masters=read)

    def _earlier(self) -> EarlierWeights:
        """The weights of an earlier step, which a goal may come back to."""
        path = self.state.with_name("earlier.safetensors") if self.state is not None else None
        return EarlierWeights(path, self.fingerprint, self.processes.rank == 0)

    def _measured_rate(self, losses: Callable[[int], Mapping[str, Tensor]]) -> float:
        """The learning rate to begin with: of the first loss, by which the model forgets, at the original weights."""
        batches = (next(iter(losses(step).values())) for step in range(RATE_BATCHES))
        scale = FP16_LOSS_SCALE if self.model.dtype == torch.float16 else 1.0
        rate = first_order_rate(self.parameters, self.mask, batches, scale, self.processes)
        return float(self.processes.broadcast(rate))

    def _kept(self, trained: Trained) -> Trained:
        """With the change of the strength that the goal chose, from the original weights to the trained ones."""
        strength = kept_strength(trained.history)
        if strength == 1:
            return trained
        original = self.model.original()
        masters = {
            name: torch.lerp(original[name].cpu().float()[self.mask.dense(name)], master, strength)
            for name, master in trained.masters.items()
        }
        return replace(trained, masters=masters)

    def grow(self) -> None:
        """Take the forget and anchor samples of the larger training set; the retain samples stay."""
        if self.more is None:
            return
        with self.original_weights():
            more, self.more = self.more(), None
        self.data = replace(self.training_set, **{name: getattr(more, name) for name in FORGETTING})

    def grow_retain(self) -> None:
        """Add further retain samples."""
        if self.more_retain is None:
            return
        with self.original_weights():
            latents, prompts = self.more_retain()
        data, self.more_retain = self.training_set, None
        latents, retain = torch.cat([data.retain_latents, latents]), Conditioning.cat([data.retain, prompts])
        self.data = replace(data, retain_latents=latents, retain=retain)

    def original_weights(self) -> AbstractContextManager[None]:
        """Context manager: the live network computes with the original weights; afterwards as it was."""
        return self.at_strength(0.0)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Context manager: the live network has the weights θ₀ + s·(θ − θ₀); afterwards as it was."""
        original = self.model.original()
        current = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(original[name])
                if strength:
                    parameter.lerp_(current[name].to(parameter.device), strength)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(current[name])
