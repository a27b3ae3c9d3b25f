"""A MODEL, CLIP and VAE of a graph as the core's `DiffusionModel`.

ComfyUI's own objects are only read: the network that is trained is one of ComfyUI's class, built beside the graph's,
with copies of the weights. So nothing is left behind in the graph, whatever happens, and its inference tensors, casts
and offloading do not stand in the way.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salun.checkpoints.families.family import Family
from salun.checkpoints.families.registry import FAMILIES
from salun.checkpoints.hashing import base_hash
from salun.compute.device import fix_cublas, pick_dtype
from salun.diffusion.data.latents import noise_of
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.sampler import conditioning_of, guided, trailing
from salun.diffusion.model.schedule import DISCRETE
from salun.diffusion.model.settings import ModelSettings, read_settings, settings_for
from salun.diffusion.options import EraseOptions
from salun.errors import Cancelled, ConfigError, ModelError

from .weights import Weights

DEFAULT_SAMPLER = "dpm++2m"
SAMPLERS = {  # the core's names → ComfyUI's functions; DDIM's steps are Euler's in its terms, as its own "ddim" has it
    "dpm++2m": "sample_dpmpp_2m",
    "ddim": "sample_euler",
    "euler": "sample_euler",
    "euler_a": "sample_euler_ancestral",
    "lcm": "sample_lcm",
}
ADD_NOISE = ("euler_a", "lcm")
BLOCKS = ("ResBlock", "BasicTransformerBlock")  # computed again in the backward pass, where memory is dear


class GraphModel:
    """Fulfils `DiffusionModel`. clip, vae: only what asks for them needs them.

    Raises ModelError naming the type of a MODEL that is no SD 1.x, 2.x or SDXL.
    """

    name = "the MODEL in the graph"

    def __init__(self, model: Any, clip: Any = None, vae: Any = None, dtype: str = "auto") -> None:
        self.model, self.clip, self.vae = model, clip, vae
        self.family = family_of(model)
        self.weights = Weights(model)
        self.device: torch.device = torch.device(model.load_device)
        self.dtype = pick_dtype(dtype, self.device)
        self.low_vram, self.clip_skip = False, cast(int | None, None)
        self._sampling = model.get_model_object("model_sampling")
        self.schedule = DISCRETE[_prediction(self._sampling)](
            1 / (self._sampling.sigmas.detach().cpu().float() ** 2 + 1)
        )
        self.latent_format = model.model.latent_format
        side = self.family.resolution(self.schedule.prediction_type)
        self.settings: ModelSettings = read_settings(None, self.family.name, {}, side)
        self._depth = 0
        self._said: dict[tuple[Any, ...], Conditioning] = {}  # every stage of a run asks for the same prompts
        self.sampled: Tensor | None = None  # the first latent (1, c, h, w) of the batch sampled last
        self._live: Any = None
        self._places: dict[str, str] = {}

    # -- Denoiser -------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        own = dict(self._network.named_parameters())
        return {name: own[place] for name, place in self._places.items()}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        if self.clip is None:
            raise ConfigError("no CLIP is connected: the concept's prompts cannot be encoded")
        clip = self.clip
        if self.clip_skip is not None:
            clip = clip.clone()
            clip.clip_layer(-self.clip_skip)

        def key(prompt: str) -> tuple[Any, ...]:
            return prompt, self.clip_skip, self.settings.sampling.resolution

        new = [prompt for prompt in dict.fromkeys(prompts) if key(prompt) not in self._said]
        with torch.inference_mode(), self.awake() if new else nullcontext():
            said = {prompt: self._encoded(clip, prompt) for prompt in new}
        for prompt, row in said.items():
            extra = {name: own_tensor(value) for name, value in row.extra.items()}
            self._said[key(prompt)] = Conditioning(own_tensor(row.hidden), extra)
        return Conditioning.cat([self._said[key(prompt)] for prompt in prompts])

    def _encoded(self, clip: Any, prompt: str) -> Conditioning:
        plain = prompt.replace("(", "\\(").replace(")", "\\)")  # ComfyUI reads parentheses as weights
        hidden, pooled = clip.encode_from_tokens(clip.tokenize(plain), return_pooled=True)
        hidden = hidden.to(self.device, torch.float32)
        if not self.family.label_width:
            return Conditioning(hidden)
        side = self.settings.sampling.resolution
        y = self.model.model.encode_adm(
            pooled_output=pooled.to(self.device), width=side, height=side, device=self.device
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
        except InterruptProcessingException as interrupt:  # newer ones look for it in every layer
            raise Cancelled("interrupted") from interrupt
        return output.float()

    # -- pictures -------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.settings.sampling.resolution // 8
        return int(self._config["in_channels"]), side, side

    def encode_pictures(self, pictures: np.ndarray) -> Tensor:
        with torch.inference_mode(), self.awake():
            raw = self._vae.encode(torch.from_numpy(pictures).float() / 255)
            scaled = self.latent_format.process_in(raw)
        return own_tensor(scaled).to(self.device, torch.float32)

    def decode(self, latents: Tensor) -> np.ndarray:
        with torch.inference_mode(), self.awake():
            images = self._vae.decode(self.latent_format.process_out(latents.clone()))
            pictures = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return np.array(pictures)

    def scaled(self, samples: Tensor) -> Tensor:
        """ComfyUI's LATENT samples → latents as the network sees them."""
        with torch.inference_mode():
            scaled = self.latent_format.process_in(samples)
        return own_tensor(scaled).to(self.device, torch.float32)

    @property
    def _vae(self) -> Any:
        if self.vae is None:
            raise ConfigError("no VAE is connected: pictures cannot be read or shown")
        return self.vae

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        prompts: Conditioning,
        empty: Conditioning,
        tick: Callable[[], None],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """By ComfyUI's own samplers, in whose terms x is x_t/√ᾱ_t and σ is √(1/ᾱ_t − 1)."""
        from comfy.k_diffusion import sampling

        settings = self.settings.sampling
        conditioning = conditioning_of(settings, prompts, empty)
        alphas_cumprod = self.schedule.alphas_cumprod
        steps = trailing(settings.steps, len(alphas_cumprod))
        roots = alphas_cumprod[steps].sqrt()
        sigmas = (1 / alphas_cumprod[steps] - 1).sqrt()
        at = {float(sigma): (t, float(root)) for sigma, t, root in zip(sigmas, steps, roots, strict=True)}

        def x_0(x: Tensor, sigma: Tensor) -> Tensor:
            tick()
            step, root = at[float(sigma[0])]
            t = step.to(self.device).expand(len(x))
            return self.schedule.x_0(x * root, guided(self, x * root, t, conditioning, settings), t)

        start = noise / float(roots[0])
        ends = torch.cat([sigmas, torch.zeros(1)]).to(self.device)
        sample, more = getattr(sampling, SAMPLERS[settings.sampler or DEFAULT_SAMPLER]), {}
        if settings.sampler in ADD_NOISE:
            more["noise_sampler"] = lambda *_: noise_of(self, generators)
            x_0.inner_model = self._wrapped  # type: ignore[attr-defined]
        result: Tensor = sample(x_0, start, ends, disable=True, **more)
        self.sampled = result[:1]
        return result

    @property
    def _wrapped(self) -> SimpleNamespace:
        """Where ComfyUI's samplers that add noise look for the schedule: its versions differ in where."""
        inner = SimpleNamespace(model_sampling=self._sampling)
        return SimpleNamespace(inner_model=inner, model_patcher=self.model)

    def sampler_facts(self) -> dict[str, Any]:
        name = SAMPLERS[self.settings.sampling.sampler or DEFAULT_SAMPLER].removeprefix("sample_")
        return {
            "sampler": f"{name} of ComfyUI {_version()}",
            "network": self._other_facts,
            "schedule": hashlib.sha256(self.schedule.alphas_cumprod.numpy().tobytes()).hexdigest(),
            "prediction": self.schedule.prediction_type,
        }

    # -- weights --------------------------------------------------------------------------------------------------

    @property
    def base_hash(self) -> str:
        return self.weights.hash

    def original(self) -> Mapping[str, Tensor]:
        return self.weights

    @cached_property
    def vae_hash(self) -> str:
        network = self._vae.first_stage_model
        if network not in _vaes:
            _vaes[network] = base_hash(network.state_dict())
        scale = type(self.latent_format).__name__, getattr(self.latent_format, "scale_factor", None)
        return f"{_vaes[network]} {scale}"

    @property
    def _other_facts(self) -> str:
        """What of the network is not in its weights, such as the number of heads."""
        return repr(sorted((name, repr(value)) for name, value in self._config.items() if name != "dtype"))

    @contextmanager
    def temporarily_trainable(self) -> Iterator[None]:
        """Within, a network of the graph's weights is on the device; ComfyUI has made room for it."""
        from comfy import model_management

        release()
        trained = getattr(model_management, "in_training", None)
        try:
            if trained is not None:
                model_management.in_training = True
            self._live, self._places = self._built()
            yield
        finally:
            if trained is not None:
                model_management.in_training = trained
            self._live = None
            model_management.soft_empty_cache()

    def _built(self) -> tuple[Any, dict[str, str]]:
        places = {name: self.weights.keys_of[name].removeprefix("diffusion_model.") for name in self.weights}
        import comfy.ops

        kind = type(self.model.model.diffusion_model)
        config = {**copy.deepcopy(self._config), "dtype": self.dtype}
        network = kind(**config, device="meta", operations=comfy.ops.disable_weight_init)
        tensors = {places[name]: self.weights[name].to(self.device, self.dtype) for name in self.weights}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{name} holds NaN or infinity, so nothing can be computed with this MODEL")
        network.load_state_dict(tensors, strict=True, assign=True)
        network.eval().requires_grad_(False)
        return network, places

    @property
    def _network(self) -> Any:
        if self._live is None:
            raise RuntimeError("the network is there only within `borrowed`")
        return self._live

    @property
    def _config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.model.model.model_config.unet_config
        return found

    @contextmanager
    def set_up(self, options: EraseOptions) -> Iterator[None]:
        blocks = [m for m in self._network.modules() if type(m).__name__ in BLOCKS]
        if options.gradient_checkpointing or options.low_vram:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        try:
            with self.read_as(options):
                yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    @contextmanager
    def read_as(self, options: EraseOptions) -> Iterator[None]:
        """Within, prompts and pictures are read as the options say; no network is needed."""
        before = self.settings, self.clip_skip, self.low_vram
        self.settings = self.settings_with(options)
        self.clip_skip, self.low_vram = options.clip_skip, options.low_vram
        try:
            yield
        finally:
            self.settings, self.clip_skip, self.low_vram = before

    def settings_with(self, options: EraseOptions) -> ModelSettings:
        """The settings as the options want them."""
        levels = len(self._config["channel_mult"])
        return settings_for(self.settings, options, self.name, 8 * 2 ** (levels - 1))

    @contextmanager
    def awake(self, *modules: Any) -> Iterator[None]:
        """ComfyUI brings CLIP and VAE to the device when they are asked; after the outermost they make room again."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                release()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.parameters()
        for name in tensors:
            own[name].copy_(tensors[name])


_vaes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""The hash of each VAE that was asked for."""


