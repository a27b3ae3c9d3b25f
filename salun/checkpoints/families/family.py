"""The description of a family of models, for recognition, loading, conversion and export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from salun.checkpoints.keymap import TextLayout

Shapes = Mapping[str, tuple[int, ...]]
SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


class Network(Protocol):
    """The network that denoises: its names, its config, its layers. Names and shapes are diffusers'."""

    @property
    def part(self) -> str:
        """Its folder in a diffusers model: "unet"."""

    @property
    def class_name(self) -> str:
        """diffusers' class."""

    @property
    def prefix(self) -> str:
        """How its names begin in single files."""

    @property
    def scopes(self) -> Mapping[str, Callable[[str], bool]]:
        """Scope, named as in ESD → whether a parameter belongs to it."""

    @property
    def size_features(self) -> int:
        """Features of the image sizes that it takes with the pooled text."""

    def to_single(self, names: Iterable[str]) -> dict[str, str]:
        """diffusers name → name in single files, of all the network's tensors. Raises KeyError naming a foreign one."""

    def from_single(self, names: Iterable[str]) -> dict[str, str]:
        """Name in single files → diffusers name, of the network's tensors among `names`. Raises KeyError likewise."""

    def fault(self, shapes: Shapes) -> str:
        """Why a file with these tensors has no complete network for text to image; "" if it has."""

    def is_conditioned(self, shapes: Shapes) -> bool:
        """Whether prompts reach the network."""

    def config(self, shapes: Shapes, prediction_type: str) -> dict[str, Any]:
        """The config of diffusers' class. Raises ModelError for tensors that cannot belong to such a network."""

    def latent_side(self, prediction_type: str) -> int:
        """Height and width of the latents that the published models were trained at."""

    def lora_modules(self, names: Iterable[str]) -> dict[str, str]:
        """diffusers name → module name in LoRA files, of all the network's tensors. Raises KeyError as `to_single`."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder.

    Args:
        layouts: Where it may lie in a single file, the published files' place first.
        width: Features of a token, in the published models.
        layers: How many layers a file of this width may store.
        used_layers: Layers that the network is conditioned on, where files may store more.
        hidden_act: The activation, as transformers names it.
        pooled: Whether the network also takes its projected pooled text.
    """

    layouts: tuple[TextLayout, ...]
    width: int
    layers: tuple[int, ...]
    hidden_act: str
    pad_token: str
    used_layers: int | None = None
    pooled: bool = False

    @property
    def class_name(self) -> str:
        """transformers' class."""
        return "CLIPTextModelWithProjection" if self.pooled else "CLIPTextModel"


@dataclass(frozen=True, eq=False)
class Vae:
    """The configuration of a diffusers AutoencoderKL that does not follow from shapes."""

    scaling_factor: float
    sample_size: int
    norm_num_groups: int = 32


@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """A family of models.

    Args:
        name: In commands and files: "sd1".
        title: For people: "Stable Diffusion 1".
        pipeline: diffusers' pipeline class. also: Others whose folders are alike.
        architecture: In the metadata of single files (modelspec).
        matches: Whether a network with tensors of these shapes is of the family.
        matches_config: Whether a network with this config is, in a folder of the family's pipeline.
        relative: What a network that `matches` is, if it is of an unsupported relative of the family; else "".
        text: The text encoders, whose features are joined; none of a class-conditional family.
        vae: None where the network works on pixels.
        clip_skip: The encoders' layer that conditions the network, counted from the last (1).
        final_norm: Whether that layer passes through the encoder's final norm.
        lora_metadata: By which A1111 and Forge know the family of a LoRA file.
        v_guess: (name in single files, threshold): a tensor whose standard deviation is larger in v-prediction models.
        v_mark: Whether single files mark v-prediction by an empty tensor `v_pred`.
        scheduler: The noise schedule, as fields of a diffusers scheduler config.
        index: Further entries of `model_index.json`.
    """

    name: str
    title: str
    pipeline: str
    architecture: str
    matches: Callable[[Shapes], bool]
    network: Network
    text: tuple[TextEncoder, ...]
    vae: Vae | None
    lora_metadata: Mapping[str, str]
    matches_config: Callable[[Mapping[str, Any]], bool] = lambda config: True
    relative: Callable[[Shapes], str] = lambda shapes: ""
    clip_skip: int = 1
    final_norm: bool = True
    v_guess: tuple[str, float] | None = None
    v_mark: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=lambda: SCALED_LINEAR)
    index: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def context_width(self) -> int:
        """Features of a token that the network takes, in the published models."""
        return sum(encoder.width for encoder in self.text)

    @property
    def label_width(self) -> int:
        """Features of the pooled text and the sizes that the network takes with the text; 0 if it takes none."""
        return sum(encoder.width + self.network.size_features for encoder in self.text if encoder.pooled)

    def resolution(self, prediction_type: str) -> int:
        """Pixels a side that the published models were trained at."""
        return 8 * self.network.latent_side(prediction_type)

    def class_name(self, part: str) -> str:
        """The library's class of a part of a diffusers folder."""
        encoders = {numbered("text_encoder", i): encoder.class_name for i, encoder in enumerate(self.text)}
        return {self.network.part: self.network.class_name, "vae": "AutoencoderKL", **encoders}[part]

    def model_index(self, scheduler: str) -> dict[str, Any]:
        """The content of a diffusers folder's `model_index.json`. scheduler: its class."""
        index: dict[str, Any] = {
            "_class_name": self.pipeline,
            self.network.part: ["diffusers", self.network.class_name],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", scheduler],
        }
        for i, encoder in enumerate(self.text):
            index[numbered("text_encoder", i)] = ["transformers", encoder.class_name]
            index[numbered("tokenizer", i)] = ["transformers", "CLIPTokenizer"]
        return {**index, **self.index}

    def scheduler_config(self, prediction_type: str, zero_snr: bool) -> dict[str, Any]:
        """The noise schedule, as a diffusers scheduler config. zero_snr: rescaled to end in pure noise."""
        return {
            "_class_name": "DDIMScheduler",
            **self.scheduler,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": zero_snr,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
        }


def numbered(part: str, index: int) -> str:
    """The folder of the text encoder or tokenizer of this index: "text_encoder", "text_encoder_2", …"""
    return f"{part}_{index + 1}" if index else part
