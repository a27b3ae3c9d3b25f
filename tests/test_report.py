"""Metrics of an erasure and the report: correct, honest about failure, and safe whatever the names hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import ImageFont

from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.eval_output import report as evaluation_page
from salun.diffusion.eval_sets import rate_json
from salun.diffusion.evaluate import EvalResult
from salun.diffusion.result import Run
from salun.evaluation.calibration import Calibration
from salun.evaluation.detector import Detection
from salun.evaluation.estimate import Estimate, Unknown
from salun.evaluation.further_sets import CONCEPT, OTHERS
from salun.evaluation.metric import EvaluationPair, ExpectedConcept, Metric, ModelEvaluation, Predictions
from salun.evaluation.metrics.frechet import frechet_distance
from salun.evaluation.registry import METRICS, measure
from salun.report import charts, classification, image_grid, page
from salun.report.density import block_of
from salun.report.metrics import headline, metric_lines, metric_rows, verdict_lines
from salun.report.render import ImagePair, loss_series

LABELS = {"shape": ["circle", "square", "star"], "colour": ["red", "blue"]}
EVIL = '<script>alert("1")</script>'
NOTHING = Detection({}, 0.0)
PIXEL = image_grid.png_bytes(np.zeros((8, 8, 3), np.uint8))


def detection(shape: list[int], colour: list[int]) -> Detection:
    """Labels by index; −1 for an invalid image."""
    features = np.random.default_rng(0).normal(size=(len(shape), 4)).astype(np.float32)
    scores = {
        name: np.where(np.arange(len(LABELS[name])) == np.array(labels)[:, None], 1.0, -1.0)
        for name, labels in (("shape", shape), ("colour", colour))
    }
    valid = np.array(shape) >= 0
    return Detection({name: np.where(valid[:, None], s, -np.inf) for name, s in scores.items()}, 0.0, valid, features)


def predictions(forget: float, retain: float = 1.0) -> Predictions:
    """Of constant values; the anchor's is 0."""
    return Predictions(*(torch.full((8, 1, 2, 2), value) for value in (forget, 0.0, retain)))


def pair(forget_after: list[int], retain_after: list[int], **changes: Any) -> EvaluationPair:
    n = len(forget_after)
    colours = [i % 2 for i in range(n)]
    retain = [1 + i % 2 for i in range(n)]
    sides: dict[str, Any] = {
        "concepts": [ExpectedConcept("circle", "shape", 0, 1, slice(0, n))],
        "labels": LABELS,
        "expected_forget": {"shape": np.zeros(n, int), "colour": np.array(colours)},
        "expected_retain": {"shape": np.array(retain), "colour": np.array(colours)},
        "before": ModelEvaluation(detection([0] * n, colours), detection(retain, colours), predictions(1.0)),
        "after": ModelEvaluation(
            detection(forget_after, colours), detection(retain_after, colours), predictions(0.5, 1.1)
        ),
        "unknown": {},
        "forget_prompts": [f"prompt {i % 4}" for i in range(n)],
    }
    return EvaluationPair(**{**sides, **changes})


def unknown(reason: str) -> dict[str, Any]:
    nothing = ModelEvaluation(NOTHING, NOTHING, predictions(1.0))
    return measure(EvaluationPair([], {}, {}, {}, nothing, nothing, {"detections": reason}))


