"""Detectors on any model: the original as classifier, what its word is worth, and the verdict that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import salun
from salun.diffusion.data.latents import item_seed, sample_latents
from salun.diffusion.evaluation import (
    EvalPrompts,
    Evaluation,
    eval_prompts,
    evaluate_model,
    evaluated_pair,
    metrics_of,
)
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import Plan, make_plan
from salun.errors import fill
from salun.evaluation.calibration import Calibration, adjusted, auc, fitting
from salun.evaluation.detector import Detection, DetectorInputs, Fitted, Samples, Subject, load_detector
from salun.evaluation.detectors.self_classifier import (
    ANY,
    FRACTIONS,
    UNFITTED,
    SelfClassifier,
    best_timesteps,
    scores_of,
)
from salun.evaluation.estimate import Estimate, Unknown
from salun.evaluation.metric import EvaluationPair, ExpectedConcept, ModelEvaluation, Predictions
from salun.evaluation.metrics.forgotten import mean
from salun.evaluation.metrics.prompt_asr import PROMPT_ASR
from salun.evaluation.retrain_verdict import verdict_on_classifier
from salun.evaluation.verdict import Outcome, verdict_on
from salun.progress import Event, Stage
from salun.randomness import generator_of

ASSETS = Path(salun.__file__).parent / "assets"


def rates(value: float, n: int = 100) -> np.ndarray:
    """n decisions, the first of which are True."""
    return np.arange(n) < round(value * n)


def calibration(detected: float = 1.0, false_alarms: float = 0.0, n: int = 100) -> Calibration:
    return Calibration(rates(detected, n), rates(false_alarms, n), 1.0)


def test_auc_is_the_fraction_of_ordered_pairs() -> None:
    generator = np.random.default_rng(0)
    positives, negatives = generator.integers(0, 9, 40), generator.integers(-3, 6, 30)
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(positives, negatives[:0]))


@pytest.mark.parametrize("proportion", [0.0, 0.1, 0.5, 1.0])
def test_corrected_rate_is_unbiased_on_mixtures_of_known_proportions(proportion: float) -> None:
    """A detector that misses 20 % and sees the concept in 10 % of other images, over 200 experiments of 500 images."""
    generator, values, raw, covered = np.random.default_rng(1), [], [], 0
    for _ in range(200):
        p_1, p_0 = generator.random(500) < 0.8, generator.random(500) < 0.1
        present = generator.random(500) < proportion
        detected = generator.random(500) < np.where(present, 0.8, 0.1)
        value = Calibration(p_1, p_0, 0.9).corrected(detected)
        assert isinstance(value, Estimate) and value.low is not None and value.high is not None
        values.append(value.value)
        raw.append(100 * (1 - detected.mean()))
        covered += value.low - 1e-6 <= 100 * (1 - proportion) <= value.high + 1e-6
    bias, raw_bias = (abs(np.mean(each) - 100 * (1 - proportion)) for each in (values, raw))
    assert bias < 0.7  # three standard errors, at most
    assert raw_bias > 4
    assert covered >= 0.9 * 200


@pytest.mark.parametrize("proportion", [0.0, 0.1, 0.5, 1.0])
def test_corrected_rate_is_unbiased_where_the_threshold_is_chosen(proportion: float) -> None:
    """Chosen on the images that are counted, it would find too little of the concept in all, too much in none."""
    generator = np.random.default_rng(2)
    values: dict[str, list[float]] = {"other images": [], "the same": []}
    for _ in range(300):
        positives, negatives = generator.normal(-1, 1, 100), generator.normal(-3.5, 1, 200)
        present = generator.random(500) < proportion
        judged = generator.normal(np.where(present, -1, -3.5), 1)
        made = Calibration.of_fitted(positives, negatives, 0.0)
        same = Calibration.of_scores(positives, negatives, 0.0, (positives, negatives))
        assert len(made.positives) == 76 and len(made.negatives) == 160 and made.threshold < -1
        for name, of in (("other images", made), ("the same", same)):
            value = of.corrected(judged >= of.threshold)
            assert isinstance(value, Estimate)
            values[name].append(value.value - 100 * (1 - proportion))
    bias, same_bias = (float(np.mean(each)) for each in values.values())
    assert abs(bias) < 3 * np.std(values["other images"]) / np.sqrt(300) < 1.2
    assert 0.1 <= proportion <= 0.5 or abs(same_bias) > 0.8


def test_corrected_ua_is_cut_off_only_where_it_is_reported() -> None:
    beyond, within = Estimate(104, 50, 98, 110), Estimate(90, 50, 84, 95)
    both, alone = mean([beyond, within]), mean([beyond])
    assert both.value == 97 and (alone.value, alone.low, alone.high) == (100, 98, 100)
    assert mean([Estimate(-3, 50, -9, 4)]).as_json()["low"] == 0


def test_adjusted_threshold_is_taken_where_it_separates_clearly_better() -> None:
    positives, negatives = np.linspace(-0.3, 0.1, 50), np.linspace(-2, -0.4, 80)
    given = Calibration.of_scores(positives, negatives, 0.0)
    chosen = Calibration.of_scores(positives, negatives, 0.0, (positives, negatives))
    assert given.positives.mean() == 0.26 and given.auc == chosen.auc == 1
    assert chosen.positives.all() and not chosen.negatives.any() and -0.4 < chosen.threshold < -0.3
    assert adjusted(positives + 0.3, negatives, 0.0) == adjusted(positives[:0], negatives, 0.0) == 0


@pytest.mark.parametrize("wrong", [calibration(0.3, 0.1), calibration(0.9, 0.8), Calibration(rates(1), rates(0), 0.7)])
def test_a_detector_that_cannot_tell_gives_no_number(wrong: Calibration) -> None:
    value = wrong.corrected(rates(0.5))
    assert isinstance(value, Unknown) and "cannot tell" in value.reason and "AUC" in value.reason


@pytest.mark.parametrize("n", [8, 16, 24])
def test_a_detector_fitted_on_noise_is_not_trusted(n: int) -> None:
    """Errors that say nothing: on the images that chose the timesteps they would separate the two kinds."""
    generator, trusted = torch.Generator().manual_seed(n), {"others": 0, "the same": 0}
    for _ in range(100):
        errors = [1 + torch.randn(m, 3, len(FRACTIONS), generator=generator) / 10 for m in (n, 2 * n)]
        on = [fitting(len(each)) for each in errors]
        fits = on[0].any() and on[1].any()
        chosen = best_timesteps(errors[0][on[0]], errors[1][on[1]], FRACTIONS) if fits else UNFITTED
        scores = [scores_of(each[:, :, [FRACTIONS.index(t) for t in chosen]])[:, 0].numpy() for each in errors]
        held_out = [each[~of] for each, of in zip(scores, on, strict=True)]
        for name, sides in (("others", held_out), ("the same", [s[o] for s, o in zip(scores, on, strict=True)])):
            choose = [each[of] for each, of in zip(scores, on, strict=True)]
            trusted[name] += Calibration.of_scores(*sides, 0.0, (choose[0], choose[1])).reason is None
    assert trusted["others"] <= 3
    assert n != 16 or trusted["the same"] > 10


def test_a_perfect_erasure_is_called_erased_on_each_models_own_number_of_images() -> None:
    families = yaml.safe_load((ASSETS / "models.yaml").read_text(encoding="utf-8"))["families"]
    for name, family in families.items():
        n = family["recipe"]["eval_images"]
        held_out = [np.ones((~fitting(n)).sum(), bool), np.zeros((~fitting(2 * n)).sum(), bool)]
        gone = Calibration(*held_out, 1.0).corrected(np.zeros(n, bool))
        assert verdict_on({"ua_corrected": gone.as_json()}).outcome is Outcome.ERASED, name


@pytest.fixture(scope="module")
def circles(shapes: Model) -> tuple[SelfClassifier, dict[str, Samples]]:
    """The original as classifier of circle against square, and 24 images each of four shapes."""
    subject = Subject("circle", "square", phrase="circle", anchor_phrase="square")
    detector = load_detector("self", DetectorInputs([subject], original=shapes))
    assert isinstance(detector, SelfClassifier)
    samples = {}
    for shape in ("circle", "square", "ring", "star"):
        texts = [f"drawing of one {colour} {shape}, plain style" for colour in ("red", "green", "blue")] * 8
        latents = sample_latents(shapes, texts, [item_seed(3, "sample", i) for i in range(24)])
        samples[shape] = Samples(np.zeros((24, 1, 1, 3), np.uint8), latents, texts, compare_prompts=True)
    return detector, samples


@pytest.mark.slow
def test_the_original_knows_the_concept_its_anchor_and_what_is_neither(
    circles: tuple[SelfClassifier, dict[str, Samples]],
) -> None:
    detector, samples = circles
    others = [samples[name] for name in ("square", "ring", "star")]
    absent = Samples(
        np.concatenate([of.images for of in others]),
        torch.cat([of.latents for of in others]),
        [text for of in others for text in of.prompts],
    )
    detector.fit({"circle": samples["circle"]}, absent)
    assert max(detector.timesteps["circle"]) <= 0.5 and detector.facts["timesteps"].startswith("circle: 0.")
    events: list[Event] = []
    seen = {name: detector.detect(of, events.append) for name, of in samples.items()}
    shown = {name: of.shows("circle", 0).mean() for name, of in seen.items()}
    assert shown["circle"] >= 0.9 and max(shown[name] for name in ("square", "ring", "star")) <= 0.1
    assert seen["square"].shows("circle", 1).mean() >= 0.9 and seen["star"].shows("circle", 1).mean() <= 0.1
    assert np.mean([of.shows("prompt", 0).mean() for of in seen.values()]) >= 0.9
    star, texts = samples["star"], samples["star"].prompts
    for word, other in (("star", "ring"), ("plain", "night"), ("red", "blue"), ("green", "red"), ("blue", "green")):
        wrong = [text.replace(word, other) for text in texts]
        altered = [before != after for before, after in zip(texts, wrong, strict=True)]
        assert detector.detect(replace(star, prompts=wrong)).shows("prompt", 0)[altered].mean() <= 0.15, word
    noise = Samples(
        samples["star"].images, torch.randn(24, *detector.model.latent_shape), samples["star"].prompts, True
    )
    assert detector.detect(noise).shows("prompt", 0).mean() <= 0.2
    counted = [event.step for event in events if event.stage is Stage.DETECTING]
    assert set(counted) == {24} and 4 <= len(counted) <= 8  # a second noise is no new image


@pytest.mark.slow
def test_a_second_noise_is_for_images_that_one_does_not_decide(
    circles: tuple[SelfClassifier, dict[str, Samples]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a pass in the range of scores that −ε could change; the decisions are those of both noises for all."""
    detector, samples = circles
    detector.fit({"circle": samples["circle"]}, Samples.cat([samples[name] for name in ("square", "ring", "star")]))
    passes: list[int] = []
    predict = detector.model.predict
    monkeypatch.setattr(detector.model, "predict", lambda x, *given: (passes.append(len(x)), predict(x, *given))[1])
    of, (low, high) = replace(samples["ring"], compare_prompts=False), detector.open["circle"]
    early = detector.detect(of).scores["circle"][:, 0]
    saved = sum(passes)
    monkeypatch.setitem(detector.open, "circle", ANY)
    both = detector.detect(of).scores["circle"][:, 0]
    assert saved < 1.5 * 3 * 24 < sum(passes) - saved == 2 * 3 * 24 * len(detector.timesteps["circle"])
    middle = (low + high) / 2
    assert ((early >= middle) == (both >= middle)).all() and (early != both).any()


