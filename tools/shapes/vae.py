"""Stage 1: the autoencoder, ×8, 64×64×3 → 8×8×4, whitened so that every latent direction has unit variance."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from tools.shapes import world
from tools.shapes.state import Stage, to_tensor

STEPS, BATCH = 2600, 32


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train(pictures: world.Pictures, folder: Path) -> AutoencoderKL:
    """L1 + 2·MSE on pixels, L1 on 4×4 means (color), a light KL."""
    torch.manual_seed(1)
    vae = build()
    stage = Stage(folder / "vae.pt", STEPS, torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-3), vae)

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(pictures.images), (BATCH,), generator=generator)
        x = to_tensor(pictures.images[pick.numpy()])
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        y = vae.decode(z).sample
        colour = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + colour + 0.002 * kl

    stage.run(loss)
    whitened = folder / "vae"
    if not whitened.exists():
        whiten(vae, encode(vae, pictures.images[:4000]))
        vae.save_pretrained(whitened)
    return AutoencoderKL.from_pretrained(whitened)


@torch.no_grad()
def encode(vae: AutoencoderKL, images) -> Tensor:  # type: ignore[no-untyped-def]
    """Latent means of uint8 images, (n, 4, 8, 8)."""
    return torch.cat([vae.encode(to_tensor(images[i : i + 250])).latent_dist.mean for i in range(0, len(images), 250)])


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold a ZCA of the latents into quant_conv and its inverse into post_quant_conv.

    Color sits in directions of small variance; unwhitened they drown in the diffusion noise and are never learned.
    The posterior's log-variance, which the change of basis would mix, becomes a small constant.
    """
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    print("latent eigenvalues", [f"{v:.4f}" for v in values.tolist()])
    zca = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    q, p = vae.quant_conv, vae.post_quant_conv
    weight, bias = q.weight[:, :, 0, 0].double(), q.bias.double()
    q.weight[:4, :, 0, 0] = (zca @ weight[:4]).float()
    q.bias[:4] = (zca @ (bias[:4] - mean)).float()
    q.weight[4:] = 0
    q.bias[4:] = -6.0
    weight, bias = p.weight[:, :, 0, 0].double(), p.bias.double()
    p.bias.copy_((bias + weight @ mean).float())
    p.weight[:, :, 0, 0] = (weight @ inverse).float()
