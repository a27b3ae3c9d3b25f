"""Every detector on no images, and on images of one color: a defined score, from which no verdict follows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from salun.classification.models import Preprocessing, WeightFileInfo, new_model, save_model
from salun.detectors import DETECTORS
from salun.evaluation.calibration import Calibration
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import Detector, DetectorInputs, Samples, Subject, load_detector
from salun.evaluation.detectors import q16
from salun.evaluation.detectors.nudenet import NudeNet
from salun.evaluation.detectors.open_nsfw import OpenNsfw

from .test_detectors_clip import checker, classifier, examples, saved  # noqa: F401  # fixtures
from .test_detectors_onnx import network_output

CIRCLE, TENCH, NUDITY = (
    Subject("circle", "square", "shape", phrase="circle", anchor_phrase="square"),
    Subject("tench"),
    Subject("nudity", preset="nudity"),
)


def by_q16(folder: Path, inputs: DetectorInputs, monkeypatch: pytest.MonkeyPatch) -> Detector:
    """With learned prompts that fit the tiny CLIP."""
    content = bytes(q16.OFFSET) + np.random.default_rng(0).standard_normal((2, 16)).astype("<f2").tobytes()
    (folder / "prompts.p").write_bytes(content)
    monkeypatch.setattr(q16, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(q16, "SHAPE", (2, 16))
    return load_detector(f"q16:{folder / 'prompts.p'}", inputs)


def of_class(folder: Path) -> Path:
    """A classifier with random weights."""
    pixels = Preprocessing((0.5,), (0.25,), (16, 16))
    facts = WeightFileInfo("small", 1, ("tench", "goldfish"), "original", "of no data", pixels=pixels)
    save_model(folder / "model.safetensors", new_model("small", 1, 2, seed=0), facts)
    return folder


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Detector, Subject]:
    """The detector of the parameter, on tiny random weights where it has others, and a concept that it knows."""

    def with_clip(subject: Subject) -> DetectorInputs:
        return DetectorInputs([subject], clip=ClipModel(str(request.getfixturevalue("saved"))))

    def on_shapes() -> DetectorInputs:
        model = request.getfixturevalue("shapes")
        return DetectorInputs([CIRCLE], model.settings.detector, model)

    def folder(name: str) -> Path:
        path: Path = request.getfixturevalue(name)
        return path

    builders: dict[str, tuple[Subject, Callable[[], Any]]] = {
        "attribute": (CIRCLE, lambda: load_detector("attribute", on_shapes())),
        "self": (CIRCLE, lambda: load_detector("self", on_shapes())),
        "clip": (CIRCLE, lambda: load_detector("clip", with_clip(CIRCLE))),
        "images": (CIRCLE, lambda: load_detector(f"images:{folder('examples')}", with_clip(CIRCLE))),
        "imagenet": (TENCH, lambda: load_detector(f"imagenet:{folder('classifier')}", DetectorInputs([TENCH]))),
        "class": (TENCH, lambda: load_detector(f"class:{of_class(tmp_path)}", DetectorInputs([TENCH]))),
        "safety-checker": (
            NUDITY,
            lambda: load_detector(f"safety-checker:{folder('checker')}", DetectorInputs([NUDITY])),
        ),
        "q16": (NUDITY, lambda: by_q16(tmp_path, with_clip(NUDITY), monkeypatch)),
        "nudenet": (NUDITY, lambda: NudeNet("strict", lambda _: network_output())),
        "open-nsfw": (NUDITY, lambda: OpenNsfw(lambda batch: np.full((len(batch), 2), 0.5, np.float32))),
    }
    if request.param == "images":
        pytest.importorskip("sklearn")
    subject, build = builders[request.param]
    return build(), subject


@pytest.mark.parametrize("made", list(DETECTORS), indirect=True)
@pytest.mark.parametrize("color", [None, 0, 128, 255], ids=["none", "black", "gray", "white"])
def test_no_images_and_images_of_one_color_have_defined_scores(
    made: tuple[Detector, Subject],
    color: int | None,
    shapes: Any,
) -> None:
    detector, subject = made
    n = 0 if color is None else 3
    latents = torch.full((n, *shapes.latent_shape), (color or 0) / 128 - 1.0)
    detection = detector.detect(Samples(np.full((n, 64, 64, 3), color or 0, np.uint8), latents, ["a"] * n))
    for attribute, labels in detector.labels.items():
        scores = detection.scores[attribute]
        assert scores.shape == (n, len(labels)) and scores.dtype == np.float32 and not np.isnan(scores).any()
        assert np.allclose(scores, scores[:1], rtol=1e-4, atol=1e-5)
    target = detector.target(subject)
    assert target is not None
    scores = detection.scores[target.attribute][:, target.label]
    reason = Calibration.of_scores(scores, scores, detection.threshold).reason
    assert reason is not None and ("cannot tell" if n else "no images of the original") in reason
