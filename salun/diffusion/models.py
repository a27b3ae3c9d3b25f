"""Finding and loading a Stable Diffusion model: alias, hub id or diffusers folder → `Model`.

`Model` is the diffusers side of the `Denoiser` protocol. Parts are loaded one by one from the folder, so that no
pipeline's safety checker or feature extractor is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from salun.config import parse_yaml
from salun.device import pick_device, pick_dtype
from salun.diffusion.denoiser import Conditioning
from salun.diffusion.vocabulary import Vocabulary
from salun.errors import ConfigError, DataError, ModelError
from salun.formats import tensorfile
from salun.formats.hashing import base_hash
from salun.options import DeviceOptions, EraseOptions, Recipe, Sampling, from_mapping

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CHUNKS = 4  # of a long prompt, at most
PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
SETTINGS = "salun.yaml"
SECTIONS = ("sampling", "recipe", "recipes_paper", "vocabulary")


@cache
def aliases() -> dict[str, Any]:
    """The alias table: `default`, `models` (alias → where it lies) and `families` (recipes and sampling defaults)."""
    table: dict[str, Any] = yaml.safe_load((ASSETS / "models.yaml").read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True)
class ModelSettings:
    """What is known of a model beyond its weights, from `salun.yaml` beside it or from its family.

    recipe: the numbers behind `auto`. paper_recipes: the authors', by kind of concept; empty where they ran nothing
    alike. detector: folder of the classifier that reads its pictures.
    """

    sampling: Sampling
    recipe: Recipe
    paper_recipes: dict[str, Recipe]
    vocabulary: Vocabulary | None
    detector: Path | None


@dataclass(eq=False)
class Model:
    """A loaded model. Fulfils `Denoiser`.

    name: as the user gave it. folder: the diffusers folder it came from. family: "sd" or "sdxl".
    unet_files: the UNet's weight files. The live UNet may be changed by an erasure; `original` is what the files hold.
    """

    name: str
    folder: Path
    family: str
    settings: ModelSettings
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler_config: dict[str, Any]
    unet_files: list[Path]
    device: torch.device
    dtype: torch.dtype
    clip_skip: int | None = None  # the encoder's layer, counted from the last (1) as WebUIs do; None: the family's own
    low_vram: bool = False
    attention: str = "sdpa"
    altered: bool = False  # whether the live UNet may hold other weights than its files

    def __post_init__(self) -> None:
        self.prediction_type = str(self.scheduler_config.get("prediction_type", "epsilon"))
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"{self.name} predicts {self.prediction_type!r}; salun handles epsilon and v_prediction")
        self.alphas_cumprod = alphas_cumprod(self.scheduler_config, self.name)
        self.latent_channels = int(self.unet.config.in_channels)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)

    # -- Denoiser -------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.unet.named_parameters())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; long ones in chunks of as many tokens as the encoder takes (75 and both ends for CLIP).

        Raises DataError for a prompt of more than `CHUNKS` chunks.
        """
        rows: list[Conditioning | None] = [None] * len(prompts)
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self.chunks(prompt), []).append(i)
        with self.awake(*self.text_encoders):
            for count, members in groups.items():
                for start in range(0, len(members), 64):
                    some = members[start : start + 64]
                    encoded = self._encode([prompts[i] for i in some], count)
                    for row, i in enumerate(some):
                        rows[i] = encoded[row : row + 1]
        return Conditioning.cat([row for row in rows if row is not None])

    def chunks(self, prompt: str) -> int:
        """Chunks that a prompt takes. Raises DataError for one of more than `CHUNKS`."""
        longest = 1
        for tokenizer in self.tokenizers:
            size = tokenizer.model_max_length - 2
            tokens = len(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)
            longest = max(longest, -(-tokens // size))
            if longest > CHUNKS:
                raise DataError(
                    f"the prompt {prompt[:40]!r}… has {tokens} tokens, at most {CHUNKS * size} are taken: shorten it"
                )
        return longest

    def _encode(self, prompts: list[str], chunks: int) -> Conditioning:
        """Prompts of as many chunks each: the chunks' encodings one after the other, pooled text of the first."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            size = tokenizer.model_max_length - 2
            rows = []
            for prompt in prompts:
                ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
                for start in range(0, chunks * size, size):
                    own = [tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id]
                    rows.append(own + [tokenizer.pad_token_id] * (size + 2 - len(own)))
            output = encoder(torch.tensor(rows, device=self.device), output_hidden_states=True)
            layer = self._layer(encoder, output)
            hidden.append(layer.reshape(len(prompts), chunks * (size + 2), -1))
            pooled = output[0][::chunks] if self.family == "sdxl" else None
        joined = torch.cat(hidden, dim=-1).to(self.dtype)
        if pooled is None:
            return Conditioning(joined)
        side = self.settings.sampling.resolution
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=self.dtype, device=self.device)
        extra = {"text_embeds": pooled.to(self.dtype), "time_ids": sizes.expand(len(prompts), -1)}
        return Conditioning(joined, extra)

    def _layer(self, encoder: Any, output: Any) -> Tensor:
        """The encoder layer that the UNet listens to. SDXL was trained with the last but one, without its norm."""
        skip = self.clip_skip or (2 if self.family == "sdxl" else 1)
        if skip > len(output.hidden_states) - 1:
            raise ConfigError(
                f"--clip-skip {skip}, but the text encoder of {self.name} has {len(output.hidden_states) - 1} layers"
            )
        if self.family == "sdxl":
            layer: Tensor = output.hidden_states[-skip]
        elif skip == 1:
            layer = output.last_hidden_state
        else:
            layer = getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-skip])
        return layer

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.unet(
            x_t.to(self.dtype), t, conditioning.hidden, added_cond_kwargs=dict(conditioning.extra) or None
        ).sample
        return output.float()

    # -- pictures -------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the sampling resolution."""
        side = self.settings.sampling.resolution // self.vae_scale
        return self.latent_channels, side, side

    @torch.no_grad()
    def encode_pictures(self, pictures: np.ndarray) -> Tensor:
        """uint8 pictures (n, H, W, 3) → latents (n, c, h, w), scaled: the mean of the VAE's posterior."""
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.awake(self.vae):
            z = self.vae.encode(x.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (z - shift) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, c, h, w), scaled → uint8 pictures (n, H, W, 3)."""
        z = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        with self.awake(self.vae):
            x = self.vae.decode(z.to(self.device, self.vae.dtype)).sample.float()
        pictures = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        array: np.ndarray = pictures.cpu().numpy()
        return array

    # -- weights --------------------------------------------------------------------------------------------------

    @cached_property
    def base_hash(self) -> str:
        """The base hash of what the files hold."""
        return base_hash(self.original())

    def original(self) -> Mapping[str, Tensor]:
        """The UNet's tensors as its files hold them, read one at a time."""
        return _Files(self.unet_files)

    @cached_property
    def parts_hash(self) -> str:
        """A hash of all beside the UNet that samples depend on: text encoders, VAE, noise schedule."""
        digest = hashlib.sha256(json.dumps(self.scheduler_config, sort_keys=True, default=str).encode())
        for part in (self.vae_hash, *(base_hash(encoder.state_dict()) for encoder in self.text_encoders)):
            digest.update(part.encode())
        return digest.hexdigest()

    @cached_property
    def vae_hash(self) -> str:
        """A hash of the VAE's weights and of how its latents are scaled."""
        config = self.vae.config
        scale = f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}"
        return hashlib.sha256((base_hash(self.vae.state_dict()) + scale).encode()).hexdigest()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Within, the live UNet may be trained; afterwards it holds the files' weights again."""
        self.unet.eval().requires_grad_(False)
        if self.altered:  # by `Run.apply`, say
            self.load(self.original())
        try:
            self.altered = True
            yield
        finally:
            self.load(self.original())

    @contextmanager
    def set_up(self, options: EraseOptions) -> Iterator[None]:
        """Within, the model is read, sampled and trained as the options say; afterwards as it was."""
        before = self.settings, self.clip_skip, self.low_vram, self.attention
        if options.resolution is not None:
            if options.resolution % (self.vae_scale * _multiple(self.unet)):
                raise ConfigError(
                    f"--resolution {options.resolution} does not suit {self.name}: take a multiple of "
                    f"{self.vae_scale * _multiple(self.unet)}"
                )
            self.settings = replace(
                self.settings, sampling=replace(self.settings.sampling, resolution=options.resolution)
            )
        self.clip_skip, self.low_vram, self.attention = options.clip_skip, options.low_vram, options.attention
        if options.attention == "xformers":
            _use_xformers(self.unet, self.device)
        checkpoint = options.gradient_checkpointing or options.low_vram
        if checkpoint:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()  # older diffusers checkpoint only then; these UNets have no dropout
        try:
            yield
        finally:
            self.settings, self.clip_skip, self.low_vram, self.attention = before
            if checkpoint:
                self.unet.disable_gradient_checkpointing()
                self.unet.eval()
            if options.attention == "xformers":
                self.unet.disable_xformers_memory_efficient_attention()

    @contextmanager
    def awake(self, *modules: Any) -> Iterator[None]:
        """Within, these parts are on the model's device. Elsewhere they wait in host memory, so that a GPU holds the
        UNet alone while it trains. May be nested: the outermost sends them back."""
        before = [module.device for module in modules]
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module, place in zip(modules, before, strict=True):
                module.to(place)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the live UNet, by name."""
        named = dict(self.unet.named_parameters())
        for name in tensors:
            named[name].copy_(tensors[name])
        self.altered = not isinstance(tensors, _Files)


class _Files(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, each read when asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._where = {name: file for file in files for name in tensorfile.read_header(file).names}

    def __getitem__(self, name: str) -> Tensor:
        return next(tensor for _, tensor in tensorfile.tensors(self._where[name], [name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def alphas_cumprod(config: Mapping[str, Any], name: str) -> Tensor:
    """ᾱ_t, float32 (T,), from a diffusers scheduler config. Raises ModelError for a schedule salun does not know."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    else:
        raise ModelError(f"{name} has the noise schedule {kind!r}; salun handles linear and scaled_linear")
    alphas = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
    return alphas


def find(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a model and its entry in the alias table (empty for others). Downloads from the hub if need be."""
    table = aliases()["models"]
    entry = dict(table.get(name, {}))
    if "path" in entry:
        return ASSETS / entry["path"], entry
    if not entry and (
        Path(name).exists() or name.endswith((".safetensors", ".ckpt")) or name.startswith((".", "/", "~"))
    ):
        folder = Path(name).expanduser()
        if not folder.exists():
            raise ModelError(f"there is no {folder}: give a diffusers folder, a hub id, or one of {', '.join(table)}")
        if folder.is_file():
            raise ModelError(f"{folder} is a single file; this version reads diffusers folders and hub ids")
        return folder, entry
    if not entry and name.count("/") != 1:
        import difflib

        near = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"no model {name!r}{hint}: use {', '.join(table)}, a hub id (owner/name), or a diffusers folder"
        )
    return _download(entry.get("repo", name), entry.get("variant")), entry


def _download(repo: str, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    suffix = f".{variant}.safetensors" if variant else ".safetensors"
    weights = [f"{part}/*{suffix}" for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    patterns = ["model_index.json", SETTINGS, "*/*.json", "*/merges.txt", *weights]
    arguments: dict[str, Any] = {"allow_patterns": patterns}
    try:
        return Path(snapshot_download(repo, local_files_only=True, **arguments))
    except (OSError, ValueError):  # not in the local cache, or not whole
        pass
    try:
        return Path(snapshot_download(repo, **arguments))
    except Exception as error:  # the hub's client raises many kinds; all of them mean that the model is not here
        raise ModelError(
            f"{repo} is not on this machine and could not be fetched ({type(error).__name__}): "
            "connect to the internet, log in with `hf auth login` if it is gated, or give a diffusers folder"
        ) from error


def read_settings(folder: Path, family: str, entry: Mapping[str, Any], resolution: int | None = None) -> ModelSettings:
    """Settings of a model: `salun.yaml` in its folder over the alias entry over the native one over the family."""
    path = folder / SETTINGS
    own: dict[str, Any] = {}
    if path.is_file():
        try:
            own = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        if not isinstance(own, dict) or not all(isinstance(own.get(key, {}), dict) for key in SECTIONS):
            raise ModelError(f"{path} cannot be read: expected names and values, as in the one of `shapes`")
    shared = aliases()["families"].get(entry.get("family", family), {})

    native = {"sampling": {"resolution": resolution}} if resolution else {}

    def merged(key: str) -> dict[str, Any]:
        return {**shared.get(key, {}), **native.get(key, {}), **entry.get(key, {}), **own.get(key, {})}

    # a model with a recipe of its own is not one the authors ran
    papers = own.get("recipes_paper", {} if "recipe" in own else shared.get("recipes_paper", {}))
    detector = own.get("detector")
    if detector is not None and (
        not isinstance(detector, str) or Path(detector).is_absolute() or ".." in Path(detector).parts
    ):
        raise ModelError(f"{path}: detector must be a folder inside the model's own")
    return ModelSettings(
        sampling=from_mapping(Sampling, merged("sampling"), str(path)),
        recipe=from_mapping(Recipe, merged("recipe"), str(path)),
        paper_recipes={
            kind: from_mapping(Recipe, {**merged("recipe"), **paper}, str(path)) for kind, paper in papers.items()
        },
        vocabulary=Vocabulary.from_mapping(own["vocabulary"], str(path)) if "vocabulary" in own else None,
        detector=folder / detector if detector else None,
    )


@dataclass(frozen=True)
class Description:
    """A model's folder, read without loading weights."""

    folder: Path
    family: str
    pipeline: str
    settings: ModelSettings
    unet_files: list[Path]
    scheduler_config: dict[str, Any]


def describe(name: str) -> Description:
    """Find a model and read what its folder says of it. Raises ModelError for what salun cannot handle."""
    folder, entry = find(name)
    index = _json(folder / "model_index.json", name)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(f"{name} is a {pipeline}; salun handles {' and '.join(PIPELINES)}")
    family = PIPELINES[pipeline]
    unet = _json(folder / "unet" / "config.json", name)
    if int(unet.get("in_channels", 4)) != int(unet.get("out_channels", 4)):
        raise ModelError(f"{name} has a UNet with {unet['in_channels']} input channels (inpainting?): not handled")
    guess = "sdxl" if family == "sdxl" else ("sd1" if unet.get("cross_attention_dim", 768) <= 768 else "sd2")
    settings = read_settings(folder, guess, entry, _resolution(unet, _json(folder / "vae" / "config.json", name)))
    scheduler = _json(folder / "scheduler" / "scheduler_config.json", name)
    return Description(folder, family, pipeline, settings, _weight_files(folder / "unet", name), scheduler)


def _resolution(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int | None:
    """Pixels a side that a model was trained at, where its configs say so (SD 2.1 is 768, its base 512)."""
    latent, levels = unet.get("sample_size"), vae.get("block_out_channels")
    return latent * 2 ** (len(levels) - 1) if isinstance(latent, int) and isinstance(levels, list) else None


def load(name: str, device: str = "auto", dtype: str = "auto") -> Model:
    """Load a model: an alias (`salun models`), a hub id, or a diffusers folder.

    device and dtype as in `DeviceOptions`. Raises ModelError saying what to do if it is missing or of another kind.
    """
    DeviceOptions(device=device, dtype=dtype)
    found = describe(name)
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    for file in sorted(found.folder.glob("*/*.safetensors")):
        tensorfile.read_header(file)  # a truncated file is told as such, before hours of work
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = found.folder
    variant = "fp16" if found.unet_files[0].name.endswith(".fp16.safetensors") else None
    try:
        keywords: dict[str, Any] = {"torch_dtype": precision, "use_safetensors": True, "variant": variant}
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **keywords)
        vae = AutoencoderKL.from_pretrained(folder / "vae", **{**keywords, "torch_dtype": torch.float32})
        text: dict[str, Any] = {"dtype": precision, "use_safetensors": True, "variant": variant}
        parts = ["", "_2"] if found.family == "sdxl" else [""]
        encoders = []
        for part in parts:
            kind = CLIPTextModelWithProjection if part else CLIPTextModel
            encoders.append(kind.from_pretrained(folder / f"text_encoder{part}", **text))
        tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{part}") for part in parts]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name} could not be loaded from {folder}: {first}") from error
    for module in (unet, vae, *encoders):
        module.eval().requires_grad_(False)
    unet.to(where)  # the others come when they are needed
    bad = next((n for n, p in unet.named_parameters() if not torch.isfinite(p).all()), None)
    if bad is not None:
        raise ModelError(f"{name}: the weight {bad} holds NaN or infinity, so nothing can be computed with it")
    if not any(".attn2." in n for n, _ in unet.named_parameters()):
        raise ModelError(f"{name} has no cross-attention: prompts do not reach its UNet, so nothing can be forgotten")
    return Model(
        name=name,
        folder=folder,
        family=found.family,
        settings=found.settings,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler_config=found.scheduler_config,
        unet_files=found.unet_files,
        device=where,
        dtype=precision,
    )


def _multiple(unet: Any) -> int:
    """Latents must be a multiple of this many pixels, or the UNet's skip connections do not meet."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def _use_xformers(unet: Any, device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ConfigError(
            "--attention xformers needs xformers: install it by `pip install salun[xformers]`, or use sdpa"
        )
    if device.type != "cuda":
        raise ConfigError(f"--attention xformers needs a CUDA GPU, and this is {device}: use sdpa")
    unet.enable_xformers_memory_efficient_attention()


def scoped(parameters: Mapping[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a scope, in ESD's words.

    full; xattn (attn2); selfattn (attn1); noxattn (all but attn2, the time embedding and the output layers, which ESD
    leaves out too).
    """
    tests: dict[str, Callable[[str], bool]] = {
        "full": lambda n: True,
        "xattn": lambda n: ".attn2." in n,
        "selfattn": lambda n: ".attn1." in n,
        "noxattn": lambda n: (
            ".attn2." not in n and not n.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
        ),
    }
    chosen = {name: p for name, p in parameters.items() if tests[scope](name)}
    if not chosen:
        raise ConfigError(f"--scope {scope} names no parameter of this model")
    return chosen


def _weight_files(unet: Path, name: str) -> list[Path]:
    for stem in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        single = unet / f"{stem}.safetensors"
        if single.is_file():
            return [single]
    index = next(iter(sorted(unet.glob("diffusion_pytorch_model*.safetensors.index*.json"))), None)
    if index is not None:
        files = sorted(set(_json(index, name).get("weight_map", {}).values()))
        if files and all(Path(f).name == f and (unet / f).is_file() for f in files):
            return [unet / f for f in files]
    raise ModelError(f"{name} has no safetensors weights in {unet}: pickled weights are not read; convert them first")


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{name} is no diffusers model: {path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object")
    return data
