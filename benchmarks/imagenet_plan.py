"""What a data set of the size of ImageNet would take: costs of a few hundred images, measured here, times 1.28 million.

    python -m benchmarks.imagenet_plan [--images 200]

Draws JPEG files of 500×375 pixels, reads them as a folder of images of 224×224, and takes training steps of a ResNet-50
(transformers', with first weights) on one thread. Prints the table of docs/classification.md and the figures below it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from salun.classification import pixel_store
from salun.classification.attacks.mia import called_non_member
from salun.classification.data import load_data
from salun.classification.labeled import Sample
from salun.classification.splits import make_split, remarks, with_forget
from salun.images import list_images
from salun.masking.mask import Mask

IMAGES, CLASSES, SIDE, BATCH = 1_281_167, 1000, 224, 16
PIXELS = 3 * SIDE * SIDE  # bytes of an image


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        self.inner = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x).logits
        return logits


def draw(folder: Path, count: int) -> float:
    """Files of that many images in four classes, as detailed as photographs. Returns their mean size in bytes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375))
        pixels = np.asarray(coarse) + generator.normal(0, 10, (375, 500, 3))
        place = folder / f"class{i % 4}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """The shortest of the times that the work takes."""
    measured = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        measured.append(time.perf_counter() - began)
    return min(measured)


def reading(folder: Path, count: int) -> dict[str, float]:
    """Seconds per image of what is done with the data, by name."""
    costs = {"list the files": seconds(lambda: [list_images(path) for path in folder.iterdir()], 3) / count}
    costs["decode, resize and store once"] = seconds(lambda: load_data(str(folder), SIDE)) / count
    costs["read from the cache, with both hashes"] = seconds(lambda: load_data(str(folder), SIDE).digest, 2) / count
    data = load_data(str(folder), SIDE)
    split = with_forget(make_split(data, 0.2, 0.1, 0), data, "class:class0", 0)
    costs["compare pixels of the sets"] = seconds(lambda: remarks(data, split), 2) / count
    data.preset.update(augment="crop-flip", mean=[0.5] * 3, std=[0.25] * 3)
    rows, generator = torch.arange(BATCH), torch.Generator().manual_seed(0)
    costs["augment, each epoch"] = seconds(lambda: data.augmented(rows, generator), 5) / BATCH
    return costs


def training() -> tuple[dict[str, float], int]:
    """Seconds per image of ResNet-50 on one thread, by name; and its number of weights."""
    torch.set_num_threads(1)
    model = ResNet50().train()
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    costs = {}
    for name, bf16 in (("train, fp32", False), ("train, bf16", True)):
        step(bf16)
        costs[name] = seconds(lambda bf16=bf16: step(bf16), 3) / BATCH  # type: ignore[misc]
    with torch.no_grad():
        costs["predict, fp32"] = seconds(lambda: model.eval()(x), 3) / BATCH
    return costs, sum(p.numel() for p in model.parameters())


def attack_seconds(members: int) -> float:
    """Seconds of one membership attack with as many images on each side."""
    generator = np.random.default_rng(0)
    member, other, target = (1 - generator.beta(1, b, (n, 1)) for b, n in ((20, members), (3, members), (3, 1000)))
    return seconds(lambda: called_non_member(member, other, target))


def bytes_per_sample() -> float:
    """Memory of the list of files, before any image is read."""
    tracemalloc.start()
    name = "/data/imagenet/train/n00000000/n00000000_{}.JPEG"
    held = [Sample(Path(name.format(i)), name.format(i), 0) for i in range(10_000)]
    size = tracemalloc.get_traced_memory()[0] / len(held)
    tracemalloc.stop()
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    pixel_store.WORTHWHILE = pixel_store.SETTLED = pixel_store.IN_MEMORY = 0  # few images are treated as many, too
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SALUN_CACHE"] = str(Path(folder) / "cache")
        images = Path(folder) / "images"
        images.mkdir()
        size = draw(images, count)
        costs = reading(images, count)
    model_costs, weights = training()
    print("| | ms per image | for 1,281,167 images |\n|---|---|---|")
    for name, cost in (costs | model_costs).items():
        print(f"| {name} | {1000 * cost:.2f} | {cost * IMAGES / 3600:.1f} h |")
    print(f"\nJPEG files of {size / 1e3:.0f} kB; {weights:,} weights")
    print(f"decoded: {PIXELS * IMAGES / 1e9:.0f} GB; list of files: {bytes_per_sample() * IMAGES / 1e9:.1f} GB")
    scores = {"w": torch.rand(weights)}
    print(f"mask: {seconds(lambda: Mask.from_scores(scores, 0.5)):.1f} s")
    print(f"split.json: {len(json.dumps(list(range(IMAGES)))) * 2 / 1e6:.0f} MB (each training row twice)")
    few, many = attack_seconds(4000), attack_seconds(8000)
    print(f"attack with 4,000 and 8,000 test images: {few:.1f} and {many:.1f} s")


if __name__ == "__main__":
    main()