def _version() -> str:
    try:
        from comfyui_version import __version__ as found
    except ImportError:
        return "unknown"
    return str(found)


def as_started(options: EraseOptions) -> EraseOptions:
    """The options, with low_vram where ComfyUI was started with --lowvram or --novram; cuBLAS as `deterministic` asks.

    (That has an effect only where nothing was sampled before on this CUDA device since ComfyUI's start.)
    """
    from comfy import model_management

    if options.deterministic:
        fix_cublas()
    state = getattr(getattr(model_management, "vram_state", None), "name", "")
    return replace(options, low_vram=True) if state in ("LOW_VRAM", "NO_VRAM") else options


def family_of(model: Any) -> Family:
    """The family of a MODEL. Raises ModelError naming the type of any other MODEL."""
    inner = model.model
    what = f"{type(inner).__name__} ({type(getattr(inner, 'model_config', None)).__name__})"
    config = getattr(getattr(inner, "model_config", None), "unet_config", {})
    family = next((f for f in FAMILIES.values() if f.context_width == config.get("context_dim")), None)
    if type(inner.diffusion_model).__name__ != "UNetModel" or family is None or config.get("in_channels") != 4:
        raise ModelError(f"this MODEL is {what}: salun erases from SD 1.x, SD 2.x and SDXL (no inpainting models)")
    if (config.get("adm_in_channels") or 0) != family.label_width:
        raise ModelError(f"this MODEL is {what}: salun erases from SD 1.x, SD 2.x and SDXL (no refiner, no unCLIP)")
    return family


