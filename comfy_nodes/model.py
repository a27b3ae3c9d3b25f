"""A MODEL, CLIP and VAE of a graph as the core's `DiffusionModel`.

ComfyUI's objects are only read: training uses a second network of ComfyUI's class with copies of the weights. Nothing
is left behind in the graph, and ComfyUI's inference tensors, casts and offloading do not interfere.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salun.checkpoints.hashing import base_hash
from salun.compute.device import pick_dtype
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.schedule import DISCRETE
from salun.diffusion.model.settings import ModelSettings, read_settings, settings_for
from salun.diffusion.model.sizes import SampledSizes
from salun.diffusion.options import EraseOptions
from salun.errors import Cancelled, ConfigError, ModelError

from .families import family_of, prediction_of
from .sampler import denoise, sampler_name
from .weights import Weights

BLOCKS = ("ResBlock", "BasicTransformerBlock")  # the units of gradient checkpointing


class GraphModel(SampledSizes):
    """A MODEL, CLIP and VAE. Implements `DiffusionModel`.

    Args:
        model, clip, vae: Those of the graph. clip and vae are needed only by the methods that use them.
        dtype: Of the computation, as in the options.

    Raises:
        ModelError: The MODEL is not an SD 1.x, SD 2.x or SDXL, or predicts neither epsilon nor v.
    """

    name = "the MODEL in the graph"

    def __init__(self, model: Any, clip: Any = None, vae: Any = None, dtype: str = "auto") -> None:
        self.model, self.clip, self.vae = model, clip, vae
        self.family = family_of(model)
        self.weights = Weights(model)
        self.device: torch.device = torch.device(model.load_device)
        self.dtype = pick_dtype(dtype, self.device)
        self.low_vram = False
        self.clip_skip: int | None = None
        self.model_sampling = model.get_model_object("model_sampling")
        alphas_cumprod = 1 / (self.model_sampling.sigmas.detach().cpu().float() ** 2 + 1)
        self.schedule = DISCRETE[prediction_of(self.model_sampling)](alphas_cumprod)
        self.latent_format = model.model.latent_format
        side = self.family.resolution(self.schedule.prediction_type)
        self.settings: ModelSettings = read_settings(None, self.family.name, {}, side)
        self.sampled: Tensor | None = None  # the first latent (1, c, h, w) of the batch sampled last
        self._depth = 0
        self._encoded: dict[tuple[Any, ...], Conditioning] = {}  # every stage of a run encodes the same prompts
        self._live: Any = None

    # -- Denoiser -----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self._network.named_parameters())
        return {name: named[key] for name, key in self._network_keys.items()}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        if self.clip is None:
            raise ConfigError("no CLIP is connected, so the prompts cannot be encoded")
        clip = self.clip
        if self.clip_skip is not None:
            clip = clip.clone()
            clip.clip_layer(-self.clip_skip)

        def key(prompt: str) -> tuple[Any, ...]:
            return prompt, self.clip_skip, self.image_size

        new = [prompt for prompt in dict.fromkeys(prompts) if key(prompt) not in self._encoded]
        with torch.inference_mode(), self.on_device() if new else nullcontext():
            encoded = {prompt: self._encode(clip, prompt) for prompt in new}
        for prompt, row in encoded.items():
            extra = {name: normal_tensor(value) for name, value in row.extra.items()}
            self._encoded[key(prompt)] = Conditioning(normal_tensor(row.hidden), extra)
        return Conditioning.cat([self._encoded[key(prompt)] for prompt in prompts])

    def _encode(self, clip: Any, prompt: str) -> Conditioning:
        escaped = prompt.replace("(", "\\(").replace(")", "\\)")  # ComfyUI reads parentheses as weights
        hidden, pooled = clip.encode_from_tokens(clip.tokenize(escaped), return_pooled=True)
        hidden = hidden.to(self.device, torch.float32)
        if not self.family.label_width:
            return Conditioning(hidden)
        height, width = self.image_size
        y = self.model.model.encode_adm(
            pooled_output=pooled.to(self.device), width=width, height=height, device=self.device
        )
        return Conditioning(hidden, {"y": y.to(self.device, torch.float32)})

    def chunks(self, prompt: str) -> int:
        return 1  # ComfyUI takes prompts of any length

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        from comfy.model_management import InterruptProcessingException

        extra = {name: value.to(self.dtype) for name, value in conditioning.extra.items()}
        try:
            output: Tensor = self._network(
                x_t.to(self.dtype),
                t.float(),
                context=conditioning.hidden.to(self.dtype),
                transformer_options={"optimized_attention_override": _attention},
                **extra,
            )
        except InterruptProcessingException as interrupt:  # newer versions check for it in every layer
            raise Cancelled("interrupted") from interrupt
        return output.float()

    # -- images and samples -------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = self.image_size
        return int(self._config["in_channels"]), height // 8, width // 8

    @property
    def multiple(self) -> int:
        """What divides every side of its images."""
        return int(8 * 2 ** (len(self._config["channel_mult"]) - 1))

    def encode_images(self, images: np.ndarray) -> Tensor:
        with torch.inference_mode(), self.on_device():
            samples = self._vae.encode(torch.from_numpy(images).float() / 255)
        return self.scaled(samples)

    def decode(self, latents: Tensor) -> np.ndarray:
        with torch.inference_mode(), self.on_device():
            images = self._vae.decode(self.latent_format.process_out(latents.clone()))
            pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return np.array(pixels)

    def scaled(self, samples: Tensor) -> Tensor:
        """ComfyUI's LATENT samples → latents as the network takes them."""
        with torch.inference_mode():
            scaled = self.latent_format.process_in(samples)
        return normal_tensor(scaled).to(self.device, torch.float32)

    @property
    def _vae(self) -> Any:
        if self.vae is None:
            raise ConfigError("no VAE is connected, so images cannot be encoded or decoded")
        return self.vae

    def denoise(
        self,
        noise: Tensor,
        prompts: Conditioning,
        empty: Conditioning,
        on_step: Callable[[], None],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        latents = denoise(self, noise, prompts, empty, on_step, generators)
        self.sampled = latents[:1]
        return latents

    def sampler_facts(self) -> dict[str, Any]:
        return {
            "sampler": sampler_name(self.settings.sampling.sampler),
            "network": repr(sorted((name, repr(value)) for name, value in self._config.items() if name != "dtype")),
            "schedule": hashlib.sha256(self.schedule.alphas_cumprod.numpy().tobytes()).hexdigest(),
            "prediction": self.schedule.prediction_type,
        }

    # -- weights ------------------------------------------------------------------------------------------------------

    @property
    def base_hash(self) -> str:
        return self.weights.hash

    def original(self) -> Mapping[str, Tensor]:
        return self.weights

    @cached_property
    def vae_hash(self) -> str:
        network = self._vae.first_stage_model
        if network not in _vae_hashes:
            _vae_hashes[network] = base_hash(network.state_dict())
        scale = type(self.latent_format).__name__, getattr(self.latent_format, "scale_factor", None)
        return f"{_vae_hashes[network]} {scale}"

    @property
    def parts_hash(self) -> str:
        """Of the VAE; of encoders a graph shows only what they give."""
        return self.vae_hash

    @contextmanager
    def temporarily_trainable(self) -> Iterator[None]:
        """Context manager: a network with the graph's weights is on the device, and ComfyUI's models are not."""
        from comfy import model_management

        free_gpu()
        before = getattr(model_management, "in_training", None)  # not in older versions
        try:
            if before is not None:
                model_management.in_training = True
            self._live = self._new_network()
            yield
        finally:
            if before is not None:
                model_management.in_training = before
            self._live = None
            model_management.soft_empty_cache()

    def _new_network(self) -> Any:
        import comfy.ops

        config = {**copy.deepcopy(self._config), "dtype": self.dtype}
        network = type(self.model.model.diffusion_model)(
            **config, device="meta", operations=comfy.ops.disable_weight_init
        )
        tensors = {key: self.weights[name].to(self.device, self.dtype) for name, key in self._network_keys.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{name} of this MODEL contains NaN or infinity")
        network.load_state_dict(tensors, strict=True, assign=True)
        return network.eval().requires_grad_(False)

    @cached_property
    def _network_keys(self) -> dict[str, str]:
        """diffusers' name → the network's own, of every weight."""
        return {name: self.weights.keys_of[name].removeprefix("diffusion_model.") for name in self.weights}

    @property
    def _network(self) -> Any:
        if self._live is None:
            raise RuntimeError("the network exists only within `temporarily_trainable`")
        return self._live

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.model.model.model_config.unet_config
        return config

    @contextmanager
    def configured(self, options: EraseOptions) -> Iterator[None]:
        blocks = [m for m in self._network.modules() if type(m).__name__ in BLOCKS]
        if options.gradient_checkpointing or options.low_vram:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        try:
            with self.with_options(options):
                yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    @contextmanager
    def with_options(self, options: EraseOptions) -> Iterator[None]:
        """Context manager: encode prompts and images by the options; no network is needed."""
        before = self.settings, self.clip_skip, self.low_vram
        self.settings = self.settings_with(options)
        self.clip_skip, self.low_vram = options.clip_skip, options.low_vram
        try:
            yield
        finally:
            self.settings, self.clip_skip, self.low_vram = before

    def settings_with(self, options: EraseOptions) -> ModelSettings:
        """The model's settings, changed by the options."""
        return settings_for(self.settings, options, self.name, self.multiple)

    @contextmanager
    def on_device(self, *modules: Any) -> Iterator[None]:
        """Context manager: ComfyUI loads CLIP and VAE when they are called; the outermost takes them off the GPU."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                free_gpu()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        live = self.parameters()
        for name in tensors:
            live[name].copy_(tensors[name])


_vae_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _attention(plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """torch's attention in place of ComfyUI's choice, which may have no backward pass."""
    from comfy.ldm.modules.attention import attention_pytorch

    result: Tensor = attention_pytorch(*args, **kwargs)
    return result


def free_gpu() -> None:
    """Ask ComfyUI to take its models off the GPU; it loads them again when they are needed."""
    from comfy import model_management

    if model_management.get_torch_device().type != "cpu":
        model_management.unload_all_models()
        model_management.soft_empty_cache()


def normal_tensor(tensor: Tensor) -> Tensor:
    """A copy that autograd accepts, which it does not of ComfyUI's inference tensors."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
