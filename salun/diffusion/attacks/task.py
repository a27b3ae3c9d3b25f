"""What an attack works on: a model, its original, prompts of the concept; and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salun.diffusion.data.latents import lazy_images, sample_conditionings
from salun.diffusion.model.protocol import Conditioning, DiffusionModel, TokenEncoder
from salun.diffusion.plan import Plan
from salun.errors import ConfigError
from salun.evaluation.calibration import Calibration
from salun.evaluation.detector import Detector, Samples, Target
from salun.progress import Event, Progress, Stage, silent
from salun.randomness import step_generator

BACKWARD = 2  # what a backward pass costs, in passes forward
LOSS_SCALE = 1024.0  # in fp16, in which small gradients would be 0


@dataclass(frozen=True, eq=False)
class AdversarialPrompts:
    """Prompts that an attack made, to be replayed on other models.

    Args:
        rows: The tokens of each prompt; −1 − j is the vector of index j.
        seeds: Of each prompt's image.
        vectors: Of each text encoder, float32 (m, d).
        texts: As people read them; of a prompt without vectors it has the same tokens, unless `exact` is False.
        exact: Whether each text is split into the same tokens again.
    """

    rows: Sequence[Sequence[int]]
    seeds: Sequence[int]
    vectors: Sequence[Tensor] = ()
    texts: Sequence[str] = ()
    exact: bool = True


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What came of an attack on n prompts.

    Args:
        shown: bool (n,), whether an image of each prompt shows the concept.
        latents: float32 (n, c, h, w), of each prompt the first image that shows it, else the last one.
        tries: Images of each prompt at most, any of which counts; of a training, the looks of which the best counts.
        passes: Passes through the network that it took, a backward one counted twice.
        curve: (how far, fraction of prompts whose concept is back) in the order of the attack; x: what is counted.
        prompts: What the attack made.
        facts: Further numbers, by name.
        texts: What each image was conditioned on, for people, where these are neither the plain prompts nor `prompts`.
    """

    shown: np.ndarray
    latents: Tensor
    tries: int = 1
    passes: int = 0
    curve: Sequence[tuple[float | str, float]] = ()
    x: str = ""
    prompts: AdversarialPrompts | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[str] = ()

    def as_tensors(self, more: Mapping[str, Any]) -> dict[str, Tensor]:
        """All of it, and more facts, for the cache."""
        made = self.prompts
        known = {name: getattr(self, name) for name in ("tries", "passes", "curve", "x", "facts", "texts")}
        known["more"] = more
        if made is not None:
            known["prompts"] = {name: getattr(made, name) for name in ("rows", "seeds", "texts", "exact")}
        vectors = {f"vector {i}": vector for i, vector in enumerate(made.vectors)} if made is not None else {}
        text = torch.frombuffer(bytearray(json.dumps(known).encode()), dtype=torch.uint8)
        shown = torch.from_numpy(self.shown.astype(np.uint8))
        return {"json": text, "shown": shown, "latents": self.latents.contiguous(), **vectors}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> tuple[AttackResult, dict[str, Any]]:
        """(the result, the further facts) that `as_tensors` gave."""
        known = json.loads(bytes(tensors["json"].tolist()))
        more, made = known.pop("more"), known.pop("prompts", None)
        vectors = [tensors[f"vector {i}"] for i in range(sum(name.startswith("vector ") for name in tensors))]
        prompts = AdversarialPrompts(**made, vectors=vectors) if made is not None else None
        shown = tensors["shown"].numpy().astype(bool)
        return cls(shown, tensors["latents"], prompts=prompts, **known), more


@dataclass(frozen=True, eq=False)
class Known:
    """The original's images of the concept, which attacks learn from.

    Args:
        prompts: Training prompts (k,). latents: float32 (k, c, h, w), sampled from them.
    """

    prompts: Sequence[str]
    latents: Tensor

    def some(self, n: int) -> Known:
        """The first n."""
        return Known(self.prompts[:n], self.latents[:n])