def _prediction(schedule: Any) -> str:
    """epsilon or v_prediction. Raises ModelError naming the sampling type of a MODEL that predicts something else."""
    kinds = [kind.__name__ for kind in type(schedule).__mro__]
    told = next((kind for kind in kinds if kind in ("EDM", "X0", "LCM", "V_PREDICTION", "EPS")), "")
    found = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}.get(told)
    if found is None or "ModelSamplingDiscrete" not in kinds or "ModelSamplingDiscreteEDM" in kinds:
        raise ModelError(f"this MODEL samples as {', '.join(kinds[:3])}: salun handles epsilon and v-prediction")
    return found


def schedule_keys(model: Any) -> dict[str, Tensor]:
    """Keys of no content by which loaders know a checkpoint's v-prediction, and that its schedule ends in pure noise.

    Nothing in an SDXL's weights tells either. A MODEL that predicts the noise needs none.
    """
    schedule = model.get_model_object("model_sampling")
    if _prediction(schedule) != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if getattr(schedule, "zsnr", False) else ["v_pred"]
    return {name: torch.empty(0) for name in names}


def _attention(plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """torch's own attention in place of the host's choice, which may have no backward pass."""
    from comfy.ldm.modules.attention import attention_pytorch

    result: Tensor = attention_pytorch(*args, **kwargs)
    return result


def release() -> None:
    """Ask ComfyUI to take its models off the GPU; they come back by themselves when they are needed."""
    from comfy import model_management

    if model_management.get_torch_device().type != "cpu":
        model_management.unload_all_models()
        model_management.soft_empty_cache()


def own_tensor(tensor: Tensor) -> Tensor:
    """A copy that may take part in training; ComfyUI's own were made in its inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
