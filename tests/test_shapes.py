"""The embedded model: small enough to ship, and good enough to judge an erasure on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from salun.checkpoints.locate import ASSETS
from salun.diffusion.data.latents import item_seed, sample_images, sample_latents
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import DataError
from salun.evaluation.detector import AttributeClassifier, load_detector

ORACLE = ASSETS / "shapes" / "oracle"


@pytest.fixture(scope="module")
def oracle() -> AttributeClassifier:
    return load_detector(ORACLE)


def test_all_its_weights_take_at_most_16_megabytes() -> None:
    assert sum(p.stat().st_size for p in (ASSETS / "shapes").rglob("*.safetensors")) <= 16_000_000


@pytest.mark.slow
def test_the_oracle_reads_held_out_drawings_and_reconstructions_and_knows_debris(oracle: AttributeClassifier) -> None:
    """Seed 1, which no training used; 600 each, so a percent is six pictures."""
    from diffusers import AutoencoderKL

    from tools.shapes.oracle import judge

    vae = AutoencoderKL.from_pretrained(ASSETS / "shapes" / "vae")
    found = judge(oracle, vae, n=600)
    for attribute in ("shape", "colour", "style"):
        assert found[f"drawn/{attribute}"] >= 99
        assert found[f"reconstructed/{attribute}"] >= 97
    assert found["not a picture"] >= 95


@pytest.mark.slow
def test_it_draws_what_it_is_asked(shapes: Model, oracle: AttributeClassifier) -> None:
    """160 of the 320 × 2 held-out prompts. The card gives the figures over more; here gross damage would show."""
    assert shapes.settings.vocabulary is not None
    prompts = list(shapes.settings.vocabulary.prompts(shapes.settings.vocabulary.eval))[::4]
    pictures = sample_images(
        shapes, [p.text for p in prompts], [item_seed(5, "sample", i) for i in range(len(prompts))]
    )
    reading = oracle.read(pictures)
    for attribute, values in oracle.attributes.items():
        asked = np.array([values.index(p.labels[attribute]) for p in prompts])
        assert (reading.labels[attribute] == asked).mean() >= 0.9, attribute


def test_a_sample_does_not_depend_on_its_batch(shapes: Model) -> None:
    prompts = ["one red circle, plain style", "blue star, night style", "the pink heart in sketch style"]
    together = sample_latents(shapes, prompts, [1, 2, 3])
    alone = sample_latents(shapes, prompts[1:2], [2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=1e-3)  # 12 guided steps of float32 rounding


def test_a_detector_that_does_not_fit_is_refused(tmp_path: object) -> None:
    from pathlib import Path
    from shutil import copytree

    folder = Path(copytree(ORACLE, Path(str(tmp_path)) / "oracle"))
    text = (folder / "detector.json").read_text(encoding="utf-8")
    (folder / "detector.json").write_text(text.replace('"circle",', ""), encoding="utf-8")
    with pytest.raises(DataError, match="detector"):
        load_detector(folder)
    with pytest.raises(DataError, match="nowhere"):
        load_detector(folder / "nowhere")
