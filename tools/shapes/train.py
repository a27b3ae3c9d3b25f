"""Train the bundled model from nothing: python -m tools.shapes.train [--folder build/shapes]. Killed, it resumes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tools.shapes import oracle, unet, vae, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/shapes"))
    parser.add_argument("--pictures", type=int, default=24_000)
    arguments = parser.parse_args()
    pictures = pictures_of(arguments.folder, arguments.pictures)
    calm = pictures_of(arguments.folder, arguments.pictures, calm=True)
    autoencoder = vae.train(pictures, arguments.folder)
    oracle.train(pictures, autoencoder, arguments.folder)
    unet.train(pictures, calm, autoencoder, arguments.folder)


def pictures_of(folder: Path, n: int, calm: bool = False) -> world.Pictures:
    """The training images (seed 0, the calm ones seed 2), drawn once."""
    path = folder / f"pictures-{n}{'-calm' if calm else ''}.pt"
    if not path.exists():
        made = world.make(n, seed=2 if calm else 0, calm=calm)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((torch.from_numpy(made.images), torch.from_numpy(made.labels), made.captions), path)
    images, labels, captions = torch.load(path, weights_only=True)
    return world.Pictures(images.numpy(), labels.numpy(), captions)


if __name__ == "__main__":
    main()
