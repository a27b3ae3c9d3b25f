"""Every command announces its stages, with the steps that it then counts and the passes that they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import salun
from salun.classification.compare import compare as compare_classifiers
from salun.classification.experiment import train, unlearn
from salun.classification.stages import LATER
from salun.delta import commands as deltas
from salun.diffusion.attack import attack
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.compare import compare
from salun.diffusion.compare_options import CompareOptions
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.evaluate import evaluate
from salun.diffusion.masks import make_mask
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.stages import erasure_stages, evaluation_stages
from salun.diffusion.train import train_class_model
from salun.diffusion.train_options import ClassTrainOptions
from salun.errors import Cancelled
from salun.evaluation.calibration import fitting
from salun.methods import METHODS
from salun.progress import Event, Stage
from salun.runs.cache import Cache
from salun.time_left import UNFINISHED, TimeLeft

FEW: dict[str, Any] = {"steps": 2, "batch_size": 2, "forget_latents": 4, "retain_latents": 2, "sampling_steps": 2}


def counted(events: Sequence[Event]) -> list[tuple[str, int, int]]:
    """Of each announced stage its name, the steps that were announced, and those that were counted."""
    announced = next(list(event.stages) for event in events if event.stages)
    steps, last = Counter[int](), dict[int, int]()
    follow = TimeLeft()
    for event in events:
        number = follow.at(event).number
        if number and event.total:
            before = last.get(number, 0)
            steps[number] += event.step - (before if event.step >= before else 0)
            last[number] = event.step
    return [(cost.stage.value, cost.steps, steps[i]) for i, cost in enumerate(announced, 1)]


def as_announced(events: Sequence[Event]) -> list[str]:
    """The stages, all of whose steps were counted."""
    stages = counted(events)
    assert [made for _, _, made in stages] == [steps for _, steps, _ in stages], stages
    return [stage for stage, _, _ in stages]


def test_an_erasure_takes_the_passes_that_it_announces(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the calibration of the detector `self`, and a cache that has no other test's latents."""
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path))
    rows, passes, announced = [0], Counter[Stage](), list[salun.Event]()
    predict = shapes.predict

    def counting(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows[0] += len(x_t)
        return predict(x_t, t, conditioning)

    def progress(event: Event, /) -> None:
        announced.append(event)
        if not event.message:
            passes[event.stage] += rows[0]
            rows[0] = 0

    monkeypatch.setattr(shapes, "predict", counting)
    salun.erase(shapes, "circle", detector="self", eval_images=16, progress=progress, **FEW)
    stages = as_announced(announced)
    assert stages == ["sampling", "images before", "saliency", "frozen targets", "training", "images after",
                      "calibrating", "detecting"]  # fmt: skip
    planned = {cost.stage: cost.forward + cost.backward for cost in announced[0].stages}
    calibrating, detecting = (planned.pop(stage) for stage in (Stage.CALIBRATING, Stage.DETECTING))
    assert {stage: passes[stage] for stage in planned} == planned
    all_of_them = 3 * (fitting(16).sum() + fitting(32).sum())
    assert passes[Stage.CALIBRATING] in (calibrating, calibrating + all_of_them), "one timestep is chosen, or two"
    assert detecting / 2 < passes[Stage.DETECTING] < 2 * detecting, "it depends on the chosen timesteps"


def test_an_erasure_to_a_goal_announces_its_probes(shapes: Model) -> None:
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(detector="self"))
    stages = {cost.stage: cost for cost in erasure_stages(plan)}
    names = [cost.stage for cost in erasure_stages(plan)]
    assert names[names.index(Stage.CALIBRATING) :] == [
        Stage.CALIBRATING, Stage.TRAINING, Stage.IMAGES_AFTER, Stage.CALIBRATING, Stage.DETECTING
    ]  # fmt: skip
    assert stages[Stage.TRAINING].most == plan.budget > stages[Stage.TRAINING].steps


def test_an_evaluation_announces_each_detector_and_counts_all_its_prompts(shapes: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(
        "".join(f"drawing of one {x}, plain style\n" for x in ("red circle", "blue star", "green square")),
        encoding="utf-8",
    )
    events: list[Event] = []
    options = EvalOptions(
        against="shapes", concept=["circle"], n=2, sampling_steps=1, sampling_guidance=1.0,
        detector=["attribute", "self"], prompts=[str(tmp_path / "mine.txt")], device="cpu",
    )  # fmt: skip
    evaluate("shapes", options, events.append)
    assert as_announced(events) == ["images before", "images after", "detecting"]
    assert counted(events)[0][1:] == (9, 9) and counted(events)[2][1] == 2 * (9 + 7)
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions())
    twice = evaluation_stages(plan, ["clip", "self"], 16, 16, 100, compared=True)
    assert [cost.stage.value for cost in twice[2:]] == ["detecting", "calibrating", "detecting"]
    alone = evaluation_stages(plan, ["clip"], 16, 16, 0, compared=False)
    assert [(cost.stage.value, cost.steps) for cost in alone] == [("images after", 32), ("detecting", 32)]


@pytest.mark.slow
def test_attacks_are_announced_and_finished_ones_take_no_time(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path))
    options = AttackOptions(n=8, images=2, sampling_steps=8, attack=["quantize", "seeds+tries=2"], control=True)
    for _ in range(2):
        events: list[Event] = []
        attack(str(run_folder), options, events.append)
        assert as_announced(events)[-2:] == ["sampling", "attacking"]
    assert events[-1].restored > 0


