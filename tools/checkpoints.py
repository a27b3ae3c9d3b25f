"""Single-file checkpoints of random weights, named and shaped as CompVis's and Stability's: for tests and timings.

    python tools/checkpoints.py --family sd1 --true-size out.safetensors

The weights mean nothing, but a forward pass stays finite, and each depends on `seed` and its own name alone, so that
equal arguments give equal bytes. Tensors are made one at a time: the true SD 1.5 (2.1 GB) takes a few hundred megabytes
of memory. Names come from the models that diffusers and transformers build, by `salun.checkpoints.keymap`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.families.registry import FAMILIES
from salun.checkpoints.families.sd2 import GUESS_KEY
from salun.checkpoints.lazy_tensors import Planned, PlannedTensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = ("small", "host", "true")


@dataclass(frozen=True)
class Architecture:
    """The parts' configs: diffusers' UNet2DConditionModel and AutoencoderKL, transformers' text encoders."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: list[dict[str, Any]]


def _blocks(*attended: bool) -> dict[str, tuple[str, ...]]:
    """Which levels of a UNet, counted from the image, have cross-attention."""
    return {
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)),
    }


def _vae(*widths: int, layers: int) -> dict[str, Any]:
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _text(width: int, layers: int, projection: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "projection_dim": projection,
    }


def _sdxl(pooled: int) -> dict[str, Any]:
    return {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": pooled + 6 * 256,
    }


_SMALL_VAE = _vae(32, 32, 32, 32, layers=1)
_TRUE_VAE = _vae(128, 256, 512, 512, layers=2)
ARCHITECTURES = {
    ("sd1", "small"): Architecture(
        {
            **_blocks(True, True),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 8,
        },
        _SMALL_VAE,
        [_text(64, layers=2, projection=64)],
    ),
    ("sd1", "host"): Architecture(  # the least that ComfyUI takes for an SD 1 model, with a VAE that salun reads
        {
            **_blocks(True),
            "block_out_channels": (320,),
            "layers_per_block": 1,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        _TRUE_VAE,
        [_text(768, layers=12, projection=768)],
    ),
    ("sd1", "true"): Architecture(
        {"cross_attention_dim": 768, "attention_head_dim": 8}, _TRUE_VAE, [_text(768, layers=12, projection=768)]
    ),
    ("sd2", "small"): Architecture(  # as deep as the true one, by whose weights and layers hosts know what they are
        {
            "block_out_channels": (64, 64, 64, 64),
            "cross_attention_dim": 64,
            "attention_head_dim": (1, 1, 1, 1),
            "use_linear_projection": True,
        },
        _SMALL_VAE,
        [_text(64, layers=24, projection=64)],
    ),
    ("sd2", "host"): Architecture(  # the same for SD 2; of the text encoder's 24 layers only the first is stored
        {
            **_blocks(True),
            "block_out_channels": (320,),
            "layers_per_block": 1,
            "cross_attention_dim": 1024,
            "attention_head_dim": 5,
            "use_linear_projection": True,
        },
        _TRUE_VAE,
        [_text(1024, layers=1, projection=1024)],
    ),
    ("sd2", "true"): Architecture(
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        _TRUE_VAE,
        [_text(1024, layers=24, projection=1024)],
    ),
    ("sdxl", "small"): Architecture(
        {
            **_blocks(False, True, True),
            **_sdxl(pooled=64),
            "block_out_channels": (64, 64, 128),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 1, 2),
            "cross_attention_dim": 128,
        },
        _SMALL_VAE,
        [_text(64, layers=3, projection=64), _text(64, layers=3, projection=64)],
    ),
    ("sdxl", "host"): Architecture(  # as many layers as the true one, by which ComfyUI knows it, but of one width
        {
            **_blocks(False, True, True),
            **_sdxl(pooled=1280),
            "block_out_channels": (320, 320, 320),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": 5,
            "cross_attention_dim": 2048,
        },
        _TRUE_VAE,
        [_text(768, layers=12, projection=768), _text(1280, layers=32, projection=1280)],
    ),
    ("sdxl", "true"): Architecture(
        {
            **_blocks(False, True, True),
            **_sdxl(pooled=1280),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
        },
        _TRUE_VAE,
        [_text(768, layers=12, projection=768), _text(1280, layers=32, projection=1280)],
    ),
}


