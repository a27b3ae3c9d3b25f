"""Put the trained parts together as a diffusers folder, measure it, write its card: python -m tools.shapes.package.

Measuring takes minutes (it samples over a thousand images) and is kept in `build/shapes/measured.json`; `--measure`
does it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from salun.checkpoints import keymap, safetensors_io
from salun.diffusion.data.latents import item_seed, sample_images
from salun.diffusion.model.loading import load
from salun.evaluation.detectors.attribute import load_classifier
from tools.shapes import oracle, unet, world

CARD = Path(__file__).with_name("card.md")


def assemble(built: Path, target: Path) -> None:
    """Copy tokenizer, oracle and VAE, and the averaged UNet (fp16) and text encoder; equal weights give equal bytes."""
    tokenizer = CLIPTokenizer.from_pretrained(built / "tokenizer")
    denoiser, text = unet.build(tokenizer)
    average = torch.nn.ModuleList([denoiser, text])
    average.load_state_dict(torch.load(built / "unet.pt", weights_only=True)["modules"][2])
    _save(denoiser.half(), target / "unet", UNet2DConditionModel)
    _save(text, target / "text_encoder", CLIPTextModel)
    _save(AutoencoderKL.from_pretrained(built / "vae"), target / "vae", AutoencoderKL)
    unet.scheduler().save_pretrained(target / "scheduler")
    shutil.copytree(built / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(built / "oracle", target / "oracle", dirs_exist_ok=True)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.31.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(module: Any, folder: Path, kind: type) -> None:
    """Its config by the library, its weights by our writer (whose headers have a fixed order)."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "model.safetensors" if kind is CLIPTextModel else "diffusion_pytorch_model.safetensors"
    module.config.save_pretrained(folder) if kind is CLIPTextModel else module.save_config(folder)
    state = module.state_dict()
    if kind is CLIPTextModel:
        state = {keymap.published(name): tensor for name, tensor in state.items()}
    safetensors_io.write(folder / name, state, {"format": "pt"})


def measure(built: Path, n: int) -> dict[str, Any]:
    """Accuracy of the packaged model, in percent, over n held-out-template prompts, and of its oracle."""
    model = load("shapes", "cpu")
    assert model.settings.vocabulary is not None and model.settings.detector is not None
    detector = load_classifier(model.settings.detector)
    prompts = list(model.settings.vocabulary.prompts(model.settings.vocabulary.eval))
    prompts = [prompts[i % len(prompts)] for i in range(n)]
    began = time.perf_counter()
    sample_images(model, [p.text for p in prompts[:64]], [item_seed(9, "sample", i) for i in range(64)])
    seconds = time.perf_counter() - began
    images = sample_images(model, [p.text for p in prompts], [item_seed(0, "sample", i) for i in range(n)])
    detection = detector.detect_images(images)
    assert detection.valid is not None
    measured: dict[str, Any] = {"n": n, "seconds_for_64": round(seconds, 1), "overall": {}, "per_class": {}}
    for attribute, values in model.settings.vocabulary.attributes.items():
        wanted = np.array([values.index(p.labels[attribute]) for p in prompts])
        right = detection.shows(attribute, wanted)
        measured["overall"][attribute] = round(100 * float(right.mean()), 2)
        measured["per_class"].update(
            {v: round(100 * float(right[wanted == i].mean()), 1) for i, v in enumerate(values)}
        )
    measured["none"] = round(100 * float((~detection.valid).mean()), 2)
    measured["oracle"] = {
        k: round(v, 2) for k, v in oracle.judge(detector, AutoencoderKL.from_pretrained(built / "vae")).items()
    }
    stages = {
        name: torch.load(built / f"{name}.pt", weights_only=True)["seconds"] for name in ("vae", "oracle", "unet")
    }
    measured["training_seconds"] = {name: round(seconds) for name, seconds in stages.items()}
    return measured


def card(measured: dict[str, Any]) -> str:
    """The model card, its metrics from `measured`."""
    per_class = ", ".join(f"{name} {value}" for name, value in measured["per_class"].items())
    lines = [f"| {name} | {value} |" for name, value in measured["oracle"].items()]
    return CARD.read_text(encoding="utf-8").format(
        n=measured["n"],
        seconds=measured["seconds_for_64"],
        none=measured["none"],
        **measured["overall"],
        per_class=per_class,
        oracle="\n".join(lines),
        vae_minutes=round(measured["training_seconds"]["vae"] / 60),
        oracle_minutes=round(measured["training_seconds"]["oracle"] / 60),
        unet_minutes=round(measured["training_seconds"]["unet"] / 60),
        unet_steps=unet.STEPS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/shapes"))
    parser.add_argument("--target", type=Path, default=world.ASSETS)
    parser.add_argument("-n", type=int, default=1280)
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    assemble(arguments.folder, arguments.target)
    results = arguments.folder / "measured.json"
    if arguments.measure or not results.exists():
        results.write_text(json.dumps(measure(arguments.folder, arguments.n), indent=1) + "\n", encoding="utf-8")
    (arguments.target / "README.md").write_text(card(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
