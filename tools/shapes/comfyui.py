"""`shapes` as a single-file SD 1 checkpoint that ComfyUI's stock loader takes: python -m tools.shapes.comfyui OUT.

ComfyUI takes only UNets of 320 channels, 32 groups per norm and a context of 768 for SD 1. Here the weights of `shapes`
are spread over such networks, without training: every channel is repeated, and further channels complete each group, so
that a group's mean and variance are those of the original's group. Text encoder and VAE compute the same function. So
does the UNet, but for two norms, of which 12 of 192 channels get the statistics of other channels of their group: its
output differs by 0.1 % (at the most noise) to 2 % (at the least), root mean square. The time embedding is fitted to
ComfyUI's noise schedule, which ends at less noise (beta_end 0.012 in place of 0.02). Words outside the vocabulary of
`shapes` have the embedding 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import salun
from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.families.registry import FAMILIES
from salun.diffusion.model.clip_tokenizer import clip_tokenizer
from tools import checkpoints

LATENT_SCALE = 0.18215  # of ComfyUI's SD 1
WIDE_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "block_out_channels": (320, 640),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
Weights = dict[str, Tensor]


class Layout(NamedTuple):
    """How channels lie in a wider tensor: `wide = write @ narrow`, and `read @ wide` gives the channels again.

    write: (wide, narrow). read: (narrow, wide), of which each row has one entry or several of equal size.
    """

    write: Tensor
    read: Tensor


def spread(channels: int, width: int, copies: bool = True) -> Tensor:
    """(width, channels): repeats the channels once, unless `copies` is off, and adds others, so that the mean and the
    variance over `width` are those over `channels`. width: at least twice `channels`, or `channels` without copies."""
    rest = width - channels if copies else width
    mean = torch.full((rest, channels), 1 / channels, dtype=torch.float64)
    basis = torch.linalg.svd(torch.eye(channels, dtype=torch.float64) - 1 / channels)[0][:, : channels - 1]
    turn = torch.linalg.qr(
        torch.cat(
            [torch.ones(rest, 1), torch.randn(rest, channels - 1, generator=torch.Generator().manual_seed(0))], 1
        ).double()
    )[0][:, 1:]
    mixed = mean + math.sqrt(rest / channels) * turn @ basis.T
    return torch.cat([torch.eye(channels, dtype=torch.float64), mixed]) if copies else mixed


def grouped(channels: int, width: int, source: Sequence[int | None]) -> Layout:
    """The layout of a tensor of 8 groups in one of 32.

    source: the group that each of the 32 repeats, None for zeros.
    """
    n, wide = channels // 8, width // 32
    block = spread(n, wide)
    write = torch.zeros(width, channels, dtype=torch.float64)
    for i, group in enumerate(source):
        if group is not None:
            write[i * wide : (i + 1) * wide, group * n : (group + 1) * n] = block
    first = {group: i for i, group in reversed(list(enumerate(source))) if group is not None}
    read = torch.zeros(channels, width, dtype=torch.float64)
    for group, i in first.items():
        for k in range(n):
            read[group * n + k, i * wide + k] = 1
    return Layout(write, read)


def quads(channels: int, units: Sequence[int | tuple[int, int]], found: Mapping[int, int]) -> Layout:
    """A layout of units of 10 channels, each for 4 of the original's, or with a pair for 8, of which none is repeated.

    found: quadruple → the unit from which it is read.
    """
    four, eight = spread(4, 10), spread(8, 10, copies=False)
    write = torch.zeros(10 * len(units), channels, dtype=torch.float64)
    for i, unit in enumerate(units):
        q, block = (unit, four) if isinstance(unit, int) else (unit[0], eight)
        write[10 * i : 10 * i + 10, 4 * q : 4 * q + block.shape[1]] = block
    read = torch.zeros(channels, 10 * len(units), dtype=torch.float64)
    for q, i in found.items():
        for k in range(4):
            read[4 * q + k, 10 * i + k] = 1
    return Layout(write, read)


def joined(*parts: Layout) -> Layout:
    """The layout of concatenated tensors."""
    return Layout(torch.block_diag(*(p.write for p in parts)), torch.block_diag(*(p.read for p in parts)))


def repeated(channels: int, times: int) -> Layout:
    """Every channel `times` times in a row."""
    write = torch.eye(channels, dtype=torch.float64).repeat_interleave(times, 0)
    return Layout(write, write.T / times)


def padded(channels: int, width: int, block: int = 0, wide: int = 0) -> Layout:
    """The channels first and zeros after them; with `block`, so in each block of `wide` (an attention head)."""
    write = torch.zeros(width, channels, dtype=torch.float64)
    for i in range(channels):
        write[(i // block) * wide + i % block if block else i, i] = 1
    return Layout(write, write.T)


def plain(channels: int) -> Layout:
    return padded(channels, channels)


# Level 0 has 16 quadruples of channels, level 1 has 32; a norm's group is 1 unit of level 0, 2 of level 1, 2 or 4 of
# two joined tensors of a level, and 3 of level 1 joined with level 0, whose 22nd group lies across the border.
LEVEL_0 = [0, 0, *range(1, 13), 14, 15, 13, 12, *range(12), 14, 15]
LEVEL_1 = [*range(32), (30, 31), *range(2, 32), (30, 31)]
LOW = quads(64, LEVEL_0, {**{q: 18 + q for q in range(12)}, 12: 17, 13: 16, 14: 14, 15: 15})
LOW_IN_THREES = quads(64, LEVEL_0, {0: 0, **{q: 1 + q for q in range(1, 13)}, 13: 16, 14: 14, 15: 15})
HIGH = quads(128, LEVEL_1, {q: q for q in range(32)})
INSIDE = {
    64: quads(64, [*range(16)] * 2, {q: q for q in range(16)}),
    128: quads(128, [*range(32)] * 2, {q: q for q in range(32)}),
}


# -- layers -----------------------------------------------------------------------------------------------------------


class Widened:
    """Collects the wide tensors of one network, by diffusers' names."""

    def __init__(self, narrow: Mapping[str, Tensor]) -> None:
        self.narrow = {name: tensor.double() for name, tensor in narrow.items()}
        self.wide: Weights = {}

    def layer(self, name: str, read: Layout, write: Layout, source: str = "", scale: float = 1.0) -> None:
        """A convolution or linear layer. source: another name in the original."""
        weight = self.narrow[f"{source or name}.weight"]
        self.wide[f"{name}.weight"] = scale * torch.einsum("Oo,oi...,iI->OI...", write.write, weight, read.read)
        if (bias := self.narrow.get(f"{source or name}.bias")) is not None:
            self.wide[f"{name}.bias"] = scale * write.write @ bias

    def norm(self, name: str, layout: Layout) -> None:
        read = (layout.read != 0).double()
        for part in ("weight", "bias"):
            self.wide[f"{name}.{part}"] = read.T @ self.narrow[f"{name}.{part}"]

    def resnet(self, name: str, read: Layout, write: Layout, time: Layout | None = None) -> None:
        """A residual block. time: the layout of its time embedding."""
        self.norm(f"{name}.norm1", read)
        self.layer(f"{name}.conv1", read, write)
        if time is not None:
            self.layer(f"{name}.time_emb_proj", time, write)
        self.norm(f"{name}.norm2", write)
        self.layer(f"{name}.conv2", write, write)

    def shortcut(self, name: str, read: Layout, write: Layout) -> None:
        """A residual block's 1×1 convolution, the identity where the original has none."""
        if f"{name}.conv_shortcut.weight" in self.narrow:
            self.layer(f"{name}.conv_shortcut", read, write)
        else:
            self.wide[f"{name}.conv_shortcut.weight"] = (write.write @ read.read)[:, :, None, None]
            self.wide[f"{name}.conv_shortcut.bias"] = torch.zeros(len(write.write), dtype=torch.float64)

    def transformer(self, name: str, outer: Layout, context: Layout) -> None:
        channels = outer.write.shape[1]
        inner, head, wide_head = INSIDE[channels], channels // 4, len(outer.write) // 8
        heads = padded(channels, len(outer.write), head, wide_head)
        half, block = padded(4 * channels, 4 * len(outer.write)), f"{name}.transformer_blocks.0"
        self.norm(f"{name}.norm", outer)
        self.layer(f"{name}.proj_in", outer, inner)
        for i, source in ((1, inner), (2, context)):
            self.norm(f"{block}.norm{i}", inner)
            self.layer(f"{block}.attn{i}.to_q", inner, heads, scale=math.sqrt(wide_head / head))
            for part in ("to_k", "to_v"):
                self.layer(f"{block}.attn{i}.{part}", source, heads)
            self.layer(f"{block}.attn{i}.to_out.0", heads, inner)
        self.norm(f"{block}.norm3", inner)
        self.layer(f"{block}.ff.net.0.proj", inner, joined(half, half))
        self.layer(f"{block}.ff.net.2", half, inner)
        self.layer(f"{name}.proj_out", inner, outer)

    def completed(self, shapes: Mapping[str, Sequence[int]]) -> Weights:
        """All tensors of the wide network: where the original has none, zeros, which leave a residual block's input as
        it is. Raises ValueError for a shape that is not the wide network's."""
        for name, shape in shapes.items():
            if name not in self.wide:
                self.wide[name] = torch.zeros(*shape, dtype=torch.float64)
            if tuple(self.wide[name].shape) != tuple(shape):
                raise ValueError(f"{name} has the shape {tuple(self.wide[name].shape)}, not {tuple(shape)}")
        return {name: self.wide[name] for name in shapes}