def make(
    path: Path | str,
    family: str,
    *,
    size: str = "small",
    dtype: str = "fp16",
    prediction: str = "epsilon",
    vae: bool = True,
    text: bool = True,
    ema: bool = False,
    buffers: bool = True,
    marks: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
    unet: Mapping[str, Any] | None = None,
    seed: int = 0,
    hollow: bool = False,
) -> Path:
    """Write a checkpoint and return its path.

    family: "sd1" | "sd2" | "sdxl". size: "small" (10 to 30 MB), "true", or "host" (ComfyUI loads it, while A1111
    takes the true size alone). dtype: "fp32" | "fp16" | "bf16", or "mixed": the UNet's matrices in fp16 and its
    vectors in fp32, the VAE in fp32, the text encoders in bf16. prediction: "epsilon" | "v_prediction", marked as in
    files of the family: SD 2's by one bias that is spread wider, others' by a `v_pred` mark. ema: a second copy of
    the UNet, as LDM's LitEma keeps it. buffers: what published files hold apart from weights. marks: names of empty
    tensors ("ztsnr"). unet: changes to its config. hollow: names and shapes alone; all weights are zeros that take no
    space on disk.
    """
    architecture = ARCHITECTURES[family, size]
    tensors = dict(_unet(architecture, unet or {}, dtype, prediction, seed))
    if ema:
        copies = {
            _ema_name(name): planned._replace(make=_scaled(planned.make, 0.99)) for name, planned in tensors.items()
        }
        tensors |= {
            **copies,
            f"{keymap.EMA}decay": _constant(torch.tensor(0.9999)),
            f"{keymap.EMA}num_updates": _constant(torch.tensor(1000, dtype=torch.int32)),
        }
    if vae:
        tensors |= dict(_autoencoder(architecture, dtype, seed))
    if text:
        for index in range(len(architecture.text)):
            tensors |= dict(_text_encoder(family, architecture, index, dtype, seed))
    if buffers:
        tensors |= {name: _constant(tensor) for name, tensor in extra_buffers(family, text).items()}
    if prediction == "v_prediction" and family != "sd2":
        marks = ("v_pred", *marks)
    tensors |= {name: _constant(torch.empty(0)) for name in marks}
    tensors = dict(sorted(tensors.items()))  # as safetensors' own writer has it
    if hollow:
        _write_hollow(Path(path), tensors)
    else:
        PlannedTensors(tensors).write(Path(path), metadata)
    return Path(path)