@pytest.mark.parametrize("mask", ["saliency", "saliency-ratio"])
def test_a_mask_announces_the_samples_and_passes_that_it_takes(
    mask: str, shapes: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of several concepts and batches; the ratio needs the whole training set, and passes of its own."""
    events, rows, predict = list[Event](), list[int](), shapes.predict

    def counting(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(x_t))
        return predict(x_t, t, conditioning)

    monkeypatch.setattr(shapes, "predict", counting)
    options = EraseOptions(mask=mask, combine="union", **FEW)
    found = make_mask(shapes, ["circle", "night"], options, events.append, Cache(tmp_path))
    assert as_announced(events) == ["sampling", "saliency"]
    assert events[0].stages[0].steps == (18 if mask == "saliency-ratio" else 8)
    assert sum(cost.forward + cost.backward for cost in events[0].stages) == sum(rows)
    assert found.mode == mask and found.mask.density >= 0.5


def test_a_comparison_announces_all_of_its_jobs_and_counts_them(shapes: Model, tmp_path: Path) -> None:
    """Images of the original that a job takes from an earlier one cost it nothing."""
    events: list[Event] = []
    options = CompareOptions(concept=["circle"], methods=["salun", "esd"], seeds=1, eval_images=2, device="cpu", **FEW)
    compare(options, model=shapes, progress=events.append, run_dir=tmp_path / "run", cache=Cache(tmp_path / "cache"))
    (announced,) = (event.stages for event in events if event.stages)
    made = {(event.job, event.stage): event.step for event in events if event.total}
    assert {(cost.job, cost.stage): cost.steps for cost in announced}.items() <= made.items()
    first, second = (cost.forward for cost in announced if cost.stage is Stage.IMAGES_BEFORE)
    assert first > second == 0
    follow = TimeLeft()
    positions = [follow.at(event) for event in events]
    assert [(p.number, p.count) for p in positions][1:] == [(event.job, 2) for event in events][1:]
    assert positions[-1].fraction == UNFINISHED and positions[-1].left == (0, 0)


def test_a_training_of_a_class_conditional_model_announces_its_samples(tmp_path: Path) -> None:
    """Those on the way are part of the training; a resumed training gives no time left before it continues."""
    events: list[Event] = []
    options = ClassTrainOptions(
        steps=4, batch_size=8, width=8, widths="1,2", attention="1", samples_every=2, save_every=0
    )

    def stop_once(event: Event) -> None:
        events.append(event)
        if event.image is not None and not events[0].resumed:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        train_class_model(options, tmp_path, progress=stop_once)
    events.clear()
    model = train_class_model(options, tmp_path, resume=True, progress=stop_once).model
    assert as_announced(events) == ["training", "saving", "sampling"] and events[0].resumed
    training, _, sampling = events[0].stages
    assert (sampling.steps, sampling.forward) == (10 * 8, 10 * 8 * model.settings.sampling.passes)
    assert (training.backward, training.forward) == (4 * 8, 2 * sampling.forward)


def test_unlearning_in_a_classifier_announces_its_trainings() -> None:
    events: list[Event] = []
    with torch.random.fork_rng():
        unlearn(progress=events.append, train_epochs=1, epochs=1, relearn=2, device="cpu", retrain="yes", seed=71)
    assert [stage for stage, _, made in counted(events) if made] == [
        "training", "saliency", "unlearning", "relearning", "retraining", "relearning"
    ]  # fmt: skip
    assert all(steps == made for stage, steps, made in counted(events) if stage in ("training", "retraining"))


def test_training_a_classifier_announces_that_it_is_evaluated(tmp_path: Path) -> None:
    events: list[Event] = []
    train(progress=events.append, train_epochs=1, device="cpu", cache=Cache(tmp_path))
    assert as_announced(events) == ["training", "evaluating"]


def test_a_comparison_of_classifiers_announces_its_jobs_and_the_values_of_its_search(tmp_path: Path) -> None:
    """Results that are there already take no time."""
    events: list[Event] = []
    options: dict[str, Any] = {"methods": ["ft"], "seeds": 2, "search_seeds": 1, "train_epochs": 1, "epochs": 1}
    options |= {"device": "cpu", "workers": 1, "cache": Cache(tmp_path / "cache"), "run_dir": tmp_path / "run"}

    def stop(event: Event) -> None:
        events.append(event)
        if event.stage is Stage.UNLEARNING and event.step:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        compare_classifiers(progress=stop, **options)
    (retraining, searching), tried = counted(events)[:2], max(e.step for e in events if e.stage is Stage.SEARCHING)
    assert retraining == ("retraining", 4, 4), "two for each seed, one of them for the noise floor"
    assert searching[1] == len(METHODS["classification"]["ft"].factors) <= tried <= searching[1] + LATER
    events.clear()
    compare_classifiers(progress=events.append, resume=True, **options)
    restored = {event.stage: event.restored for event in events if event.total}
    assert restored == {Stage.RETRAINING: 4, Stage.SEARCHING: tried, Stage.UNLEARNING: 1}


def test_an_applied_delta_announces_that_it_is_checked_and_written(run_folder: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    delta = str(run_folder / "delta.salun.safetensors")
    deltas.apply("shapes", delta, str(tmp_path / "model") + "/", progress=events.append)
    assert as_announced(events) == ["checking", "writing"]