@pytest.mark.slow
def test_the_original_tells_a_style_in_much_noise(shapes: Model) -> None:
    """Night is a dark background, which little noise does not hide from any prompt."""
    detector = SelfClassifier(shapes, [Subject("night", "plain", phrase="night", anchor_phrase="plain")])
    made = []
    for style in ("night", "plain", "dotted"):
        texts = [f"drawing of one {colour} star, {style} style" for colour in ("red", "green", "blue")] * 4
        latents = sample_latents(shapes, texts, [item_seed(4, "sample", i) for i in range(12)])
        made.append(Samples(np.zeros((12, 1, 1, 3), np.uint8), latents, texts))
    night, plain, dotted = made
    others = replace(plain, images=np.zeros((24, 1, 1, 3)), latents=torch.cat([plain.latents, dotted.latents]))
    detector.fit({"night": night}, replace(others, prompts=[*plain.prompts, *dotted.prompts]))
    assert min(detector.timesteps["night"]) >= 0.5
    shown = [detector.detect(of).shows("night", 0).mean() for of in made]
    assert shown[0] >= 0.9 and max(shown[1:]) <= 0.1


@pytest.mark.slow
def test_a_detection_does_not_depend_on_what_else_is_detected(
    circles: tuple[SelfClassifier, dict[str, Samples]],
) -> None:
    detector, samples = circles
    of = samples["circle"]
    part = Samples(of.images[3:8], of.latents[3:8], of.prompts[3:8])
    together, alone = detector.detect(of), detector.detect(part)
    np.testing.assert_allclose(together.scores["circle"][3:8], alone.scores["circle"], atol=1e-4)
    assert detector.detect(Samples(of.images[:0], of.latents[:0], ())).scores["circle"].shape == (0, 2)