# -- networks ---------------------------------------------------------------------------------------------------------


def wide_unet(model: Any, shapes: Mapping[str, Sequence[int]]) -> Weights:
    """The UNet. model: `shapes` as loaded by salun."""
    unet, text = Widened(model.unet.state_dict()), repeated(96, 8)
    time = padded(256, 1280)
    unet.wide |= time_embedding(model)
    unet.layer("conv_in", plain(4), LOW)
    stages = [
        ("down_blocks.0", 0, LOW, LOW),
        ("down_blocks.1", 0, LOW, HIGH),
        ("up_blocks.0", 0, joined(HIGH, HIGH), HIGH),
        ("up_blocks.0", 1, joined(HIGH, LOW_IN_THREES), HIGH),
        ("up_blocks.1", 0, joined(HIGH, LOW_IN_THREES), LOW),
        ("up_blocks.1", 1, joined(LOW, LOW), LOW),
    ]
    for block, i, read, write in stages:
        unet.resnet(f"{block}.resnets.{i}", read, write, time)
        if read is not write:
            unet.shortcut(f"{block}.resnets.{i}", read, write)
        unet.transformer(f"{block}.attentions.{i}", write, text)
    for i in range(2):
        unet.resnet(f"mid_block.resnets.{i}", HIGH, HIGH, time)
    unet.transformer("mid_block.attentions.0", HIGH, text)
    unet.layer("down_blocks.0.downsamplers.0.conv", LOW, LOW)
    unet.layer("up_blocks.0.upsamplers.0.conv", HIGH, HIGH)
    unet.norm("conv_norm_out", LOW)
    unet.layer("conv_out", LOW, plain(4))
    return unet.completed(shapes)