def _write_hollow(path: Path, tensors: Mapping[str, Planned]) -> None:
    """A header, and a hole of the size of the tensors."""
    entries, position = {}, 0
    for name, planned in sorted(tensors.items(), key=lambda pair: -pair[1].dtype.itemsize):
        end = position + math.prod(planned.shape) * planned.dtype.itemsize
        kind = safetensors_io.NAMES[planned.dtype]
        entries[name] = {"dtype": kind, "shape": list(planned.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + position)


# -- parts ------------------------------------------------------------------------------------------------------------


def unet_config(family: str, size: str = "small") -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel takes to be the UNet of such a checkpoint."""
    return dict(ARCHITECTURES[family, size].unet)


def _unet(
    architecture: Architecture, changes: Mapping[str, Any], dtype: str, prediction: str, seed: int
) -> Iterator[tuple[str, Planned]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        shapes = _shapes(UNet2DConditionModel(**{**architecture.unet, **changes}))
    for name, ldm_name in keymap.unet_to_ldm(shapes).items():
        kind = DTYPES.get(dtype, torch.float16 if len(shapes[name]) > 1 else torch.float32)
        drawn = _drawn(f"unet {name}", shapes[name], seed)
        if ldm_name == GUESS_KEY and prediction == "v_prediction":
            drawn = _scaled(drawn, 10.0)
        yield ldm_name, _planned(kind, shapes[name], drawn)


def _autoencoder(architecture: Architecture, dtype: str, seed: int) -> Iterator[tuple[str, Planned]]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        shapes = _shapes(AutoencoderKL(**architecture.vae))
    for name, ldm_name in keymap.vae_to_ldm(shapes).items():
        shape = (*shapes[name], 1, 1) if keymap.is_vae_matrix(ldm_name) else shapes[name]
        yield (
            ldm_name,
            _planned(DTYPES.get(dtype, torch.float32), shape, _drawn(f"vae {name}", shapes[name], seed)),
        )


def _text_encoder(
    family: str, architecture: Architecture, index: int, dtype: str, seed: int
) -> Iterator[tuple[str, Planned]]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    layout, kind = FAMILIES[family].text[index].layouts[0], DTYPES.get(dtype, torch.bfloat16)
    model = CLIPTextModelWithProjection if layout.open_clip else CLIPTextModel
    with torch.device("meta"):
        shapes = _shapes(model(CLIPTextConfig(**architecture.text[index])))
    fused: dict[str, list[str]] = {}
    for name, (ldm_name, part) in sorted(keymap.text_to_ldm(shapes, layout).items(), key=lambda pair: pair[1]):
        drawn = _drawn(f"text {index} {name.removeprefix('text_model.')}", shapes[name], seed)
        if part in ("q", "k", "v"):
            fused.setdefault(ldm_name, []).append(name)
        else:
            yield ldm_name, _planned(kind, shapes[name], _transposed(drawn) if part else drawn)
    for ldm_name, thirds in fused.items():  # listed as k, q, v
        k, q, v = (_drawn(f"text {index} {name.removeprefix('text_model.')}", shapes[name], seed) for name in thirds)
        rows, *rest = shapes[thirds[0]]
        yield ldm_name, _planned(kind, (3 * rows, *rest), _joined(q, k, v))


def extra_buffers(family: str, text: bool = True) -> dict[str, Tensor]:
    """What the files of a family hold apart from weights: the noise schedule, positions, OpenCLIP's logit scale."""
    tensors = {}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    product = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
    variance = betas * (1 - before) / (1 - product)
    if family == "sdxl":
        tensors["denoiser.sigmas"] = ((1 - product) / product).sqrt()
    else:
        tensors |= {
            "betas": betas,
            "alphas_cumprod": product,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": product.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - product).log(),
            "sqrt_recip_alphas_cumprod": product.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - product),
            "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - product),
        }
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for layout in (encoder.layouts[0] for encoder in FAMILIES[family].text) if text else ():
        if layout.open_clip:
            tensors[f"{layout.prefix}logit_scale"] = torch.tensor(math.log(100))
        else:
            tensors[f"{layout.prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def _ema_name(name: str) -> str:
    """LitEma keeps copies as buffers, whose names may hold no dots."""
    return keymap.EMA + name.removeprefix("model.").replace(".", "")


# -- tensors ----------------------------------------------------------------------------------------------------------


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32, the same for the same name and seed: matrices and kernels of variance 1/fan-in, norms near 1, biases
    near 0. Nothing is quite 1 or 0, so that two tensors that change places are found out."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "little")))
    if len(shape) > 1 and "embeddings." not in name:
        return values / math.sqrt(math.prod(shape[1:]))
    values *= 0.02
    return values + 1 if len(shape) == 1 and name.endswith(".weight") else values


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Callable[[], Tensor]:
    return lambda: weight(name, shape, seed)


def _scaled(drawn: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    return lambda: drawn() * factor


def _transposed(drawn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: drawn().T


def _joined(*drawn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([draw() for draw in drawn])


def _planned(dtype: torch.dtype, shape: tuple[int, ...], drawn: Callable[[], Tensor]) -> Planned:
    """What is drawn, in this dtype and shape."""
    return Planned(dtype, shape, lambda: drawn().reshape(shape).to(dtype).contiguous())


def _constant(tensor: Tensor) -> Planned:
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


# -- command line -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the command line and write the file it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--size", choices=SIZES, default="small", help="host: the least ComfyUI takes (SD 1: 465 MB)")
    parser.add_argument("--true-size", dest="size", action="store_const", const="true", help="the same as --size true")
    parser.add_argument("--dtype", choices=(*DTYPES, "mixed"), default="fp16")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--no-vae", dest="vae", action="store_false")
    parser.add_argument("--no-text", dest="text", action="store_false")
    parser.add_argument("--ema", action="store_true", help="add a second copy of the UNet's weights")
    parser.add_argument("--no-buffers", dest="buffers", action="store_false")
    parser.add_argument("--mark", dest="marks", action="append", default=[], help="add an empty tensor, such as ztsnr")
    parser.add_argument("--metadata", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hollow", action="store_true", help="names and shapes alone, all weights 0, no space on disk")
    chosen = vars(parser.parse_args())
    chosen["metadata"] = dict(pair.partition("=")[::2] for pair in chosen["metadata"])
    chosen["marks"] = tuple(chosen["marks"])
    path = make(chosen.pop("output"), chosen.pop("family"), **chosen)
    print(f"{path}: {path.stat().st_size:,} bytes, {len(safetensors_io.read_header(path).names)} tensors")


if __name__ == "__main__":
    main()
