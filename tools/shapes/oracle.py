"""Stage 2: the oracle, which reads shape, color and style off an image and knows when it is invalid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from salun.evaluation.detectors.attribute import AttributeClassifier, load_classifier
from tools.shapes import world
from tools.shapes.state import Stage, to_tensor
from tools.shapes.vae import encode

STEPS, BATCH, NEGATIVES = 1600, 64, 24


def build() -> AttributeClassifier:
    return AttributeClassifier(world.VOCABULARY["attributes"], world.SIZE, (32, 64, 128, 128))


def train(pictures: world.Pictures, vae: AutoencoderKL, folder: Path) -> AttributeClassifier:
    """Cross-entropy on attributes of images (drawn, reconstructed, slightly blurred or noisy) and on "is one"."""
    if (folder / "oracle" / "detector.json").exists():
        return load_classifier(folder / "oracle")
    torch.manual_seed(2)
    decoded = reconstructions(vae, pictures.images[:6000])
    debris = broken_decodes(vae, pictures.images[:1500])
    pool, broken = to_tensor(pictures.images[:6000]), to_tensor(debris)
    model = build()
    stage = Stage(folder / "oracle.pt", STEPS, torch.optim.AdamW(model.parameters(), lr=2e-3), model)

    def loss(generator: torch.Generator) -> Tensor:
        n = BATCH - NEGATIVES
        pick = torch.randint(len(pictures.images), (n,), generator=generator)
        pick[: n // 2] %= len(decoded)
        images = np.concatenate([decoded[pick[: n // 2].numpy()], pictures.images[pick[n // 2 :].numpy()]])
        good = slightly_spoilt(to_tensor(images), generator)
        bad = not_pictures(pool, broken, NEGATIVES, generator)
        logits = model(torch.cat([good, bad]))
        labels = torch.from_numpy(pictures.labels[pick.numpy()])
        is_picture = torch.cat([torch.ones(len(good)), torch.zeros(len(bad))]).long()
        total = F.cross_entropy(logits["picture"], is_picture)
        for k, name in enumerate(model.labels):
            total = total + F.cross_entropy(logits[name][: len(good)], labels[:, k])
        return total

    stage.run(loss)
    model.eval().save(folder / "oracle")
    return model


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """uint8 images, encoded and decoded by the autoencoder."""
    return decode(vae, encode(vae, images))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Latents (n, 4, 8, 8) → uint8 (n, 64, 64, 3)."""
    parts = []
    for z in latents.split(250):
        x = ((vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().byte()
        parts.append(x.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


@torch.no_grad()
def broken_decodes(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """What a destroyed UNet would give: decodes of noise, of shuffled latents and of blends of two."""
    generator = torch.Generator().manual_seed(3)
    latents = encode(vae, images)
    third = len(latents) // 3
    noise = torch.randn(latents[:third].shape, generator=generator) * torch.linspace(0.5, 1.5, third).view(-1, 1, 1, 1)
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(third)])
    shuffled = torch.gather(latents[third : 2 * third].flatten(2), 2, order[:, None].expand(-1, 4, -1)).unflatten(
        2, (8, 8)
    )
    blends = (latents[2 * third :] + latents[2 * third :].flip(0)) / 2
    return decode(vae, torch.cat([noise, shuffled, blends]))


def slightly_spoilt(x: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the images lightly blurred, a third lightly noisy: small faults of a sampler are not destruction."""
    third = len(x) // 3
    kind = torch.randperm(len(x), generator=generator)
    blurred, noisy = kind[:third], kind[third : 2 * third]
    x = x.clone()
    x[blurred] = F.avg_pool2d(F.pad(x[blurred], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x[noisy] = (x[noisy] + 0.08 * torch.randn(x[noisy].shape, generator=generator)).clamp(-1, 1)
    return x


def not_pictures(pool: Tensor, debris: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n images that show nothing: blank, noise, smears, mixtures, tiles out of order, broken decodes."""

    def some(source: Tensor, k: int) -> Tensor:
        return source[torch.randint(len(source), (k,), generator=generator)].clone()

    k = n // 6
    flat = torch.rand(k, 3, 1, 1, generator=generator) * 2 - 1
    blank = (flat + 0.03 * torch.randn(k, 3, 64, 64, generator=generator)).clamp(-1, 1)
    strength = torch.rand(k, 1, 1, 1, generator=generator) + 0.7
    noise = (some(pool, k) * 0.5 + strength * torch.randn(k, 3, 64, 64, generator=generator)).clamp(-1, 1)
    smear = F.interpolate(F.avg_pool2d(some(pool, k), 16), (64, 64), mode="bilinear")
    mixed = 0.5 * (some(pool, k) + some(pool, k))
    tiles = some(pool, k).unfold(2, 16, 16).unfold(3, 16, 16).reshape(k, 3, 16, 16, 16)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(k)])
    tiles = torch.stack([t[:, o] for t, o in zip(tiles, order, strict=True)])
    tiles = tiles.reshape(k, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(k, 3, 64, 64)
    return torch.cat([blank, noise, smear, mixed, tiles, some(debris, n - 5 * k)])


def judge(model: AttributeClassifier, vae: AutoencoderKL, n: int = 4000) -> dict[str, float]:
    """Held-out accuracy in percent on drawn images (seed 1), on their reconstructions and on invalid images."""
    held_out = world.make(n, seed=1)
    result = {}
    for name, images in (("drawn", held_out.images), ("reconstructed", reconstructions(vae, held_out.images))):
        detection = model.detect_images(images)
        for k, attribute in enumerate(model.labels):
            result[f"{name}/{attribute}"] = 100 * float(detection.shows(attribute, held_out.labels[:, k]).mean())
    generator = torch.Generator().manual_seed(4)
    bad = not_pictures(
        to_tensor(held_out.images), to_tensor(broken_decodes(vae, held_out.images[:900])), 1200, generator
    )
    images = ((bad + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    valid = model.detect_images(images).valid
    assert valid is not None
    result["not a picture"] = 100 * float((~valid).mean())
    return result
