"""A campaign of damaged and hostile model folders: every JSON and YAML file of a diffusers folder and a classifier.

Each case changes one file: values of a wrong type, far too large, nested, deleted or added; texts that are no JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from .campaign import Findings, in_child

SETTINGS: dict[str, Any] = {
    "schema": 1,
    "sampling": {"steps": 2, "guidance": 3.0, "resolution": 32},
    "recipe": {"steps": 2, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 2},
    "detector": "oracle",
    "vocabulary": {
        "attributes": {"shape": ["circle", "square"], "style": ["plain", "sketch"]},
        "templates": {"train": ["one {style} {shape}", "a {shape}, {style}"], "eval": ["drawing, {shape}, {style}"]},
        "anchors": {"circle": "square"},
    },
}
VALUES: list[Any] = [
    None, True, "", "x", "../..", "/etc/passwd", "a\x00b", "x" * 50_000, "{0.__class__}", "{shape:1000000000}", [], {},
    [[1]], {"a": {"b": 1}}, 0, -1, 1, 3, 7, 10**6, 10**9, 10**18, 10**400, 0.5, 1e308, float("inf"), float("nan"),
    [10**9], [1] * 50_000, [["x"]], "flash_attention_2", "someone/kernels",
]  # fmt: skip
ADDED: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "attn_implementation": "someone/kernels",
    "_attn_implementation": "flash_attention_2",
    "trained_betas": [0.5] * 7,
    "backbone": "resnet50",
    "num_hidden_layers": 10**9,
    "layers_per_block": 10**7,
    "added_tokens_decoder": {"999999999": {"content": "x"}},
    "_class_name": ["evil", "Pipeline"],
    "num_labels": 10**9,
    "__proto__": {},
}
TEXTS = [b"", b"{", b"[" * 20_000, b"null", b"[1, 2]", b"\xff\xfe\x00", b"1" * 6_000, b'{"a": "\\ud800"}', b'"text"']


def mutated(values: Any, dice: random.Random) -> Any:
    """The values with one of them replaced, removed or added."""
    at, key = values, None
    while isinstance(at, dict | list) and at and (key is None or dice.random() < 0.8):
        parent = at
        key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
        at = at[key]
    if key is None:
        return dice.choice(VALUES)
    way = dice.random()
    if way < 0.15:
        del parent[key]
    elif way < 0.3 and isinstance(values, dict):
        name = dice.choice(list(ADDED))
        values[name] = ADDED[name]
    elif way < 0.4:
        for _ in range(dice.choice([10, 300, 900])):
            at = [at]
        parent[key] = at
    else:
        parent[key] = dice.choice(VALUES)
    return values


def damage(path: Path, dice: random.Random, secret: Path) -> None:
    """Change one file of a model."""
    way = dice.random()
    if way < 0.12:
        path.write_bytes(dice.choice(TEXTS))
    elif way < 0.16:
        content = path.read_bytes()
        path.write_bytes(content[: dice.randrange(len(content))])
    elif way < 0.2:
        path.unlink()
        path.symlink_to(dice.choice([secret, Path("/dev/zero")]))
    elif way < 0.22 and hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
    else:
        values = mutated(json.loads(path.read_text(encoding="utf-8")), dice)
        path.write_text(json.dumps(values), encoding="utf-8")


def diffusion_folder(folder: Path) -> Path:
    """A tiny SD 1 model with a vocabulary and a detector."""
    from salun.evaluation.detectors.attribute import AttributeClassifier

    from .test_families import make

    make(folder, "StableDiffusionPipeline", "epsilon", torch.float32)
    AttributeClassifier({"shape": ["circle", "square"], "style": ["plain", "sketch"]}, 32, (8, 8)).save(
        folder / "oracle"
    )
    (folder / "salun.yaml").write_text(json.dumps(SETTINGS), encoding="utf-8")  # JSON is YAML
    return folder


def classifier_folder(folder: Path) -> Path:
    """A tiny Vision Transformer with an image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def diffusion_actions(folder: Path) -> dict[str, Callable[[], object]]:
    import salun
    from salun.diagnostics.inspect import inspect
    from salun.diffusion.estimate import preview
    from salun.diffusion.model.loading import describe

    options = salun.EraseOptions(device="cpu")
    run = folder.parent / "run"
    return {
        "describe": lambda: describe(str(folder)),
        "inspect": lambda: inspect(str(folder)),
        "preview": lambda: preview(str(folder), salun.Concept("circle"), options, [], run),
    }


def classifier_actions(folder: Path) -> dict[str, Callable[[], object]]:
    from salun.classification.models import new_model, stock_model

    def forward() -> None:
        model, _ = stock_model(str(folder))
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, 8, 8))

    return {"classify": forward, "body": lambda: new_model(str(folder), 3, 4, 0)}


def attack(folder: Path, numbers: Iterable[int]) -> Findings:
    """The campaign's cases; see `in_child`."""
    findings = Findings(folder)
    secret = folder / "secret"
    secret.write_text(json.dumps({"password": "hunter2"}), encoding="utf-8")
    pristine = [
        (diffusion_folder(folder / "diffusion"), diffusion_actions),
        (classifier_folder(folder / "classifier"), classifier_actions),
    ]
    for made, actions in pristine:
        for name, action in actions(made).items():
            findings.time(name, action)
    for number in numbers:
        dice = random.Random(number)
        made, actions = pristine[number % 4 == 0]
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(made, case)
        files = sorted(path for path in case.rglob("*") if path.suffix in (".json", ".yaml"))
        damage(dice.choice(files), dice, secret)
        for name, action in actions(case).items():
            findings.attempt(number, name, action)
    return findings


CASES = 56


@pytest.mark.slow
def test_hostile_model_folders_end_in_a_result_or_one_line(tmp_path: Path) -> None:
    found = in_child("tests.test_campaign_models", tmp_path, CASES)
    for name in ("describe", "inspect", "preview"):
        assert 2 <= found["accepted"][name] <= 0.75 * CASES - 2, found["accepted"]
    for name in ("classify", "body"):
        assert 1 <= found["accepted"][name] <= 0.25 * CASES - 1, found["accepted"]
