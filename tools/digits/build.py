"""Train and measure the bundled model `digits`, and write its folder: python -m tools.digits.build."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.classification.data import load_data
from salun.classification.splits import make_split
from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.model.loading import load
from salun.diffusion.train import _of_size, train_class_model
from salun.diffusion.train_options import ClassTrainOptions
from salun.evaluation.detectors.attribute import VALIDITY, AttributeClassifier, load_classifier
from salun.evaluation.metrics.frechet import frechet_distance
from salun.untrusted import read_yaml

ROOT = Path(__file__).resolve().parents[2]
TARGET, CARD = ROOT / "salun" / "assets" / "digits", Path(__file__).with_name("card.md")
STEPS, BATCH, NEGATIVES = 1500, 96, 24  # of the detector
EACH = 500  # samples of each class that are measured


def real_images(options: ClassTrainOptions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part → (uint8 images (n, h, w, 3), labels (n,)) of the data, in the model's size."""
    data = load_data(options.data)
    split = make_split(data, options.test_share, 0.0, options.split_seed)
    parts = {"train": split.train, "held out": split.test}
    side = options.image_size or data.size
    return {
        name: (_of_size(data, rows, side).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), data.labels[rows].numpy())
        for name, rows in parts.items()
    }


def train_detector(images: np.ndarray, labels: np.ndarray, folder: Path) -> AttributeClassifier:
    """Cross-entropy on the digit of shifted and slightly spoilt images, and on whether there is one."""
    if (folder / "detector.json").exists():
        return load_classifier(folder)
    torch.manual_seed(0)
    names = {"class": [str(digit) for digit in range(10)]}
    model = AttributeClassifier(names, images.shape[1], (32, 64, 96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    y, generator = torch.from_numpy(labels), torch.Generator().manual_seed(0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        good, bad = spoilt(x[rows], generator), no_digits(x, NEGATIVES, generator)
        logits = model(torch.cat([good, bad]))
        valid = torch.cat([torch.ones(BATCH), torch.zeros(NEGATIVES)]).long()
        loss = F.cross_entropy(logits["class"][:BATCH], y[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        (loss + F.cross_entropy(logits[VALIDITY], valid)).backward()
        optimizer.step()
        rate.step()
    model.eval().save(folder)
    return load_classifier(folder)


def spoilt(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w) shifted by up to a pixel, with noise and another contrast."""
    n = len(x)
    dy, dx = (torch.randint(-1, 2, (n,), generator=generator) for _ in range(2))
    x = torch.stack([torch.roll(each, (int(a), int(b)), (1, 2)) for each, a, b in zip(x, dy, dx, strict=True)])
    strength = 0.15 * torch.rand(n, 1, 1, 1, generator=generator)
    contrast = 1 + 0.2 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    noise = torch.randn((n, 1, *x.shape[2:]), generator=generator)
    return (x * contrast + strength * noise).clamp(-1, 1)


def no_digits(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """What a damaged network might give: noise, blurred noise, blends of two digits, blank images."""
    each, side = n // 4, x.shape[-1]
    noise = torch.rand((2 * each, 1, side, side), generator=generator) * 2 - 1
    soft = F.interpolate(F.avg_pool2d(noise[each:], 4), (side, side), mode="bilinear") * 2
    rows = torch.randint(len(x), (2, each), generator=generator)
    blends = (x[rows[0], :1] + x[rows[1], :1].flip(2)) / 2
    blank = (torch.rand(each, 1, 1, 1, generator=generator) * 2 - 1).expand(-1, 1, side, side)
    bad = torch.cat([noise[:each], soft, blends, blank]).clamp(-1, 1).expand(-1, 3, -1, -1)
    return bad + 0.05 * torch.randn((len(bad), 1, side, side), generator=generator)


def assemble(trained: Path, detector: Path, target: Path) -> None:
    """Copy the model, its weights in fp16, and the detector; the settings are the preset's."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("model_index.json", "labels.txt"):
        shutil.copyfile(trained / "model" / name, target / name)
    shutil.copytree(trained / "model" / "scheduler", target / "scheduler", dirs_exist_ok=True)
    shutil.copytree(detector, target / "oracle", dirs_exist_ok=True)
    options, preset = ClassTrainOptions().resolved()
    settings = {"schema": 1, **preset, "detector": "oracle"}
    settings["sampling"] = preset["sampling"] | {"resolution": options.image_size}
    (target / "salun.yaml").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    network = UNet2DModel.from_pretrained(trained / "model" / "unet")
    (target / "unet").mkdir(exist_ok=True)
    network.save_config(target / "unet")
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    safetensors_io.write(target / "unet" / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    shutil.copyfile(trained / "samples.png", target / "samples.png")


def measured(target: Path, real: dict[str, tuple[np.ndarray, np.ndarray]], each: int) -> dict[str, Any]:
    """The metrics of the card."""
    model, detector = load(str(target), device="cpu"), load_classifier(target / "oracle")
    prompts = [label for label in model.labels for _ in range(each)]  # type: ignore[attr-defined]
    images = sample_images(model, prompts, [item_seed(7, "sample", i) for i in range(len(prompts))])
    samples, held_out = detector.detect_images(images), detector.detect_images(real["held out"][0])
    training = detector.detect_images(real["train"][0])
    labels = np.array([model.labels.index(prompt) for prompt in prompts])  # type: ignore[attr-defined]
    assert samples.valid is not None and held_out.valid is not None
    assert samples.features is not None and held_out.features is not None and training.features is not None
    right = (samples.scores["class"].argmax(1) == labels) & samples.valid
    correct = (held_out.scores["class"].argmax(1) == real["held out"][1]) & held_out.valid
    by_class = [100 * right[labels == k].mean() for k in range(10)]
    return {
        "held_out": len(correct), "real": 100 * float(correct.mean()), "valid": 100 * float(held_out.valid.mean()),
        "n": len(images),
        "each": each, "sampled": 100 * float(right.mean()),
        "by_class": ", ".join(f"{k}: {share:.1f}" for k, share in enumerate(by_class)),
        "frechet": frechet_distance(samples.features, held_out.features),
        "floor": frechet_distance(training.features, held_out.features),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--built", type=Path, default=ROOT / "build" / "digits")
    parser.add_argument("--each", type=int, default=EACH)
    parser.add_argument("--measure", action="store_true", help="measure again, which takes minutes")
    given = parser.parse_args()
    run = given.built / "run"
    options = ClassTrainOptions()
    if not (run / "model").is_dir():
        train_class_model(options, run, resume=(run / "run.json").is_file())
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    used = ClassTrainOptions(**record["options"])
    real = real_images(used)
    train_detector(*real["train"], given.built / "oracle")
    assemble(run, given.built / "oracle", TARGET)
    cached = given.built / "measured.json"
    if not cached.exists() or given.measure:
        cached.write_text(json.dumps(measured(TARGET, real, given.each), indent=1) + "\n", encoding="utf-8")
    metrics = json.loads(cached.read_text(encoding="utf-8"))
    network = UNet2DModel.from_pretrained(TARGET / "unet")
    settings = read_yaml(TARGET / "salun.yaml")["sampling"]
    text = CARD.read_text(encoding="utf-8").format(
        **metrics, parameters=f"{sum(p.numel() for p in network.parameters()):,}", trained=len(real["train"][0]),
        steps=used.steps, batch_size=used.batch_size, ema=used.ema, dropped=100 * (used.label_dropout or 0),
        minutes=record["timings"]["training"] / 60, sampling_steps=settings["steps"], guidance=settings["guidance"],
    )  # fmt: skip
    (TARGET / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