def measured(ua: float | None, n: int = 64, before: float = 99.0, after: float = 98.5, **more: Any) -> dict[str, Any]:
    """Metrics as in `run.json`."""
    value = Estimate.percentage(rates(ua / 100, n)).as_json() if ua is not None else None
    sides = {
        "ra_before": Estimate(before, n, before - 3, before + 1),
        "ra_after": Estimate(after, n, after - 3, after + 1),
    }
    return {
        "ua_corrected": value,
        "reasons": {"ua_corrected": "why"},
        **{k: v.as_json() for k, v in sides.items()},
        **more,
    }


def lost(n: int, images: int) -> dict[str, Any]:
    """Metrics of n images of other prompts, of which some are no longer as prompted."""
    return {
        "ra_before": Estimate.percentage(rates(1, n)).as_json(),
        "ra_after": Estimate.percentage(rates(1 - images / n, n)).as_json(),
        "ra_drop": Estimate.mean(100.0 * (np.arange(n) < images)).as_json(),
    }


@pytest.mark.parametrize(
    ("metrics", "outcome", "says", "advice"),
    [
        (measured(100), Outcome.ERASED, "gone from 100.0 %", "Look at the images"),
        (measured(97), Outcome.ERASED, "gone from 96.9 %", "Look at the images"),
        (measured(100, n=9), Outcome.MOSTLY, "gone from 100.0 % (70.1–100.0, n = 9)", "--eval-images 32 or more"),
        (measured(80), Outcome.MOSTLY, "gone from 79.7 %", "Raise --steps or --lr"),
        (measured(80, method="uce"), Outcome.MOSTLY, "gone from 79.7 %", "Raise --uce-erase, or lower --uce-lambda"),
        (measured(3), Outcome.BARELY, "gone from 3.1 %", "Raise --steps or --lr"),
        (measured(3) | {"goal": "ua>=0.98"}, Outcome.BARELY, "gone from 3.1 %", "Use a stricter goal (--until)"),
        (measured(100, after=60), Outcome.DAMAGED, "in 60.0 %", "Lower --lr or --steps"),
        (measured(0, after=60), Outcome.DAMAGED, "gone from 0.0 %", "Lower --lr"),
        (measured(100, image_drift=Estimate(1.3, 64).as_json()), Outcome.DAMAGED, "drifted by 1.30", "Lower --lr"),
        (measured(100, after=60, method="uce"), Outcome.DAMAGED, "in 60.0 %", "or raise --uce-preserve"),
        (measured(None), Outcome.UNKNOWN, "is unknown: why", "Look at the images"),
        (measured(100, n=4), Outcome.UNKNOWN, "n = 4", "--eval-images 16 or more"),
        (measured(None, forget_change=Estimate(0.0004, 64).as_json()), Outcome.BARELY, "moved 2 % of the", "or --lr"),
        (measured(None, anchor_gap=Estimate(0.98, 64).as_json()), Outcome.BARELY, "moved 1 % of the way", "or --lr"),
        (measured(None, forget_change=Estimate(0.3, 64).as_json()), Outcome.UNKNOWN, "unknown: why", "Look at"),
        (measured(3, forget_change=Estimate(0.0025, 64).as_json()), Outcome.BARELY, "moved 5 % of the way", "or --lr"),
        (measured(100, **lost(16, 3)), Outcome.ERASED, "which may be chance", "--eval-images 128 or more"),
        (measured(100, **lost(64, 12)), Outcome.DAMAGED, "in 81.2 %", "Lower --lr"),
        (
            measured(100, image_diversity=Estimate(0.1, 64).as_json()),
            Outcome.DAMAGED,
            "lost 90 % of their",
            "Lower --lr",
        ),
        ({"reason": "no images", "cause": "no images"}, Outcome.UNKNOWN, "unknown: no images", "--eval-images 16"),
        ({"reason": "alone", "cause": "no original"}, Outcome.UNKNOWN, "unknown: alone", "original model (--against)"),
        (
            {"per_concept": {"cat": {"reasons": {"ua": "blind"}, "calibration": {"reason": "blind"}}}},
            Outcome.UNKNOWN,
            "is unknown",
            "use another --detector",
        ),
        (
            {"image_drift": Estimate(0.9, 64).as_json(), "reason": "no detector"},
            Outcome.DAMAGED,
            "drifted by 0.90",
            "Lower --lr",
        ),
        (
            {"per_concept": {"cat": measured(100), "dog": measured(10)}},
            Outcome.BARELY,
            "“dog” is gone from 9.4 %",
            "Raise --steps or --lr",
        ),
    ],
)
def test_verdict_says_what_happened_and_what_to_do(
    metrics: dict[str, Any], outcome: Outcome, says: str, advice: str
) -> None:
    verdict = verdict_on(metrics)
    assert verdict.outcome is outcome
    assert says in verdict.text
    assert advice in fill(verdict.advice, lambda name: "--" + name.replace("_", "-"))