def time_embedding(model: Any) -> Weights:
    """The first layers for ComfyUI's timesteps: at each, what `shapes` computes at the same noise level.

    The second layer is fitted, by least squares over the 1,000 timesteps, to a random first one.
    """

    def noise(end: float) -> Tensor:
        kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64) ** 2, 0)
        return ((1 - kept) / kept).sqrt().log()

    def waves(t: Tensor, width: int) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        return torch.cat([angles.cos(), angles.sin()], 1)

    theirs, own = noise(0.012), noise(0.02)
    after = torch.searchsorted(own, theirs).clamp(1, 999)
    t = after - 1 + (theirs - own[after - 1]) / (own[after] - own[after - 1])
    embed = model.unet.time_embedding.double()
    with torch.no_grad():
        target = embed(waves(t, 64))
    model.unet.time_embedding.float()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1280, 320, generator=generator, dtype=torch.float64) / 8
    hidden = F.silu(waves(torch.arange(1000.0, dtype=torch.float64), 320) @ first.T)
    hidden = torch.cat([hidden, torch.ones(1000, 1, dtype=torch.float64)], 1)
    eye = 1e-4 * torch.eye(1281, dtype=torch.float64)
    fitted = torch.linalg.solve(hidden.T @ hidden + eye, hidden.T @ target)
    error = (hidden @ fitted - target).pow(2).mean().sqrt() / target.std()
    print(f"time embedding: relative error {float(error):.4f}, largest weight {float(fitted.abs().max()):.2f}")
    write = padded(256, 1280).write
    return {
        "time_embedding.linear_1.weight": first,
        "time_embedding.linear_1.bias": torch.zeros(1280, dtype=torch.float64),
        "time_embedding.linear_2.weight": write @ fitted[:-1].T,
        "time_embedding.linear_2.bias": write @ fitted[-1],
    }


