"""A loaded Stable Diffusion model: the diffusers side of the `Denoiser` protocol."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salun.checkpoints.families.family import Family
from salun.checkpoints.hashing import base_hash
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.single_file import CheckpointContents
from salun.diffusion.model import sampler
from salun.diffusion.model.attention import attention_map, cross_attention_inputs
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.model.settings import ModelSettings, settings_for
from salun.diffusion.model.sizes import SampledSizes
from salun.diffusion.options import EraseOptions
from salun.errors import ConfigError, DataError
from salun.extras import install_command

CHUNKS = 4  # of a long prompt, at most


@dataclass(eq=False)
class Model(SampledSizes):
    """A loaded model. Implements `Denoiser`.

    name: as the user gave it. stored: where it lies on disk. The live UNet may be
    changed by an erasure; `original` is what the files hold.
    """

    name: str
    stored: Stored
    family: Family
    settings: ModelSettings
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    clip_skip: int | None = None  # the encoder's layer, counted from the last (1) as in WebUIs; None: the family's
    low_vram: bool = False
    attention: str = "sdpa"
    contents: CheckpointContents | None = None  # of a single file
    components: Path | None = None  # the diffusers folder that a single file's missing parts came from
    altered: bool = False  # whether the live UNet may hold other weights than its files

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.scheduler_config, self.name)
        self.zero_snr = bool(self.scheduler_config.get("rescale_betas_zero_snr"))
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
        with self.on_device(*self.text_encoders):
            for count, members in groups.items():
                for start in range(0, len(members), 64):
                    batch = members[start : start + 64]
                    encoded = self._encode([prompts[i] for i in batch], count)
                    for row, i in enumerate(batch):
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
                    f"the prompt {prompt[:40]!r}… has {tokens} tokens; the limit is {CHUNKS * size}",
                    advice="Shorten it",
                )
        return longest

    def _encode(self, prompts: list[str], chunks: int) -> Conditioning:
        """Prompts of as many chunks each: the chunks' encodings one after the other, pooled text of the first."""
        plain = {"add_special_tokens": False, "truncation": False, "verbose": False}
        ids = [[tokenizer(prompt, **plain).input_ids for prompt in prompts] for tokenizer in self.tokenizers]
        return self._encode_ids(ids, chunks)

    def _encode_ids(
        self, ids: Sequence[Sequence[Sequence[int]]], chunks: int, vectors: Sequence[Tensor] = ()
    ) -> Conditioning:
        """As `_encode`, of the tokens of each prompt in each tokenizer; see `encode_tokens` for `vectors`."""
        hidden, pooled, n = [], None, len(ids[0])
        for i, (known, tokenizer, encoder) in enumerate(
            zip(self.family.text, self.tokenizers, self.text_encoders, strict=True)
        ):
            size = tokenizer.model_max_length - 2
            rows = []
            for prompt in ids[i]:
                for start in range(0, chunks * size, size):
                    chunk = [tokenizer.bos_token_id, *prompt[start : start + size], tokenizer.eos_token_id]
                    rows.append(chunk + [tokenizer.pad_token_id] * (size + 2 - len(chunk)))
            tokens = torch.tensor(rows, device=self.device)
            with vectors_at(encoder, tokens, vectors[i]) if vectors else nullcontext():
                output = encoder(tokens.clamp(min=0), output_hidden_states=True)
            layer = self._layer(encoder, output)
            hidden.append(layer.reshape(n, chunks * (size + 2), -1))
            if known.pooled:
                pooled = output[0][::chunks]
        joined = torch.cat(hidden, dim=-1).to(self.dtype)
        if pooled is None:
            return Conditioning(joined)
        height, width = self.image_size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device)
        extra = {"text_embeds": pooled.to(self.dtype), "time_ids": sizes.expand(n, -1)}
        return Conditioning(joined, extra)

    # -- TokenEncoder ----------------------------------------------------------------------------------------------

    @property
    def token_embeddings(self) -> list[Tensor]:
        """The embedding of every token in each text encoder, (V, d) each."""
        return [encoder.get_input_embeddings().weight.detach() for encoder in self.text_encoders]

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have, of those that are given as tokens."""
        return int(min(tokenizer.model_max_length for tokenizer in self.tokenizers)) - 2

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, without the marks at both ends."""
        ids = self.tokenizers[0](prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return list(ids)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, as people read it."""
        return str(self.tokenizers[0].decode(list(tokens))).strip()

    @cached_property
    def searchable_tokens(self) -> list[int]:
        """The tokens that are the only one of their text: no part of a character, no mark of ends and padding."""
        tokenizer, count = self.tokenizers[0], len(self.token_embeddings[0])
        texts = tokenizer.batch_decode([[id] for id in range(count)])
        again = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids
        marks = {id for each in self.tokenizers for id in each.all_special_ids}
        return [id for id in range(count) if list(again[id]) == [id] and id not in marks]

    def encoding(self) -> AbstractContextManager[None]:
        """Context manager: the text encoders stay on the device."""
        return self.on_device(*self.text_encoders)

    def encode_tokens(self, rows: Sequence[Sequence[int]], vectors: Sequence[Tensor] = ()) -> Conditioning:
        """Encode prompts given as tokens, with a graph to `vectors`; see `TokenEncoder`."""
        cut = [list(row)[: self.longest] for row in rows]
        with self.on_device(*self.text_encoders):
            return self._encode_ids([cut] * len(self.tokenizers), 1, vectors)

    def _layer(self, encoder: Any, output: Any) -> Tensor:
        """The encoder layer that conditions the UNet."""
        skip = self.clip_skip or self.family.clip_skip
        if skip > len(output.hidden_states) - 1:
            raise ConfigError(
                f"is {skip}, but the text encoder of {self.name} has {len(output.hidden_states) - 1} layers",
                option="clip_skip",
            )
        if not self.family.final_norm:
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

    def denoise(
        self,
        noise: Tensor,
        prompts: Conditioning,
        empty: Conditioning,
        on_step: Callable[[], None],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        settings = self.settings.sampling
        return sampler.denoise(self, self.scheduler_config, settings, noise, prompts, empty, on_step, generators)

    def sampler_facts(self) -> dict[str, Any]:
        settings = self.settings.sampling
        return {**sampler.facts(self.scheduler_config, settings), "attention": self.attention}

    # -- TextAttention -------------------------------------------------------------------------------------------

    def positions(self, prompt: str) -> tuple[list[int], int]:
        """Where each of a prompt's tokens lies in its conditioning, of chunks with both ends, and its length."""
        size = self.tokenizers[0].model_max_length - 2
        count = len(self.tokens(prompt))
        return [i // size * (size + 2) + 1 + i % size for i in range(count)], self.chunks(prompt) * (size + 2)

    def attention_maps(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Attention probabilities of every cross-attention layer, float32 (n, heads, positions, tokens) each."""
        with cross_attention_inputs(self.unet) as inputs:
            self.predict(x_t, t, conditioning)
        return [attention_map(*each) for each in inputs]

    # -- images -------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the sampling resolution."""
        height, width = self.image_size
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale

    @property
    def multiple(self) -> int:
        """What divides every side of its images."""
        return int(self.vae_scale * _multiple(self.unet))

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 images (n, H, W, 3) → latents (n, c, h, w), scaled: the mean of the VAE's posterior."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.on_device(self.vae):
            z = self.vae.encode(x.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (z - shift) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, c, h, w), scaled → uint8 images (n, H, W, 3)."""
        z = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        with self.on_device(self.vae):
            x = self.vae.decode(z.to(self.device, self.vae.dtype)).sample.float()
        images = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        array: np.ndarray = images.cpu().numpy()
        return array

    # -- weights --------------------------------------------------------------------------------------------------

    @cached_property
    def base_hash(self) -> str:
        """The base hash of what the files hold."""
        return base_hash(self.original())

    def original(self) -> Mapping[str, Tensor]:
        """The UNet's tensors as its files hold them, read one at a time."""
        return self.stored

    @cached_property
    def parts_hash(self) -> str:
        """A hash of all that samples depend on besides the UNet: text encoders, VAE, noise schedule."""
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
    def temporarily_trainable(self) -> Iterator[None]:
        """Context manager: make the network trainable, and restore its files' weights on exit."""
        self.unet.eval().requires_grad_(False)
        if self.altered:  # by `Run.apply`, say
            self.load(self.original())
        try:
            self.altered = True
            yield
        finally:
            self.load(self.original())

    @contextmanager
    def configured(self, options: EraseOptions) -> Iterator[None]:
        """Context manager: encode, sample and train as the options say."""
        before = self.settings, self.clip_skip, self.low_vram, self.attention
        self.settings = settings_for(self.settings, options, self.name, self.multiple)
        self.clip_skip, self.low_vram, self.attention = options.clip_skip, options.low_vram, options.attention
        checkpoint = options.gradient_checkpointing or options.low_vram
        try:
            if options.attention == "xformers":
                _use_xformers(self.unet, self.device)
            if checkpoint:
                self.unet.enable_gradient_checkpointing()
                self.unet.train()  # older diffusers checkpoint only then; these UNets have no dropout
            yield
        finally:
            self.settings, self.clip_skip, self.low_vram, self.attention = before
            if checkpoint:
                self.unet.disable_gradient_checkpointing()
                self.unet.eval()
            if options.attention == "xformers":
                self.unet.disable_xformers_memory_efficient_attention()

    @contextmanager
    def on_device(self, *modules: Any) -> Iterator[None]:
        """Context manager: these parts are on the model's device.

        Otherwise they stay in CPU memory, so that a GPU holds the UNet alone while it trains. May be nested: the
        outermost moves them back.
        """
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
        self.altered = tensors is not self.stored


@contextmanager
def vectors_at(encoder: Any, tokens: Tensor, vectors: Tensor) -> Iterator[None]:
    """Context manager: the encoder takes `vectors[j]` (m, d) as the embedding of a token −1 − j in `tokens` (n, k)."""

    def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
        given = vectors.to(output.device, output.dtype)[(-1 - tokens).clamp(min=0)]
        return torch.where(tokens[..., None] < 0, given, output)

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _multiple(unet: Any) -> int:
    """The sides of images must be a multiple of this many pixels, so that the UNet's skip connections fit."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def _use_xformers(unet: Any, device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ConfigError(
            "is xformers, which is not installed",
            option="attention",
            advice=f"Install it: {install_command('xformers')}, or use sdpa",
        )
    if device.type != "cuda":
        raise ConfigError(f"is xformers, which needs a CUDA GPU, not {device}", option="attention", advice="Use sdpa")
    unet.enable_xformers_memory_efficient_attention()