def found_in(synonyms: float, neighbors: tuple[float, float]) -> dict[str, Any]:
    """As in `eval.json`: a complete erasure by the held-out prompts, and what further sets show, in percent."""

    def of(**shown: float) -> dict[str, Any]:
        return {side: Estimate.percentage(rates(value / 100, 64)).as_json() for side, value in shown.items()}

    rate = {**of(before=99, after=99), "calibrated": True, "corrected": of(before=100, after=synonyms)}
    sets = {
        "concept": {"shows": None, "preserve": False, "detected": {"self": {}}},
        "synonyms": {"shows": "cat", "preserve": False, "detected": {"self": {"cat": rate}}},
        "neighbors": {
            "shows": None,
            "preserve": True,
            "detected": {"self": {"as prompted": of(before=neighbors[0], after=neighbors[1])}},
        },
    }
    return {**measured(100), "sets": sets, "detectors": {"self": measured(100)}}


def test_further_sets_and_detectors_can_only_lower_a_verdict() -> None:
    fine = verdict_on(found_in(3, (98, 97)))
    assert (fine.outcome, fine.text) == (Outcome.ERASED, verdict_on(measured(100)).text)
    shown = verdict_on(found_in(90, (98, 97)))
    assert shown.outcome is Outcome.MOSTLY and "it shows in 91 % of the images of synonyms" in shown.text
    suffers = verdict_on(found_in(3, (98, 50)))
    assert suffers.outcome is Outcome.ERASED and "images of neighbors are as prompted in 50.0 %" in suffers.text
    assert "{lr}" in suffers.advice
    both = found_in(3, (98, 97))
    both["detectors"]["clip"] = measured(3)
    assert verdict_on(both).text.endswith("by the detector clip: barely changed")