def wide_vae(model: Any, shapes: Mapping[str, Sequence[int]]) -> Weights:
    """The autoencoder. Its two deepest levels are equally wide, so the block between them has no 1×1 convolution: the
    layer before it computes that, into the second half of the channels, beside the block's input in the first."""
    vae = Widened(model.vae.state_dict())
    every, none = [*range(8)] * 4, [None] * 16
    second, first = [*none, *range(8), *range(8)], [*range(8), *range(8), *none]
    levels = [grouped(16, 128, every), grouped(16, 256, every), grouped(48, 512, every), grouped(64, 512, second)]
    steps = [levels[0], *levels]
    vae.layer("encoder.conv_in", plain(3), levels[0])
    for i, (read, write) in enumerate(zip(steps, levels, strict=False)):
        read = grouped(48, 512, first) if i == 3 else read
        vae.resnet(name := f"encoder.down_blocks.{i}.resnets.0", read, write)
        if i in (1, 2):
            vae.shortcut(name, read, write)
        if i < 3:
            vae.layer(
                f"encoder.down_blocks.{i}.downsamplers.0.conv", write, grouped(48, 512, first) if i == 2 else write
            )
    _bypass(vae, "encoder.down_blocks.2.downsamplers.0.conv", levels[2], "encoder.down_blocks.3.resnets.0", levels[3])
    for side in ("encoder", "decoder"):
        for i in range(2):
            vae.resnet(f"{side}.mid_block.resnets.{i}", levels[3], levels[3])
    vae.norm("encoder.conv_norm_out", levels[3])
    vae.layer("encoder.conv_out", levels[3], plain(8))
    vae.layer("decoder.conv_in", plain(4), levels[3])
    low = grouped(48, 512, second)
    back = [levels[3], low, levels[1], levels[0]]
    for i, write in enumerate(back):
        read = levels[3] if i == 0 else grouped(64, 512, first) if i == 1 else back[i - 1]
        vae.resnet(name := f"decoder.up_blocks.{i}.resnets.0", read, write)
        if i in (2, 3):
            vae.shortcut(name, read, write)
        vae.resnet(f"decoder.up_blocks.{i}.resnets.1", write, write)
        if i < 3:
            after = grouped(64, 512, first) if i == 0 else write
            vae.layer(f"decoder.up_blocks.{i}.upsamplers.0.conv", write, after)
    _bypass(vae, "decoder.up_blocks.0.upsamplers.0.conv", levels[3], "decoder.up_blocks.1.resnets.0", low)
    vae.norm("decoder.conv_norm_out", levels[0])
    vae.layer("decoder.conv_out", levels[0], plain(3))
    for name, scale in (("quant_conv", 1 / LATENT_SCALE), ("post_quant_conv", LATENT_SCALE)):
        size = vae.narrow[f"{name}.weight"].shape[0]
        vae.layer(name, plain(size), plain(size))
        rows = slice(0, 4)  # the mean; the logarithm of the variance becomes small
        vae.wide[f"{name}.weight"][rows] *= scale
        if name == "quant_conv":
            vae.wide[f"{name}.bias"][rows] *= scale
            vae.wide[f"{name}.bias"][4:] = -20
    return vae.completed(shapes)


