"""A loaded class-conditional model, in pixel space or with a VAE: the same to an erasure as one with text.

A prompt is the name of a label, and the empty prompt is the null label of classifier-free guidance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions, Sampling
from salun.errors import ConfigError, DataError

VALUES = 127.5  # of a uint8 pixel, for ±1


class MixedLabels(nn.Embedding):
    """An embedding of labels that takes weights of all labels, and a vector in place of a label, instead of numbers.

    (So there is a gradient to what a network is conditioned on, also where it recomputes a block.)

    Attributes:
        number: Which of the network's embeddings it is.
    """

    number: int

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (n, K + 1 + tables · d): weights of each label, then for each table a vector that is added."""
        count, width = self.weight.shape
        start = count + self.number * width
        mixed: Tensor = labels[:, :count].to(self.weight.dtype) @ self.weight
        return mixed + labels[:, start : start + width].to(self.weight.dtype)


class ClassModel(Model):
    """A loaded class-conditional model. Implements `DiffusionModel` and `TokenEncoder`, whose tokens are labels."""

    def __post_init__(self) -> None:
        assert self.settings.vocabulary is not None
        self.schedule = schedule_of(self.scheduler_config, self.name)
        self.zero_snr = bool(self.scheduler_config.get("rescale_betas_zero_snr"))
        self.latent_channels = int(self.unet.config.in_channels)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1
        ((_, self.labels),) = self.settings.vocabulary.attributes.items()
        self.numbers = {label: i for i, label in enumerate(self.labels)}
        ending = self.family.network.table.removesuffix(".weight")  # type: ignore[attr-defined]
        self.tables = [module for name, module in self.unet.named_modules() if name.endswith(ending)]
        for number, table in enumerate(self.tables):
            table.__class__, table.number = MixedLabels, number
        for module in self.unet.modules():
            if hasattr(module, "dropout_prob"):  # DiT drops labels at random where it trains
                module.dropout_prob = 0.0

    # -- Denoiser -------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The labels' weights. Raises DataError for a prompt that is neither a label nor empty."""
        numbers = [self._number(prompt) for prompt in prompts]
        return self._conditioning(F.one_hot(torch.tensor(numbers, dtype=torch.long), len(self.labels) + 1).float())

    def _conditioning(self, weights: Tensor, vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Weights of the labels (n, K + 1), and for each table vectors (n, d) that are added; by default none."""
        added = vectors or [torch.zeros(len(weights), table.weight.shape[1]) for table in self.tables]
        joined = torch.cat([weights.to(self.device), *(each.to(self.device) for each in added)], dim=1)
        return Conditioning(joined[:, None].to(self.dtype))

    def _number(self, prompt: str) -> int:
        """A label's number, of the empty prompt that of the null label. Raises DataError for any other prompt."""
        assert self.settings.vocabulary is not None
        label = self.settings.vocabulary.value_of(prompt)
        if label and label not in self.numbers:
            known = ", ".join(self.labels[:20]) + (", …" if len(self.labels) > 20 else "")
            raise DataError(f"the prompt {prompt[:80]!r} is not a label of {self.name} ({known})")
        return self.numbers[label] if label else len(self.labels)

    def chunks(self, prompt: str) -> int:
        self._number(prompt)
        return 1

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output; of one that learned the variance too, only the part without it."""
        output: Tensor = self.unet(x_t.to(self.dtype), t, class_labels=conditioning.hidden[:, 0]).sample
        return output[:, : self.latent_channels].float()

    # -- TokenEncoder ---------------------------------------------------------------------------------------------

    @property
    def token_embeddings(self) -> list[Tensor]:
        """The embeddings of the labels in each table, the null label last, (K + 1, d) each."""
        return [table.weight.detach() for table in self.tables]

    @property
    def longest(self) -> int:
        """One label."""
        return 1

    @cached_property
    def searchable_tokens(self) -> list[int]:
        """All labels."""
        return list(range(len(self.labels)))

    def tokens(self, prompt: str) -> list[int]:
        """A label's number; none for the empty prompt."""
        return [self.numbers[prompt]] if prompt in self.numbers else []

    def text_of(self, tokens: Sequence[int]) -> str:
        """The labels' names."""
        return " ".join(self.labels[token] for token in tokens)

    def encoding(self) -> AbstractContextManager[None]:
        """Context manager; there is no text encoder to move."""
        return nullcontext()

    def encode_tokens(self, rows: Sequence[Sequence[int]], vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Encode labels, or vectors in place of one; see `TokenEncoder`. Raises ConfigError for several at once."""
        if any(len(row) > 1 for row in rows):
            raise ConfigError(
                "needs a prompt of several tokens, and a class-conditional model takes one label",
                option="attack",
                advice="Use {attack} inversion with one token",
            )
        null = len(self.labels)
        numbers = torch.tensor([row[0] if row else null for row in rows])
        weights = F.one_hot(numbers.clamp(min=0), null + 1).float() * (numbers >= 0)[:, None]
        if not vectors:
            return self._conditioning(weights)
        chosen, free = (-1 - numbers).clamp(min=0), (numbers < 0)[:, None]
        added = [each[chosen.to(each.device)] * free.to(each.device) for each in vectors]
        return self._conditioning(weights, added)

    # -- images ---------------------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """What divides every side of its images: of DiT, whose positions are of one size, that size."""
        if self._dit:
            return int(self.unet.config.sample_size * self.vae_scale)
        return super().multiple

    @contextmanager
    def sampling_as(self, sampling: Sampling, size: tuple[int, int]) -> Iterator[None]:
        """As of a model with text. Raises ConfigError for another size than DiT's own."""
        if self._dit and set(size) != {self.multiple}:
            raise ConfigError(f"is {size[0]}×{size[1]}, but {self.name} draws {self.multiple}×{self.multiple} alone",
                              option="resolution")  # fmt: skip
        with super().sampling_as(sampling, size):
            yield

    @property
    def _dit(self) -> bool:
        return hasattr(self.unet.config, "num_embeds_ada_norm")

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """As of a model with a VAE; in pixel space ±1, of one channel the mean of the three."""
        if self.vae is not None:
            return super().encode_images(images)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(self.device) / VALUES - 1
        return x.mean(1, keepdim=True) if self.latent_channels == 1 else x

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """As of a model with a VAE; one channel becomes three equal ones."""
        if self.vae is not None:
            return super().decode(latents)
        pixels = ((latents.clamp(-1, 1) + 1) * VALUES).round().to(torch.uint8).permute(0, 2, 3, 1)
        images: np.ndarray = pixels.expand(-1, -1, -1, 3).cpu().numpy()
        return images

    @cached_property
    def parts_hash(self) -> str:
        """A hash of all that samples depend on besides the network: VAE, noise schedule, labels."""
        known = json.dumps([self.scheduler_config, self.labels, self.vae_hash], sort_keys=True, default=str)
        return hashlib.sha256(known.encode()).hexdigest()

    @cached_property
    def vae_hash(self) -> str:
        """As of a model with a VAE; "" in pixel space."""
        return Model.vae_hash.func(self) if self.vae is not None else ""  # type: ignore[attr-defined]

    @contextmanager
    def on_device(self, *modules: Any) -> Iterator[None]:
        """As of a model with a VAE; there may be none."""
        with super().on_device(*(module for module in modules if module is not None)):
            yield

    @contextmanager
    def configured(self, options: EraseOptions) -> Iterator[None]:
        """As of a model with text, without its options. Raises ConfigError for one of these."""
        for name in ("clip_skip", "negative_prompt"):
            if getattr(options, name) is not None:
                raise ConfigError(f"does not apply to {self.name}, which takes a class label", option=name)
        with super().configured(options):
            for module in self.unet.modules():
                if isinstance(module, nn.Dropout):  # gradient checkpointing puts the network into training mode
                    module.eval()
            yield