def test_a_prompt_that_false_alarms_would_find_is_not_counted() -> None:
    """Twenty images of a prompt and 3 % false alarms: 46 % of all prompts would be found in a perfect erasure."""
    scores = {"cat": np.zeros((100, 1), np.float32)}
    known = {"cat": np.concatenate([np.ones((97, 1)), np.zeros((3, 1))]).astype(np.float32)}
    others = {"cat": 1 - known["cat"]}
    predictions = Predictions(*[torch.zeros(1)] * 3)
    sides = [ModelEvaluation(Detection(of, 0.5), Detection(others, 0.5), predictions) for of in (known, scores)]
    concept = ExpectedConcept("cat", "cat", 0, None, slice(0, 100))
    for each, value in ((20, Unknown), (1, Estimate)):
        prompts = [f"a cat {i // each}" for i in range(100)]
        pair = EvaluationPair([concept], {"cat": ["cat"]}, {}, {}, *sides, {}, prompts)
        assert isinstance(PROMPT_ASR.compute(pair), value)


def test_images_of_one_prompt_widen_the_interval() -> None:
    """Five hits, all of one prompt of five: one independent draw in five, not five in a hundred."""
    detected, known = rates(0.05), Calibration(rates(1), rates(0), 1.0)
    alone, together = known.corrected(detected), known.corrected(detected, np.arange(100) // 20)
    assert isinstance(alone, Estimate) and isinstance(together, Estimate) and alone.value == together.value
    assert alone.low and together.low and alone.low > 85 and together.low < 80


SQUARE = "drawing of one red square, plain style"


@pytest.mark.slow
def test_verdict_is_right_on_constructed_models(shapes: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched model; one that draws squares for circles, and all else as before; one that draws the same square
    for every prompt, so that the concept is gone and so is the rest; and a network that gives noise."""
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(seed=2, sampling_steps=4))
    prompts, encode = eval_prompts(plan, 32, 2), shapes.encode
    draws = {"erased": lambda prompt: prompt.replace("circle", "square"), "damaged": lambda prompt: prompt and SQUARE}
    noise = torch.randn(shapes.original()["conv_out.weight"].shape, generator=generator_of(0, "noise"))
    with shapes.temporarily_trainable(), shapes.configured(plan.options):
        before = evaluate_model(shapes, prompts, stage=Stage.IMAGES_BEFORE)
        after = {"untouched": before}
        for name, drawn in draws.items():
            with monkeypatch.context() as patch:
                patch.setattr(shapes, "encode", lambda texts, drawn=drawn: encode([drawn(text) for text in texts]))
                after[name] = evaluate_model(shapes, prompts)
        shapes.load({"conv_out.weight": noise})
        after["noise"] = evaluate_model(shapes, prompts)
        shapes.load(shapes.original())
        for detector in ("attribute", "self"):
            found = judged(shapes, plan, detector, prompts, before, after, monkeypatch)
            assert {name: of["verdict"]["outcome"] for name, of in found.items()} == {
                **{"untouched": "barely changed", "erased": "erased", "damaged": "damaged", "noise": "damaged"}
            }
            blind = {name: verdict_on({**of, "ra_before": None}).outcome for name, of in found.items()}
            assert blind["erased"] is Outcome.ERASED, "by a detector that knows no other prompts"
            assert blind["damaged"] is blind["noise"] is Outcome.DAMAGED
            gone = [Estimate(**found[name][key]) for name in ("erased", "damaged") for key in ("ua", "ua_corrected")]
            assert all(ua.n == 32 and ua.value >= 95 for ua in gone)  # that the concept is gone does not hide damage


def judged(
    model: Model,
    plan: Plan,
    name: str,
    prompts: EvalPrompts,
    before: Evaluation,
    after: Mapping[str, Evaluation],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, dict[str, Any]]:
    """The metrics of several models after, by a detector that is fitted once and sees each image once."""
    detector = load_detector(name, DetectorInputs(plan.subjects, model.settings.detector, model))
    detect, found = cache(detector.detect), {}
    monkeypatch.setattr(detector, "detect", lambda samples, _: detect(samples))
    for side, each in after.items():
        found[side] = metrics_of(detector, evaluated_pair(detector, plan, prompts, before, each), plan)
        if isinstance(detector, Fitted):
            monkeypatch.setattr(detector, "fit", lambda *_: None)  # the original's images are the same
    return found


def classifier(gap: float, idle: float, ta: float = 90.0, n: int = 500) -> dict[str, Any]:
    """Metrics of an unlearned classifier with these mean gaps to Retrain, whose accuracy on test images is 90 %.
    n: images of the forget set.
    """
    sides = {name: Estimate(value, 500, value - 2, value + 2).as_json() for name, value in (("TA", ta), ("RA", 99.0))}
    retrain = {**sides, "TA": Estimate(90, 500, 88, 92).as_json()}
    ua = Estimate.percentage(np.arange(n) % 2 == 0).as_json()
    gaps = {"gap_mean": gap, "gap_original": idle}
    return {**sides, "UA": ua, "MIA": ua, "original": {**sides, "UA": ua, "MIA": ua}, "retrain": retrain, **gaps}


@pytest.mark.parametrize(
    ("metrics", "outcome", "says"),
    [
        (classifier(1.2, 48), "erased", "1.20 points, that of the original, which forgot nothing, 48.00"),
        (classifier(20, 40), "mostly erased", ""),
        (classifier(35, 40), "barely changed", ""),
        (classifier(8.0, 0.2), "damaged", ""),
        (classifier(50, 48), "barely changed", ""),
        (classifier(9, 16, n=20), "can't tell", "16.00: too few images to tell (n = 20)"),
        (classifier(1, 48, n=20), "erased", ""),
        (classifier(0.4, 0.2), "can't tell", "there was nothing to forget"),
        (classifier(3, 48, ta=70), "damaged", "accuracy on test images is 70.0 %, of Retrain 90.0 %"),
        ({**classifier(0, 0), "gap_mean": None, "reason": "no Retrain"}, "can't tell", "unknown: no Retrain"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdict_on_a_classifier_is_against_doing_nothing_and_retrain(
    metrics: dict[str, Any], outcome: str, says: str
) -> None:
    verdict = verdict_on_classifier(metrics)
    assert verdict.outcome == outcome and says in verdict.text and verdict.advice