@dataclass(eq=False)
class AttackTask:
    """One model to attack.

    Args:
        original: The model before the erasure.
        attacked: The model under attack, which may be `original` itself: then `change` is what it holds instead.
        change: Network tensors of the attacked model by name, where `attacked` is `original`; None for its own weights.
        plan: Whose concept of the number `concept` is to be brought back.
        detector, calibration: Decide whether it is.
        prompts, anchors, seeds: Of the n images: prompts of the concept, their anchors' and seeds.
        latents: The original's images of these prompts and seeds, (n, c, h, w).
        known: Images to learn from.
        retained: Prompts and images of other things, such as an unrelated fine-tuning uses.
        argument: Of the attack.
        load: Loads another model by its name.
        weights_hash: Of the attacked network.
        part: (steps before this attack, its own, those of all), for the progress.
        restored: Steps before this attack of those whose results came from the cache.
    """

    original: DiffusionModel
    attacked: DiffusionModel
    change: Mapping[str, Tensor] | None
    plan: Plan
    concept: int
    detector: Detector
    target: Target
    calibration: Calibration
    prompts: Sequence[str]
    anchors: Sequence[str]
    seeds: Sequence[int]
    latents: Tensor
    known: Known
    retained: Callable[[int], Known]
    load: Callable[[str], DiffusionModel]
    weights_hash: str = ""
    seed: int = 0
    argument: str = ""
    progress: Progress = silent
    passes: int = 0
    part: tuple[int, int, int] = (0, 1, 1)
    restored: int = 0
    _holds_attacked: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def batch_size(self) -> int:
        """Samples of an optimization step: the original's own number, however the attacked model was erased."""
        return self.original.settings.recipe.batch_size

    @property
    def lr(self) -> float:
        """The learning rate of a fine-tuning of all weights, likewise."""
        return self.original.settings.recipe.lr

    @property
    def tokens(self) -> TokenEncoder:
        """The text encoder's tokens. Raises ConfigError where the model does not show them."""
        if not isinstance(self.attacked, TokenEncoder):
            raise ConfigError(
                "needs the tokens of the text encoder, which this model does not show",
                option="attack",
                advice="Use the command line for it, or {attack} concept-vector",
            )
        return self.attacked

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step."""
        return step_generator(self.seed, step)

    def report(self, step: int, total: int) -> None:
        """Tell how far the attack is, unless total is 0; this is where it can be cancelled."""
        before, steps, of_all = self.part
        at = (before + steps * step // total, of_all) if total else (0, 0)
        self.progress(Event(Stage.ATTACKING, *at, restored=self.restored))

    # -- weights --------------------------------------------------------------------------------------------------

    @contextmanager
    def victim(self) -> Iterator[DiffusionModel]:
        """Context manager: the model under attack. Whatever is done to its weights inside ends with it."""
        if self._holds_attacked:
            yield self.attacked
            return
        with _holding(self.attacked, self.change or {}):
            self._holds_attacked = True
            try:
                yield self.attacked
            finally:
                self._holds_attacked = False

    @contextmanager
    def unerased(self) -> Iterator[DiffusionModel]:
        """Context manager: the original, also while its network holds the attacked weights."""
        if not self._holds_attacked or self.attacked is not self.original:
            yield self.original
            return
        with _holding(self.original, self.original.original()):
            self._holds_attacked = False
            try:
                yield self.original
            finally:
                self._holds_attacked = True

    @contextmanager
    def altered(self, tensors: Mapping[str, Tensor]) -> Iterator[DiffusionModel]:
        """Context manager: the model under attack with other weights."""
        with self.victim() as model, _holding(model, tensors):
            yield model

    def weights(self) -> dict[str, Tensor]:
        """The attacked network's matrices and convolutions, float32, by name."""
        with self.victim() as model:
            return {name: p.detach().float().clone() for name, p in model.parameters().items() if p.ndim >= 2}

    # -- images ---------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts by the attacked model's text encoder."""
        return self.attacked.encode(prompts)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Latents (n, c, h, w) of the model under attack, for conditionings (n,)."""
        with self.victim() as model:
            latents = sample_conditionings(model, conditioning, seeds, self._watched, Stage.ATTACKING)
        self.passes += len(seeds) * self.plan.sampling.passes
        return latents

    def _watched(self, event: Event) -> None:
        """Lets a host cancel while images are sampled; the attack counts its own steps."""
        self.progress(Event(Stage.ATTACKING))

    def shows(self, latents: Tensor) -> np.ndarray:
        """Whether the detector sees the concept in images (n,), bool."""
        with self.unerased() as model:
            samples = Samples(lazy_images(model, latents), latents.cpu(), [""] * len(latents))
            seen = self.detector.detect(samples)
        scores: np.ndarray = seen.scores[self.target.attribute][:, self.target.label]
        shown: np.ndarray = scores >= self.calibration.threshold
        return shown

    def attempt(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """(latents, whether each shows the concept) of the model under attack."""
        latents = self.sample(conditioning, seeds)
        return latents, self.shows(latents)

    def noise_loss(
        self, model: DiffusionModel, x_0: Tensor, conditioning: Conditioning, generator: torch.Generator, t: Tensor
    ) -> Tensor:
        """MSE(target, output(x_t, t, c)), the loss that the network was trained by. x_0: (n, c, h, w). t: (n,)."""
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        t = t.to(x_0.device)
        output = model.predict(model.schedule.add_noise(x_0, noise, t), t, conditioning)
        self.passes += len(x_0) * (1 + BACKWARD)
        return F.mse_loss(output, model.schedule.target(x_0, noise, t))


def gradients(loss: Tensor, of: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """∂loss/∂x of each x, by a scaled loss where the network computes in fp16."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    return [gradient / scale for gradient in torch.autograd.grad(loss * scale, list(of))]


class Best:
    """Of each prompt the first image that shows the concept, else the last one; fills an `AttackResult`.

    Args:
        n: Prompts.
    """

    def __init__(self, n: int) -> None:
        self.shown, self._latents = np.zeros(n, bool), dict[int, Tensor]()
        self.curve: list[tuple[float | str, float]] = []

    def add(self, latents: Tensor, shown: np.ndarray, rows: Sequence[int] | None = None) -> None:
        """Take images of some prompts (by default of all)."""
        for i, latent, hit in zip(range(len(self.shown)) if rows is None else rows, latents, shown, strict=True):
            if not self.shown[i]:
                self._latents[i], self.shown[i] = latent.cpu(), bool(hit)

    def mark(self, x: float | str, rows: Sequence[int] | None = None) -> None:
        """A point of the curve, to which some of the prompts (by default all) contribute."""
        hits = self.shown if rows is None else self.shown[list(rows)]
        points = dict(self.curve)
        points[x] = points.get(x, 0.0) + float(hits.sum()) / len(self.shown)
        self.curve = list(points.items())

    @property
    def latents(self) -> Tensor:
        """(n, c, h, w)."""
        return torch.stack([self._latents[i] for i in range(len(self.shown))])


@contextmanager
def _holding(model: DiffusionModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: the live network has these tensors, and afterwards all of its weights as they were."""
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    try:
        model.load(tensors)
        yield
    finally:
        model.load(before)