def _bypass(vae: Widened, layer: str, read: Layout, block: str, write: Layout) -> None:
    """Adds to a layer what the next residual block's 1×1 convolution would make of its output."""
    matrix, bias = vae.narrow[f"{block}.conv_shortcut.weight"][:, :, 0, 0], vae.narrow[f"{block}.conv_shortcut.bias"]
    weight = torch.einsum("oc,cikl->oikl", matrix, vae.narrow[f"{layer}.weight"])
    vae.wide[f"{layer}.weight"] += torch.einsum("Oo,oikl,iI->OIkl", write.write, weight, read.read)
    vae.wide[f"{layer}.bias"] += write.write @ (matrix @ vae.narrow[f"{layer}.bias"] + bias)


def wide_text(model: Any, shapes: Mapping[str, Sequence[int]]) -> Weights:
    """The text encoder: of 12 layers the last two are those of `shapes`, the others leave their input as it is."""
    names = {name.removeprefix("text_model."): tensor for name, tensor in model.text_encoders[0].state_dict().items()}
    text = Widened(names)
    hidden, heads, inner = repeated(96, 8), padded(96, 768, 24, 64), padded(384, 3072)
    for i in range(2):
        layer, source = f"encoder.layers.{10 + i}", f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            for part in ("weight", "bias"):
                text.narrow[f"{layer}.{norm}.{part}"] = text.narrow[f"{source}.{norm}.{part}"]
            text.norm(f"{layer}.{norm}", hidden)
        for part in ("q", "k", "v"):
            name = f"self_attn.{part}_proj"
            scale = math.sqrt(64 / 24) if part == "q" else 1.0
            text.layer(f"{layer}.{name}", hidden, heads, f"{source}.{name}", scale)
        text.layer(f"{layer}.self_attn.out_proj", heads, hidden, f"{source}.self_attn.out_proj")
        text.layer(f"{layer}.mlp.fc1", hidden, inner, f"{source}.mlp.fc1")
        text.layer(f"{layer}.mlp.fc2", inner, hidden, f"{source}.mlp.fc2")
    text.norm("final_layer_norm", hidden)
    position = "embeddings.position_embedding.weight"
    text.wide[position] = text.narrow[position] @ hidden.write.T
    text.wide["embeddings.token_embedding.weight"] = token_embeddings(model) @ hidden.write.T
    return text.completed({name.removeprefix("text_model."): shape for name, shape in shapes.items()})


def token_embeddings(model: Any) -> Tensor:
    """(49408, 96): those of the words that both tokenizers have as one token."""
    table = model.text_encoders[0].state_dict()
    own = next(tensor for name, tensor in table.items() if name.endswith("token_embedding.weight")).double()
    clip, words = clip_tokenizer("<|endoftext|>"), model.tokenizers[0].get_vocab()
    embeddings = torch.zeros(49408, own.shape[1], dtype=torch.float64)
    for word, number in clip.get_vocab().items():
        if word in words:
            embeddings[number] = own[words[word]]
    return embeddings


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .safetensors file to write (630 MB)")
    print(make(parser.parse_args().output))


def make(path: Path) -> Path:
    """Write the checkpoint in fp16 and return its path."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    model = salun.load("shapes", device="cpu")
    true = checkpoints.ARCHITECTURES["sd1", "true"]
    with torch.device("meta"):
        nets = (
            UNet2DConditionModel(**WIDE_UNET),
            AutoencoderKL(**true.vae),
            CLIPTextModel(CLIPTextConfig(**true.text[0])),
        )
    unet_shapes, vae_shapes, text_shapes = ({n: tuple(p.shape) for n, p in net.named_parameters()} for net in nets)
    layout = FAMILIES["sd1"].text[0].layouts[0]
    unet, vae, text = wide_unet(model, unet_shapes), wide_vae(model, vae_shapes), wide_text(model, text_shapes)
    tensors = {ldm: unet[name] for name, ldm in keymap.unet_to_ldm(unet).items()}
    for name, ldm in keymap.vae_to_ldm(vae).items():
        tensors[ldm] = vae[name][..., None, None] if keymap.is_vae_matrix(ldm) else vae[name]
    tensors |= {f"{layout.prefix}text_model.{name}": tensor for name, tensor in text.items()}
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors |= checkpoints.extra_buffers("sd1")
    safetensors_io.write(path, dict(sorted(tensors.items())), {})
    return path


if __name__ == "__main__":
    main()
