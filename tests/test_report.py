"""The report: understood without the paper, honest when it did not work, and safe whatever the names hold."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from PIL import ImageFont

from salun.diffusion.result import Run
from salun.evaluation.detector import AttributeClassifier, Reading
from salun.evaluation.erasure import Asked, Sides, Target, judge
from salun.evaluation.metrics import Proportion, frechet_distance
from salun.report import charts, page, picture

ATTRIBUTES = {"shape": ["circle", "square", "star"], "colour": ["red", "blue"]}
EVIL = '<script>alert("1")</script>'


def reading(shape: list[int], colour: list[int]) -> Reading:
    features = np.random.default_rng(0).normal(size=(len(shape), 4)).astype(np.float32)
    return Reading({"shape": np.array(shape), "colour": np.array(colour)}, features)


def judged(forget_after: list[int], retain_after: list[int]) -> dict[str, Any]:
    n = len(forget_after)
    colours = [i % 2 for i in range(n)]
    retain = [1 + i % 2 for i in range(n)]
    asked = Asked(
        {"shape": np.zeros(n, int), "colour": np.array(colours)},
        {"shape": np.array(retain), "colour": np.array(colours)},
        [Target("circle", "shape", 0, 1, slice(0, n))],
    )
    before = Sides(reading([0] * n, colours), reading(retain, colours))
    after = Sides(reading(forget_after, colours), reading(retain_after, colours))
    detector = AttributeClassifier(ATTRIBUTES, 16, (8,))
    return {**judge(detector, asked, before, after), "anchor_gap": 0.03, "retain_change": 0.001}


def run_data(metrics: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "command": "salun erase --concept circle",
        "options": {"model": "shapes", "steps": 3, "seed": 0},
        "device": "cpu",
        "concepts": [{"name": "circle", "anchor": "square", "kind": "object", "sensitive": False}],
        "notes": [],
        "seed": 0,
        "versions": {"torch": "2"},
        "inputs": [{"kind": "unet", "path": "unet/x.safetensors", "bytes": 1234, "sha256": "ab" * 32}],
        "outputs": [],
        "timings": {"training": 1.5},
        "peak_memory": {"cpu_bytes": None, "device_bytes": None},
        "mask": {"mode": "saliency", "density": 0.5, "selected": 5, "total": 10, "warnings": []},
        "rounding": {"changed": 5, "lost_to_rounding": 1},
        "losses": [{"step": step, "forget": 0.5 / step, "retain": 0.1} for step in (1, 2, 3)],
        "metrics": metrics,
        **changes,
    }


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("</style>")[1]))


LAYERS = {"down_blocks.0.attentions.0.proj_in.weight": (3, 4), "conv_in.weight": (2, 6)}
WORKED = judged([1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 1, 2, 1, 2])
FAILED = judged([0, 0, 0, 0, 0, 1, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1])


def test_the_figures_are_counted_as_they_are_defined() -> None:
    """Of 8 forget pictures 5 still show the concept, 1 the anchor, 2 nothing; half of the other shapes are wrong."""
    assert FAILED["ua"]["value"] == 100 * 3 / 8
    assert FAILED["anchor"]["value"] == 100 * 1 / 8
    assert FAILED["none"]["value"] == 100 * 2 / 8
    assert FAILED["ua_before"]["value"] == 0
    assert FAILED["ra_before"]["value"] == 100
    assert FAILED["ra_after"] == {**FAILED["ra_after"], "value": 75.0, "n": 16}
    assert FAILED["ra_by_attribute"]["shape"]["after"]["value"] == 50
    assert FAILED["per_class"]["shape: star"]["after"]["value"] == 0
    assert "shape: circle" not in FAILED["per_class"]
    assert WORKED["ua"]["value"] == WORKED["anchor"]["value"] == WORKED["kept"]["all"]["value"] == 100


def test_success_is_told_in_a_sentence() -> None:
    text = text_of(page.render(run_data(WORKED), None, None, LAYERS))
    assert "The model forgot “circle”: asked for it, it now shows it in none of 8 pictures (before: 8)." in text
    assert "Everything else is as it was: 100.0 % right before, 100.0 % now." in text
    assert "5 of 10 weights (50.0 %)" in text


def test_failure_is_told_as_failure() -> None:
    text = text_of(page.render(run_data(FAILED), None, None, LAYERS))
    assert "did not forget “circle”" in text
    assert "Careful: 25 % of them are no proper pictures" in text
    assert "Everything else suffered: 100.0 % right before, 75.0 % now." in text


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    metrics = dict.fromkeys(("ua", "ra_before", "ra_after", "per_class", "anchor_gap", "retain_change"))
    html = page.render(run_data({**metrics, "reason": "no detector for 'cat'"}), None, None, LAYERS)
    text = text_of(html)
    assert "not known" in text
    assert "no detector for 'cat'" in text.replace("&#39;", "'")
    assert "retain accuracy" not in text


def test_a_control_is_no_erasure_to_publish() -> None:
    data = run_data(WORKED)
    data["mask"]["mode"] = "random"
    assert "the control “random”" in text_of(page.render(data, None, None, LAYERS))


def test_everything_shown_is_escaped_and_nothing_is_fetched() -> None:
    concept = {"name": EVIL, "anchor": EVIL, "kind": "object", "sensitive": False}
    figures = WORKED["per_concept"]["circle"]
    data = run_data(
        {**WORKED, "per_concept": {EVIL: figures, EVIL + "2": figures}},
        command=EVIL,
        concepts=[concept, {**concept, "name": EVIL + "2"}],
        device=EVIL,
        versions={EVIL: EVIL},
    )
    data["options"] = {"model": EVIL, "steps": 3, EVIL: EVIL}
    data["outputs"] = [{"kind": EVIL, "path": EVIL, "bytes": 1, "sha256": EVIL}]
    data["mask"]["warnings"] = [EVIL]
    data["losses"] = [{"step": step, EVIL: 0.5} for step in (1, 2)]
    data["notes"] = [EVIL]
    html = page.render(data, b"\x89PNG", b"\x89PNG", {EVIL: (1, 2)})
    assert "<script" not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
    assert "@import" not in html


def test_charts_hold_with_awkward_numbers() -> None:
    nothing: list[list[Any]] = [[], [{"step": 1, "a": 0.0}, {"step": 2, "a": 0.0}], [{"step": 1, "a": 1.0}]]
    nothing.append([[1, 0.5], {"a": 1.0}, {"step": "1", "a": 1.0}, {"step": 1, "a": float("nan"), "b": 10**400}])
    assert [charts.loss_curve(rows) for rows in nothing] == [""] * 4
    rows = [{"step": i, "a": a, EVIL: b} for i, (a, b) in enumerate([(1e-9, 5.0), (0.0, 5e3), (1.0, 0.0)])]
    curve = charts.loss_curve(rows)
    assert "nan" not in curve and "<script" not in curve
    assert curve.count("<polyline") == 4
    assert charts.block_of("mid_block.attentions.0.norm.bias") == "mid_block.attentions"
    assert "75% of 4" in charts.layer_bars(LAYERS)


def test_blurring_leaves_nothing_to_recognise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    sharp, soft = (picture.grid(noise, noise, ["x"], blur=blur)[8:136, 56:184] for blur in (False, True))
    assert np.abs(np.diff(sharp.astype(int), axis=0)).max() > 100
    assert np.abs(np.diff(soft.astype(int), axis=0)).max() <= 8


def test_long_captions_stay_inside() -> None:
    tiles = np.zeros((2, 64, 64, 3), np.uint8)
    plain = picture.grid(tiles, tiles, ["a", "b"])
    assert picture.grid(tiles, tiles, ["word " * 200, "x" * 500]).shape == plain.shape
    assert picture.sheet(tiles, 1, ["y" * 500, ""]).shape[2] == 3


def test_a_real_runs_report_is_small_and_complete(short_run: Run) -> None:
    html = short_run.report.html
    assert len(html) < 1_500_000
    assert html.count("data:image/png;base64,") == 2
    assert "one" in text_of(html)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)]
)
def test_intervals_are_wilsons(k: int, n: int, low: float, high: float) -> None:
    share = Proportion.of(np.arange(n) < k)
    assert (share.low, share.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_frechet_distance_of_known_gaussians() -> None:
    """Same covariance, means apart by (3, 4): 25. Standard deviations 1 against 2, one dimension each: (2−1)² each."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, 2))
    assert frechet_distance(a, a + [3, 4]) == pytest.approx(25)
    assert frechet_distance(a, 2 * a) == pytest.approx(np.var(a, axis=0, ddof=1).sum() + np.sum(a.mean(0) ** 2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_an_old_pillow_with_one_font_draws_captions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebUIs hold Pillow at 9.5, whose own font has one size and Latin letters alone."""
    old = ImageFont.load_default_imagefont()

    def load_default(**size: int) -> ImageFont.ImageFont:
        if size:
            raise TypeError("load_default() got an unexpected keyword argument 'size'")
        return old

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    plain = picture.grid(pictures, pictures, ["", ""])
    told = picture.grid(pictures, pictures, ["ein Kreis " * 20, "круг 円"])
    assert told.shape == plain.shape
    assert (told != plain).any()
