"""What an erasure needs of a diffusion model, whether it is diffusers' or a host's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from salun.checkpoints.families.family import Family
    from salun.diffusion.model.settings import ModelSettings
    from salun.diffusion.options import EraseOptions, Sampling


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    hidden: float (n, tokens, width). extra: further inputs, (n, …) each (SDXL's pooled text and sizes).
    Rows of different length are joined by repeating the shorter: softmax over the same keys k times is softmax over
    them once, so cross-attention's output does not change (ComfyUI joins them like this too).
    """

    hidden: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return Conditioning(self.hidden[index], {name: value[index] for name, value in self.extra.items()})

    def expand(self, n: int) -> Conditioning:
        """n copies of a single conditioning."""
        return self[torch.zeros(n, dtype=torch.long, device=self.hidden.device)]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One after the other, along the batch."""
        names = parts[0].extra
        tokens = math.lcm(*(part.hidden.shape[1] for part in parts))
        return Conditioning(
            torch.cat([part.hidden.repeat(1, tokens // part.hidden.shape[1], 1) for part in parts]),
            {n: torch.cat([part.extra[n] for part in parts]) for n in names},
        )


class Schedule(Protocol):
    """How a model's training mixes noise into samples, and what its network predicts of the mixture.

    Timesteps t are (n,), one for each sample, of whatever type the network takes; samples are float (n, c, h, w).
    """

    @property
    def prediction_type(self) -> str:
        """What the network predicts, as diffusers names it: "epsilon" | "v_prediction"."""

    def sample_t(self, n: int, generator: torch.Generator, part: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """n timesteps as training draws them, from a part of the schedule: see `t_at` for its two fractions."""

    def t_at(self, fraction: float) -> float:
        """The timestep at a fraction of the schedule: 0 is nearly without noise, 1 beyond the last one."""

    def noisier_half(self, n: int) -> Tensor:
        """n timesteps spread evenly over the noisier half of the schedule, rising."""

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output that the network is trained to give on x_t."""

    def x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The sample without noise that the network's output on x_t stands for."""


class Denoiser(Protocol):
    """A text-conditioned denoiser and its noise schedule."""

    device: torch.device

    @property
    def schedule(self) -> Schedule:
        """The schedule that the network was trained by."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the UNet's parameters under diffusers' names, in module order."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, one after the other."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, float32 like x_t (n, c, h, w); t: int64 (n,)."""


@runtime_checkable
class TokenEncoder(Protocol):
    """What a model has whose prompts can be given as tokens, and as vectors in place of tokens."""

    @property
    def token_embeddings(self) -> list[Tensor]:
        """The embedding of every token in each text encoder, (V, d) each."""

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have."""

    @property
    def searchable_tokens(self) -> list[int]:
        """Tokens that a search may choose from: each is the only one of its text."""

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, without the marks at both ends."""

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""

    def encoding(self) -> AbstractContextManager[None]:
        """Context manager: faster, for many calls of `encode_tokens`."""

    def encode_tokens(self, rows: Sequence[Sequence[int]], vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Encode prompts (n,) given as tokens, which are cut at the encoder's length.

        Args:
            rows: The tokens of each prompt; −1 − j is the vector of index j.
            vectors: Of each text encoder, float (m, d). The result has a graph to them.
        """


@runtime_checkable
class TextAttention(Protocol):
    """What a model has whose attention to the tokens of its prompts can be seen."""

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, without the marks at both ends."""

    def positions(self, prompt: str) -> tuple[list[int], int]:
        """Where each of a prompt's `tokens` lies in its conditioning, and the length of that."""

    def attention_maps(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Attention probabilities of every cross-attention layer in a pass, with a graph.

        Args:
            x_t, t, conditioning: As in `predict`.

        Returns:
            float32 (n, heads, positions of the latent, tokens) each.
        """


class DiffusionModel(Denoiser, Protocol):
    """Everything the pipeline needs from a model besides `predict`: sampling, VAE, weight access.

    name: for people. settings: defaults for sampling and training. dtype: of the computation. low_vram: whether to
    sample one image at a time. vae: for `awake`.
    """

    name: str
    family: Family
    settings: ModelSettings
    dtype: torch.dtype
    low_vram: bool
    vae: Any

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the sampling resolution."""

    @property
    def multiple(self) -> int:
        """What divides every side of its images."""

    def sampling_as(self, sampling: Sampling, size: tuple[int, int]) -> AbstractContextManager[None]:
        """Context manager: sample with these settings, images of this height and width, multiples of `multiple`."""

    @property
    def base_hash(self) -> str:
        """The base hash of `original`."""

    @property
    def parts_hash(self) -> str:
        """A hash of all other parts, as far as they are known."""

    @property
    def vae_hash(self) -> str:
        """A hash of the VAE and of how its latents are scaled."""

    def original(self) -> Mapping[str, Tensor]:
        """The UNet's tensors before any erasure, under diffusers' names."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the live UNet, by name."""

    def temporarily_trainable(self) -> AbstractContextManager[None]:
        """Context manager: make the network trainable, and restore its weights on exit."""

    def configured(self, options: EraseOptions) -> AbstractContextManager[None]:
        """Context manager: encode, sample and train as the options say."""

    def on_device(self, *modules: Any) -> AbstractContextManager[None]:
        """Context manager: these parts are on the model's device."""

    def chunks(self, prompt: str) -> int:
        """Chunks that a prompt takes. Raises DataError for a prompt that is too long."""

    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 images (n, H, W, 3) → latents (n, c, h, w), scaled."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, c, h, w), scaled → uint8 images (n, H, W, 3)."""

    def denoise(
        self,
        noise: Tensor,
        prompts: Conditioning,
        empty: Conditioning,
        on_step: Callable[[], None],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Noise (n, c, h, w) of variance 1 → latents, by the sampling settings. prompts: (n,). empty: (1,), what
        guidance leads away from. tick: called before each step. generators: (n,) on the CPU, of the noise that some
        samplers add at each step."""

    def sampler_facts(self) -> dict[str, Any]:
        """What latents from `denoise` depend on besides weights, prompts, noise and settings: JSON values."""