def run_data(metrics: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "command": "salun erase --concept circle",
        "options": {"model": "shapes", "steps": 3, "seed": 0},
        "device": "cpu",
        "facts": {},
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
WORKED = measure(pair([1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 1, 2, 1, 2]))
FAILED = measure(pair([0, 0, 0, 0, 0, 1, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1]))


def html_of(run: dict[str, Any], layers: dict[str, tuple[int, int]] | None = None, image: bytes | None = None) -> str:
    pairs = [ImagePair(EVIL, {"before": image, "after": image})] if image is not None else []
    return page.run_page(run, pairs, pairs, layers or LAYERS).html


def test_metrics_are_counted_as_defined() -> None:
    """Of 8 forget images 5 still show the concept, 1 the anchor, 2 are invalid; half of the other shapes are wrong."""
    assert FAILED["ua"]["value"] == 100 * 3 / 8
    assert FAILED["anchor"]["value"] == 100 * 1 / 8
    assert FAILED["unclassified"]["value"] == 100 * 2 / 8
    assert FAILED["preserved"]["value"] == FAILED["preserved_by_attribute"]["colour"]["after"]["value"] == 75
    assert FAILED["ua_before"]["value"] == 0
    assert FAILED["ra_before"]["value"] == 100
    assert FAILED["ra_after"] == {**FAILED["ra_after"], "value": 75.0, "n": 16}
    assert FAILED["ra_by_attribute"]["shape"]["after"]["value"] == 50
    assert FAILED["per_class"]["shape: star"]["after"]["value"] == 0
    assert "shape: circle" not in FAILED["per_class"]
    assert WORKED["ua"]["value"] == WORKED["anchor"]["value"] == WORKED["preserved"]["value"] == 100
    assert WORKED["anchor_gap"]["value"] == pytest.approx(0.25) and WORKED["anchor_gap_before"]["value"] == 1
    assert WORKED["retain_change"]["value"] == pytest.approx(0.01) and WORKED["retain_change_before"]["value"] == 0
    assert WORKED["per_concept"]["circle"]["ua"] == WORKED["ua"]


def test_a_prompt_shows_the_concept_if_any_of_its_images_does() -> None:
    assert WORKED["prompt_asr"]["value"] == 0 and WORKED["prompt_asr_before"]["value"] == 100
    assert FAILED["prompt_asr"]["n"] == 4 and FAILED["prompt_asr"]["value"] == 100
    assert measure(pair([0, 1, 1, 1, 1, 1, 1, 1], [1] * 8))["prompt_asr"]["value"] == 25
    assert measure(pair([1] * 8, [1] * 8, forget_prompts=[]))["reasons"]["prompt_asr"] == "the prompts are not recorded"


def test_what_cannot_be_measured_is_null_with_its_reason() -> None:
    """The empty prompt as anchor, a detector without features or validity, one attribute only, and no detector."""
    concept = ExpectedConcept("circle", "shape", 0, None, slice(0, 8))
    plain = Detection({"shape": np.zeros((8, 3))}, 0.0)
    side = ModelEvaluation(plain, plain, predictions(1.0))
    expected = {"shape": np.ones(8, int)}
    sides = {"before": side, "after": side, "expected_forget": expected, "expected_retain": expected}
    found = measure(pair([1] * 8, [1] * 8, concepts=[concept], labels={"shape": LABELS["shape"]}, **sides))
    without = {"anchor", "preserved", "unclassified", "frechet", "image_drift", "image_diversity"}
    assert {key for key in found["reasons"] if found[key] is None} == {*without, "ua", "ua_corrected", "prompt_asr"}
    assert "the concept is detected in 100 % of the images of its prompts" in found["reasons"]["ua"]
    assert found["preserved_by_attribute"] == {}
    found = unknown("no detector covers 'cat'")
    assert (found["ua"], found["ra_before"], found["per_class"]) == (None, None, None)
    assert found["reason"] == found["reasons"]["ua"] == "no detector covers 'cat'"
    assert found["anchor_gap"]["value"] == 1


def test_a_new_metric_is_measured_and_shown_without_other_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from salun.report import metrics as shown

    def half(pair: EvaluationPair) -> Estimate:
        """Half."""
        return Estimate(50.0, 2, 1.0, 99.0)

    added = Metric("new", "New one", "higher", "%", half, per_concept=True)
    measured = measure(pair([1] * 8, [1] * 8), [*METRICS, added])
    assert measured["new"] == measured["new_before"] == {"value": 50.0, "n": 2, "low": 1.0, "high": 99.0}
    monkeypatch.setattr(shown, "SINGLE", [*shown.SINGLE, added])
    assert ("New one ↑", "50.0 % (1.0–99.0, n = 2)", "50.0 % (1.0–99.0, n = 2)", "Half.") in metric_rows(measured)
    assert any(line.startswith("New one:") for line in metric_lines(measured))
    assert "New one" in html_of(run_data(measured))


def test_registries_import_no_torch() -> None:
    program = "import sys, salun.evaluation.registry, salun.evaluation.detector, salun.attacks"
    subprocess.run(
        [sys.executable, "-c", f"{program}, salun.report.metrics; assert 'torch' not in sys.modules"], check=True
    )


def test_lines_name_each_concept_and_unknown_metrics() -> None:
    lines = metric_lines({**FAILED, "per_concept": {"a": FAILED["per_concept"]["circle"], "b": {}}})
    assert lines[0].startswith("Damaged: Images of other prompts are as prompted in 75.0 %")
    assert lines[1] == "Next: Lower lr or steps, or raise retain_weight."
    assert lines[2].startswith("Forgotten (UA):") and lines[2].endswith("37.5 % (13.7–69.4, n = 8), before 0.0")
    assert "a:" in lines and "b:" in lines
    assert any(re.match(r"Unknown: Forgotten \(UA\), .* \(why\)", line) for line in metric_lines(unknown("why")))
    json.dumps(FAILED, allow_nan=False)


def test_the_headline_says_success_and_failure() -> None:
    text = text_of(html_of(run_data(WORKED)))
    assert "Mostly erased “circle” is gone from 100.0 %" in text and "Next: Use eval_images 32 or more" in text
    assert "None of 8 images of prompts of “circle” show it (before: 8)." in text
    assert "5 of 10 weights (50.0%)" in text
    text = text_of(html_of(run_data(FAILED)))
    assert "Damaged Images of other prompts are as prompted in 75.0 %" in text
    assert "5 of 8 images of prompts of “circle” show it (before: 8)." in text
    assert "Warning: 25 % of the images are no longer valid" in text


def test_unknown_metrics_are_reported_as_unknown() -> None:
    metrics = {**unknown("no detector covers 'cat'"), "forget_change": None, "anchor_gap": None}
    text = text_of(html_of(run_data(metrics))).replace("&#39;", "'")
    assert "Can't tell Whether the concept is gone is unknown: no detector covers 'cat'." in text
    assert "Unknown: Forgotten (UA)" in text and "Retain accuracy by class" not in text
    assert headline([{"name": "cat"}], {}) == []
    assert verdict_lines({}) == [
        "Can't tell: Whether the concept is gone is unknown: it was not measured.",
        "Next: Look at the images.",
    ]


def test_a_control_mask_is_marked() -> None:
    data = run_data(WORKED)
    data["mask"]["mode"] = "random"
    assert "the control mask “random”" in text_of(html_of(data))


def test_the_way_to_a_goal_shows_each_concept_what_attacks_do_and_what_is_kept() -> None:
    data = run_data(WORKED)
    look = {"step": 40, "strength": 1.0, "n": 64, "ua": 0.97, "anchor": None, "confidence": 0.9, "drift": 0.01}
    look |= {"ra_drop": None, "asr": 0.25, "concepts": [0.97, 0.995], "anchors": [None, None], "decides": True}
    data["until"] = {
        "goal": "ua>=0.9, asr<=0.3", "reached": True, "steps": 40, "budget": 120, "every": 10, "step": 40, "lr": 1e-3,
        "lr_factor": 0.5, "target_guidance": 0.5, "retain_factor": 1.0, "strength": 0.85,
        "probes": [look, {**look, "strength": 0.85, "drift": None, "decides": False}],
    }  # fmt: skip
    text = text_of(html_of(data))
    assert (
        "was reached after 40 of at most 120 steps, at a learning rate of 0.0005, η of the target rose by 0.5." in text
    )
    assert "97.0 % (97.0, 99.5)" in text and "25.0 % kept" in " ".join(text.split())
    assert "ASR" in text and "the retain loss's weight" not in text.replace("&#39;", "'")


def test_everything_shown_is_escaped_and_nothing_is_fetched() -> None:
    concept = {"name": EVIL, "anchor": EVIL, "kind": "object", "sensitive": False}
    found = WORKED["per_concept"]["circle"]
    data = run_data(
        {
            **WORKED,
            "per_concept": {EVIL: found, EVIL + "2": found},
            "reasons": {"ua": EVIL},
            "ua": None,
            "detector": dict.fromkeys(("name", "version", "sha256", "unit"), EVIL) | {"threshold": 0.5},
        },
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
    data["losses"] = [{"step": 1, EVIL: 0.5}, {"step": 2, EVIL: 0.25}]
    html = html_of(data, {EVIL: (1, 2)}, b"\x89PNG")
    assert "<script" not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
    assert "@import" not in html


# -- pages on a phone -------------------------------------------------------------------------------------------------

WORD = "unbreakable" * 14  # wider than a phone
FOLDER = "/srv/models/" + WORD


def long_report() -> str:
    """The page of an erasure with long names, prompts, paths and notes."""
    outputs = [
        {"kind": kind, "path": f"{FOLDER}/{kind}", "bytes": 10, "sha256": "ab" * 32} for kind in ("checkpoint", "lora")
    ]
    detector = {"name": f"clip:{WORD}", "version": WORD, "sha256": "ab" * 32, "threshold": 0.5, "unit": WORD}
    run = run_data(
        {**WORKED, "detector": detector, "reasons": {"ua": WORD}},
        concepts=[{"name": WORD, "anchor": WORD}],
        notes=[WORD],
        command=f"salun erase --model {FOLDER}",
        device=WORD,
        outputs=outputs,
        facts={WORD: WORD},
    )
    run["options"] |= {"model": FOLDER, WORD: WORD}
    run["inputs"][0]["path"] = FOLDER
    pairs = [ImagePair(WORD, {"before": PIXEL, "after": PIXEL})]
    return page.run_page(run, pairs, pairs, {f"{WORD}.weight": (1, 2)}, blurred=True, inside=[f"{FOLDER}/lora"]).html


def long_evaluation() -> str:
    """The page of `salun eval`, likewise, with two detectors."""
    detectors = {f"images:{WORD}": WORKED, f"nudenet:mace:{WORD}.onnx": WORKED}
    blind = Calibration(np.zeros(8, bool), np.zeros(8, bool), 0.5)
    hits = {"before": np.ones(8, bool), "after": np.zeros(8, bool)}
    metric = {"value": None, "reason": WORD, "implementation": WORD, "weights": WORD}
    found = {
        "n": 8,
        "preserve": False,
        "detected": {name: {WORD: rate_json(hits, of)} for name, of in zip(detectors, (None, blind), strict=True)},
        "image_drift": None,
        "image_metrics": {f"fid:{WORD}": {"between": metric}},
    }
    facts = {"model": {"name": WORD, "weights": "ab" * 32, "parts": "ab" * 32}}
    data = {
        **WORKED,
        "concepts": [{"name": WORD, "anchor": WORD}],
        "models": facts,
        "sets": {f"{WORD}.csv": found},
        "inputs": [{"path": FOLDER, "sha256": "ab" * 32}],
        "notes": [WORD],
    }
    options = EvalOptions(concept=[WORD], prompts=[FOLDER], detector=list(detectors), metric=[f"fid:{FOLDER}"])
    asked = {**asdict(options), "target": FOLDER, "against": FOLDER}
    record = run_data({}, options=asked, command=f"salun eval {FOLDER}", facts={WORD: WORD})
    image = SimpleNamespace(images=[np.zeros((8, 8, 3), np.uint8)])
    sets = [
        SimpleNamespace(
            prompts=SimpleNamespace(name=name, rows=[SimpleNamespace(text=WORD)]),
            images={"before": image, "after": image},
        )
        for name in (CONCEPT, OTHERS, f"{WORD}.csv")
    ]
    shown = [SimpleNamespace(sensitive=False)]
    result = SimpleNamespace(
        options=options,
        metrics=detectors,
        sets=sets,
        plan=SimpleNamespace(concepts=shown, options=SimpleNamespace(show_sensitive=False)),
        record=SimpleNamespace(as_json=lambda: record),
        compared=SimpleNamespace(facts=facts),
    )
    return evaluation_page(cast(EvalResult, result), data).html


def long_classification() -> str:
    """The page of an unlearned classifier, likewise."""
    value = Estimate.percentage(np.arange(100) < 90).as_json()
    counts = [[90, 10], [0, 100]]
    side: dict[str, Any] = {
        **dict.fromkeys(("UA", "RA", "TA", "MIA"), value),
        "mia_features": {WORD: value},
        "RTE": {"value": 1.0},
        "confusion": {"forget": counts, "test": counts},
    }
    gaps = {"gap": dict.fromkeys(("UA", "RA", "TA", "MIA"), 1.0), "gap_mean": 1.0, "gap_original": 40.0}
    options = dict.fromkeys(("forget", "data", "method", "batchnorm"), WORD) | {"model": FOLDER}
    run = run_data({**side, **gaps, "original": side, "retrain": side}, options=options, device=WORD, notes=[WORD])
    run["losses"] = [{"epoch": i, WORD: 1.0} for i in (1, 2)]
    return classification.run_page({**run, "command": f"salun {FOLDER}"}, {WORD: (1, 2)}, [WORD, "cat"]).html


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(tmp_path: Path) -> None:
    """At 390 pixels; tables and commands may scroll within the page. Everything that is folded is opened."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for made in (long_report, long_evaluation, long_classification):
            opened = browser.new_page(viewport={"width": 390, "height": 800})
            opened.set_content(made())
            assert opened.evaluate(WIDE) == [], made.__name__
        browser.close()


WIDE = """() => {
    document.querySelectorAll('details').forEach((each) => { each.open = true; });
    const overflows = (each, style) => each.clientWidth && each.scrollWidth > each.clientWidth + 1
        && style.overflowX === 'visible' && style.display !== 'inline';
    const outside = (each) => each.getBoundingClientRect().right > window.innerWidth + 1
        || overflows(each, getComputedStyle(each));
    return [...document.querySelectorAll('html, body, body *')]
        .filter((each) => !each.parentElement?.closest('.scroll, pre, svg') && outside(each))
        .map((each) => `${each.tagName} ${each.className}: ${each.textContent.trim().slice(0, 60)}`);
}"""


def test_charts_hold_with_awkward_numbers() -> None:
    def curve(history: list[Any]) -> str:
        return charts.curves(loss_series(history), "step", "loss", log=True)

    def rows(*pairs: tuple[float, float]) -> list[Any]:
        return [{"step": i, "a": a, EVIL: b} for i, (a, b) in enumerate(pairs)]

    assert curve([]) == curve(rows((0.0, 0.0), (0.0, 0.0))) == ""
    assert curve([[1, 0.5], {"a": 1.0}, {"step": "1", "a": 1.0}, {"step": 1, "a": float("nan"), "b": 10**400}]) == ""
    odd = curve(rows((1e-9, 5.0), (0.0, 5e3), (1.0, 0.0)))
    assert "nan" not in odd and "<script" not in odd
    assert curve(rows(*((1.0, 2.0 + i) for i in range(30)))).count("<polyline") == 4
    assert block_of("mid_block.attentions.0.norm.bias") == "mid_block.attentions"
    assert "75.0% of 4" in charts.bars(LAYERS)
    ticks = re.findall(r'text-anchor="end">([^<]*)', curve(rows(*((0.03 * (i + 1), 0.0) for i in range(5)))))
    assert ticks == ["0.05", "0.1"]  # within a decade


def test_loss_series_takes_any_names() -> None:
    named = [{"step": 1, "erase": 0.5}, {"step": 2, "erase": 0.25, "pool": None}]
    assert loss_series(named) == {"erase": [(1.0, 0.5), (2.0, 0.25)]}


def test_blurred_images_have_no_detail() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    sharp, soft = (image_grid.grid(noise, noise, ["x"], blur=blur)[8:136, 56:184] for blur in (False, True))
    assert np.abs(np.diff(sharp.astype(int), axis=0)).max() > 100
    assert np.abs(np.diff(soft.astype(int), axis=0)).max() <= 8


def test_long_captions_are_cut() -> None:
    tiles = np.zeros((2, 64, 64, 3), np.uint8)
    plain = image_grid.grid(tiles, tiles, ["a", "b"])
    assert image_grid.grid(tiles, tiles, ["word " * 200, "x" * 500]).shape == plain.shape
    assert image_grid.sheet(tiles, 1, ["y" * 500, ""]).shape[2] == 3


def test_report_of_a_run_is_small_and_complete(short_run: Run) -> None:
    html = short_run.report.html
    assert len(html) < 1_500_000
    assert html.count("data:image/jpeg;base64,") == 4 * min(8, short_run.prompts.each)
    assert "one" in text_of(html)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)]
)
def test_percentage_has_wilsons_interval(k: int, n: int, low: float, high: float) -> None:
    found = Estimate.percentage(np.arange(n) < k)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert Unknown("why").as_json() is None


def test_images_of_one_prompt_that_agree_count_as_one() -> None:
    prompts = np.repeat(np.arange(20), 10)
    of_prompts = Estimate.percentage(np.arange(20) < 8)
    dependent = Estimate.percentage(np.repeat(np.arange(20) < 8, 10), prompts)
    assert (dependent.value, dependent.n) == (40.0, 200)
    assert dependent.half_width == pytest.approx(of_prompts.half_width, rel=0.03)
    independent = np.tile(np.arange(10) < 4, 20)  # of each prompt as many as in all
    assert Estimate.percentage(independent, prompts) == Estimate.percentage(independent)


def test_frechet_distance_of_known_gaussians() -> None:
    """Same covariance, means apart by (3, 4): 25. Standard deviations 1 against 2, one dimension each: (2−1)² each."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, 2))
    assert frechet_distance(a, a + [3, 4]) == pytest.approx(25)
    assert frechet_distance(a, 2 * a) == pytest.approx(np.var(a, axis=0, ddof=1).sum() + np.sum(a.mean(0) ** 2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_captions_are_drawn_by_an_old_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebUIs hold Pillow at 9.5, whose own font has one size and Latin letters alone."""
    old = ImageFont.load_default_imagefont()

    def load_default(**size: int) -> ImageFont.ImageFont:
        if size:
            raise TypeError("load_default() got an unexpected keyword argument 'size'")
        return old

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    plain = image_grid.grid(images, images, ["", ""])
    captioned = image_grid.grid(images, images, ["ein Kreis " * 20, "круг 円"])
    assert captioned.shape == plain.shape
    assert (captioned != plain).any()
