"""Models like `shapes` that no recipe was tuned on: python -m tools.shapes.variants v zero-snr narrow [--folder …].

- v: predicts v, continued from the bundled model.
- zero-snr: v on a schedule whose last step is pure noise, continued likewise.
- narrow: half as many weights, trained from nothing.

Text encoder and VAE are those of `shapes`. Each becomes a diffusers folder, build/variants/NAME. Killed, it resumes.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

import salun
from salun.checkpoints import safetensors_io
from salun.diffusion.model.stable_diffusion import Model
from tools.shapes import world
from tools.shapes.state import Stage
from tools.shapes.train import pictures_of

BATCH, PICTURES = 64, 12_000
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Variant:
    """How a model differs from `shapes`.

    Args:
        steps, lr: Of its training.
        channels: Of the UNet's blocks; None for those of `shapes`, whose weights it then begins with.
    """

    steps: int
    lr: float
    prediction_type: str = "epsilon"
    zero_snr: bool = False
    channels: tuple[int, int] | None = None


VARIANTS = {
    "v": Variant(1000, 3e-4, "v_prediction"),
    "zero-snr": Variant(1000, 3e-4, "v_prediction", zero_snr=True),
    "narrow": Variant(4000, 2e-3, channels=(48, 80)),
}


def train(name: str, folder: Path) -> None:
    """Train a variant into `folder`/`name`."""
    variant, model = VARIANTS[name], salun.load("shapes", device="cpu", dtype="fp32")
    torch.manual_seed(5)
    config = dict(model.scheduler_config)
    config |= {"prediction_type": variant.prediction_type, "rescale_betas_zero_snr": variant.zero_snr}
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    unet = copy.deepcopy(model.unet).float().requires_grad_(True)
    if variant.channels is not None:
        unet = UNet2DConditionModel.from_config({**model.unet.config, "block_out_channels": variant.channels})
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=variant.lr, weight_decay=1e-2, fused=True)
    stage = Stage(folder / f"{name}.pt", variant.steps, optimizer, unet, average)
    latents, hidden, words = _data(model, folder)
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = torch.clamp(snr, max=5) / (snr + 1 if variant.prediction_type == "v_prediction" else snr)
    denoise = torch.compile(unet)

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, generator=generator) < 0.1
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        a, x = alphas[t].view(-1, 1, 1, 1), latents[pick]
        x_t = a.sqrt() * x + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x if variant.prediction_type == "v_prediction" else noise
        rows = torch.where(empty, 0, words[pick])
        predicted = denoise(x_t, t, hidden[rows]).sample
        return (weights[t] * ((predicted - target) ** 2).mean((1, 2, 3))).mean()

    def follow() -> None:
        decay = min(0.999, (stage.step + 1) / (stage.step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in unet.parameters()], 1 - decay)

    stage.run(loss, follow)
    save(average, scheduler, folder / name)


def _data(model: Model, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of drawings, encodings of their captions ("" first), and each drawing's row among these."""
    pictures = pictures_of(folder, PICTURES, calm=True)
    latents = torch.cat(
        [model.encode_images(pictures.images[i : i + BATCH]) for i in range(0, len(pictures.images), BATCH)]
    )
    texts = ["", *dict.fromkeys(pictures.captions)]
    row = {text: i for i, text in enumerate(texts)}
    return latents, model.encode(texts).hidden.float(), torch.tensor([row[text] for text in pictures.captions])


def save(unet: UNet2DConditionModel, scheduler: DPMSolverMultistepScheduler, target: Path) -> None:
    """The folder of `shapes` with another UNet and schedule."""
    shutil.copytree(world.ASSETS, target, dirs_exist_ok=True)
    unet.save_config(target / "unet")
    state = {name: tensor.half() for name, tensor in unet.state_dict().items()}
    safetensors_io.write(target / "unet" / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    scheduler.save_pretrained(target / "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=VARIANTS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "variants")
    given = parser.parse_args()
    for name in given.names:
        train(name, given.folder)


if __name__ == "__main__":
    main()
