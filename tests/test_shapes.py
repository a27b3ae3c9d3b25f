"""The bundled model: small enough to ship, and good enough to evaluate an erasure on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from salun.checkpoints.locate import ASSETS
from salun.diffusion.data.latents import item_seed, sample_images, sample_latents
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import ConfigError, DataError
from salun.evaluation.detector import DetectorInputs, Subject, Target, load_detector
from salun.evaluation.detectors.attribute import AttributeClassifier, load_classifier
from tools.shapes import comfyui as widening

ORACLE = ASSETS / "shapes" / "oracle"


@pytest.fixture(scope="module")
def oracle() -> AttributeClassifier:
    return load_classifier(ORACLE)


def test_all_its_weights_take_at_most_16_megabytes() -> None:
    assert sum(p.stat().st_size for p in (ASSETS / "shapes").rglob("*.safetensors")) <= 16_000_000


@pytest.mark.slow
def test_the_oracle_reads_held_out_drawings_and_reconstructions_and_knows_debris(oracle: AttributeClassifier) -> None:
    """Seed 1, which no training used; 300 each, so a percent is three pictures."""
    from diffusers import AutoencoderKL

    from tools.shapes.oracle import judge

    vae = AutoencoderKL.from_pretrained(ASSETS / "shapes" / "vae")
    found = judge(oracle, vae, n=300)
    for attribute in ("shape", "colour", "style"):
        assert found[f"drawn/{attribute}"] >= 99
        assert found[f"reconstructed/{attribute}"] >= 97
    assert found["not a picture"] >= 95


@pytest.mark.slow
def test_it_draws_what_it_is_asked(shapes: Model, oracle: AttributeClassifier) -> None:
    """92 of the 320 × 2 held-out prompts. The card gives the figures over more; here gross damage would show."""
    assert shapes.settings.vocabulary is not None
    prompts = list(shapes.settings.vocabulary.prompts(shapes.settings.vocabulary.eval))[::7]
    images = sample_images(shapes, [p.text for p in prompts], [item_seed(5, "sample", i) for i in range(len(prompts))])
    detection = oracle.detect_images(images)
    for attribute, labels in oracle.labels.items():
        expected = np.array([labels.index(p.labels[attribute]) for p in prompts])
        assert detection.shows(attribute, expected).mean() >= 0.9, attribute


def test_detect_finds_the_largest_logit_of_each_attribute_in_valid_images(oracle: AttributeClassifier) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    images[::2] //= 8
    with torch.no_grad():
        logits = oracle(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    valid = logits["picture"].argmax(1).numpy() == 1
    detection = oracle.detect_images(images, batch_size=16)
    assert detection.valid is not None and np.array_equal(detection.valid, valid)
    for attribute, labels in oracle.labels.items():
        shown = np.stack([detection.shows(attribute, i) for i in range(len(labels))], axis=1)
        assert np.array_equal(shown.any(1), valid)
        assert np.array_equal(shown.argmax(1)[valid], logits[attribute].argmax(1).numpy()[valid])
    assert not detection.shows("shape", -1).any()


def test_load_detector_gives_one_that_covers_every_concept() -> None:
    night, circle = Subject("night", "plain", "style"), Subject("circle", "square", "shape")
    chosen = load_detector("attribute", DetectorInputs([circle, night], ORACLE))
    assert chosen.name == "attribute" and len(chosen.sha256) == 64
    assert chosen.target(circle) == Target("shape", 0, 1)
    for subject, folder in ((Subject("dog", None, "shape"), ORACLE), (Subject("circle"), ORACLE), (circle, None)):
        with pytest.raises(ConfigError, match=r"cannot detect '(dog|circle)' in images of this model"):
            load_detector("attribute", DetectorInputs([subject], folder))
    with pytest.raises(ConfigError, match="detector is 'x', but must be one of attribute, self"):
        load_detector("x", DetectorInputs([circle], ORACLE))
    with pytest.raises(ConfigError, match="detector is 'self:x', but self takes no argument"):
        load_detector("self:x", DetectorInputs([circle], ORACLE))


def test_a_sample_does_not_depend_on_its_batch(shapes: Model) -> None:
    prompts = ["one red circle, plain style", "blue star, night style", "the pink heart in sketch style"]
    together = sample_latents(shapes, prompts, [1, 2, 3])
    alone = sample_latents(shapes, prompts[1:2], [2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=1e-3)  # 12 guided steps of float32 rounding


def test_load_classifier_rejects_files_that_do_not_fit(tmp_path: object) -> None:
    from pathlib import Path
    from shutil import copytree

    folder = Path(copytree(ORACLE, Path(str(tmp_path)) / "oracle"))
    text = (folder / "detector.json").read_text(encoding="utf-8")
    (folder / "detector.json").write_text(text.replace('"circle",', ""), encoding="utf-8")
    with pytest.raises(DataError, match="detector"):
        load_classifier(folder)
    with pytest.raises(DataError, match="nowhere"):
        load_classifier(folder / "nowhere")


@pytest.mark.parametrize(
    ("layout", "groups", "differing"),
    [
        (widening.LOW, 16, 0),
        (widening.HIGH, 16, 0),
        (widening.joined(widening.HIGH, widening.HIGH), 16, 0),
        (widening.joined(widening.LOW, widening.LOW), 16, 0),
        (widening.joined(widening.HIGH, widening.LOW_IN_THREES), 16, 12),
        (widening.INSIDE[64], 1, 0),
        (widening.grouped(48, 512, [*range(8)] * 4), 8, 0),
        (widening.grouped(64, 512, [*[None] * 16, *range(8), *range(8)]), 8, 0),
    ],
)
def test_a_norm_of_a_widened_tensor_is_that_of_the_original(
    layout: widening.Layout, groups: int, differing: int
) -> None:
    """The checkpoint for ComfyUI: its norms have 32 groups (a layer norm 1), with the original's statistics."""
    channels = layout.write.shape[1]
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    wide = torch.einsum("Oo,boyx->bOyx", layout.write, x)
    normed = torch.einsum("Oo,boyx->bOyx", layout.read, F.group_norm(wide, 1 if groups == 1 else 32))
    apart = (normed - F.group_norm(x, groups)).abs().amax((0, 2, 3))
    assert int((apart > 1e-9).sum()) == differing
