"""A model without its weights: the networks that its files describe, on fake tensors, which have shapes but no values.

Whatever runs on a sketch takes the operations of the real model, and neither memory nor arithmetic. An operation whose
result depends on values raises an error: on a GPU it would make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun.checkpoints.families.family import numbered
from salun.checkpoints.sizes import first_line
from salun.diffusion.model.class_conditional import ClassModel
from salun.diffusion.model.configs import check_part, library_class, read_object
from salun.diffusion.model.loading import ModelSpec, quiet_libraries
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ModelError

TOKENS = 77  # of a prompt


class TextSketch(Model):
    """A sketch of a model with text encoders, which are not built."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditionings of the right shapes (n, …)."""
        config, n = self.unet.config, len(prompts)
        hidden = torch.zeros(n, TOKENS, config.cross_attention_dim, dtype=self.dtype)
        if config.addition_embed_type != "text_time":
            return Conditioning(hidden)
        features = self.family.network.size_features
        pooled = torch.zeros(n, config.projection_class_embeddings_input_dim - features, dtype=self.dtype)
        sizes = torch.zeros(n, features // config.addition_time_embed_dim, dtype=self.dtype)
        extra = {"text_embeds": pooled, "time_ids": sizes}
        return Conditioning(hidden, extra)


@contextmanager
def sketched(spec: ModelSpec, dtype: torch.dtype) -> Iterator[Model]:
    """Context manager: a model as its files describe it, without reading a weight. All of its tensors are fake.

    Args:
        dtype: Of the network; the VAE is float32.

    Raises:
        ModelError: No model can be built from what the files say.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    quiet_libraries()
    network, vae = _empty_parts(spec)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module, of in ((network, dtype), (vae, torch.float32)):
            if module is not None:
                _make_fake(module, of)
        yield (TextSketch if spec.family.text else ClassModel)(
            name=spec.name,
            stored=spec.stored,
            family=spec.family,
            settings=spec.settings,
            unet=network,
            vae=vae,
            text_encoders=[],
            tokenizers=[],
            scheduler_config=spec.scheduler_config,
            device=torch.device("cpu"),
            dtype=dtype,
            contents=spec.contents,
        )


def text_encoder_parameters(spec: ModelSpec) -> int:
    """Parameters of all text encoders, in so far as the model's files tell without `components`."""
    total = 0
    for i, encoder in enumerate(spec.family.text):
        folder = spec.folder if spec.contents is not None else spec.stored.path
        if spec.contents is not None and spec.contents.text[i]:
            from salun.diffusion.model.single_file import empty_text_encoder

            total += _parameters(empty_text_encoder(spec.contents, None, i)[0])
        elif folder is not None:
            total += _parameters(_empty(library_class(encoder.class_name), folder / numbered("text_encoder", i), spec))
    return total


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _empty_parts(spec: ModelSpec) -> tuple[Any, Any]:
    """The network, and the VAE where there is one, without memory for parameters."""
    family, contents = spec.family, spec.contents
    kind = library_class(family.network.class_name)
    if contents is None:
        folder = spec.stored.path
        vae = _empty(library_class(family.class_name("vae")), folder / "vae", spec) if family.vae is not None else None
        return _empty(kind, folder / family.network.part, spec), vae
    from salun.diffusion.model.single_file import empty_unet, empty_vae

    network = empty_unet(contents, None, spec.scheduler_config["prediction_type"])
    if contents.has_vae:
        return network, empty_vae(contents, None)[0]
    return network, _empty(library_class("AutoencoderKL"), spec.folder / "vae", spec) if spec.folder else None


def _empty(kind: Any, folder: Path, spec: ModelSpec) -> Any:
    """A part of a diffusers folder by its config, without memory for parameters."""
    from accelerate import init_empty_weights

    config = check_part(kind, folder, spec.name)  # of a text encoder, else None
    known = read_object(folder / "config.json", spec.name) if config is None else config
    try:
        with init_empty_weights(include_buffers=False):
            return kind.from_config(known) if config is None else kind(known)
    except Exception as error:  # the libraries raise many kinds; each means that the config describes no such part
        raise ModelError(f"no model can be built from the config in {folder} ({first_line(error)})") from error


def _make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Give it fake parameters of a dtype, and fake buffers. To be called in a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(tuple(parameter.shape), dtype=dtype)
                part._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(tuple(buffer.shape), dtype=buffer.dtype)
    module.eval()
