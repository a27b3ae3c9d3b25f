"""Erasing towards a goal: what is decided from probes, and that a run stops, resumes and tells of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import salun
from salun.diffusion import probe
from salun.diffusion.decisions import BACK, HEAVIER, RESTARTS, Decision, Phase, decide
from salun.diffusion.goal import HIGHEST, SURE, Goal, Probed, Seen
from salun.diffusion.losses import Draw
from salun.diffusion.methods import salun as salun_method
from salun.diffusion.model.loading import describe
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.probe_detector import probability_below
from salun.diffusion.until import Probe, Until, kept_step, kept_strength, losses_of, without_earlier
from salun.errors import Cancelled, ConfigError, TrainingError
from salun.masking.earlier import EarlierWeights
from salun.masking.mask import Mask
from salun.masking.rate import TIMES, first_order_rate
from salun.masking.training import Trained, TrainingSettings, train
from salun.masking.training_state import StateFile
from salun.progress import Event, Stage, silent

GOAL = Goal(ua=0.9, retain_drift=0.02)
EVERY, BUDGET = 10, 300
C, S, R, G = Phase.CONTINUE, Phase.SETTLE, Phase.REACHED, Phase.GIVE_UP


def seen(ua: float) -> Seen:
    """The goal for UA is sure where it is exceeded, and plausible where it is nearly reached."""
    return Seen(48, ua, 0.9 if ua > 0.9 else 0.5 if ua > 0.8 else 0.0)


class Fake:
    """A probe of known results, at every step and strength."""

    def __init__(self, at: Callable[[int, float], Probed]) -> None:
        self.at = at

    def __call__(self, step: int, *, thorough: bool, drift: bool, grown: bool) -> Probed:
        return self.at(step, 1.0)

    def again(self, step: int, strength: float, *, harm: bool) -> Probed:
        return self.at(step, strength)

    def moved(self, *, harmed: bool) -> list[float]:
        return [0.0, 3.0, 0.0]


def trained_with(probe: Probe, goal: Goal = GOAL, budget: int = BUDGET) -> tuple[Until, list[dict[str, float]]]:
    """What a training with these probes comes to."""
    until = Until(goal, EVERY, budget, probe, nullcontext, lr=1e-3)
    history: list[dict[str, float]] = []
    kept: list[int] = []
    until.write = lambda _, step: kept.append(step)
    while not until.stops(history):
        until.before(history)
        history.append({"step": len(history) + 1, "forget": 0.5})
        until.after(history)
        until.keep(history, {})
    assert kept_step(history) in (len(history), *kept[-1:]), "what is taken at the end is what was kept last"
    return until, history


def after(*found: tuple[float, float | None]) -> Decision:
    """The decision after probes of these UA and drifts, each taken when the last decision says."""
    probes: list[Probed] = []
    for ua, drift in found:
        now = decide(GOAL, probes, EVERY, BUDGET)
        probes.append(Probed(now.start + now.length, (seen(ua),), drift))
    return decide(GOAL, probes, EVERY, BUDGET)


def test_a_goal_is_read_and_written() -> None:
    assert Goal.parse("ua >= 0.9") == Goal(0.9, Goal().retain_drift)
    assert Goal.parse("") == Goal()
    for goal in (GOAL, Goal(anchor=0.0), Goal(asr=0.1), Goal(anchor=0.0, asr=0.1)):
        assert Goal.parse(str(goal)) == goal
    esd = make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(until="ua>=0.9", method="esd")).goal
    assert esd == Goal(0.9, anchor=0.0), "it does not train towards the anchor"
    one = Goal.parse("ua>=0.9, ua[night sky] >= 0.5")
    assert (one.of("night sky"), one.of("circle")) == (0.5, 0.9) and Goal.parse(str(one)) == one
    with pytest.raises(ConfigError, match=r"until has ua\[red\], but erased is 'circle'"):
        make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(until="ua[red]>=0.9"))
    shown = Goal.parse("ua>=0.9, anchor[red]>=0.5, anchor>=0.8")
    assert (shown.anchor_for("red"), shown.anchor_for("circle")) == (0.5, 0.8) and Goal.parse(str(shown)) == shown
    with pytest.raises(ConfigError, match=r"until has anchor\[red\], but erased is 'circle'"):
        make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(until="anchor[red]>=0.9"))
    listed = Goal.parse("ua>=0.9, ua[a cat, a dog]>=0.5")
    assert listed.of("a cat, a dog") == 0.5
    for given, problem in (
        ("ua>=0.9, ua>=0.1", "has ua twice"),
        ("ua>=0.999", "has ua>=0.999, but the images of a probe can show 0.993 at most"),
        ("retain_drift<=0", "every change of the model moves some image"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Goal.parse(given)
    for wrong in ("ua<=0.9", "ua[]>=0.9", "ua>=90", "speed>=1", "ua>=nan", "ua>=0.9 retain_drift<=1"):
        with pytest.raises(
            ConfigError, match=r"until has .* but takes ua>=FRACTION and anchor>=FRACTION, .* and asr<=FRACTION"
        ):
            Goal.parse(wrong)


def test_a_training_that_gets_worse_ends_with_the_weights_that_came_nearest() -> None:
    """Harm of 2, 3 and 4 times what the goal allows after steps 40, 70 and 100: two tries in vain."""
    harms = {10: 0.1, 40: 0.04, 70: 0.06, 100: 0.08}
    until, history = trained_with(Fake(lambda step, s: Probed(step, (seen(0.95 if s == 1 else 0.5),), harms[step], s)))
    assert (len(history), kept_step(history), kept_strength(history)) == (100, 40, 1.0)
    assert "of which those after step 40 came nearest to it: UA 95.0 %" in until.summary(history)
    assert not until.reached(history) and until.as_json(history)["step"] == 40


def test_earlier_weights_are_those_of_their_training_and_step(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3), "b": torch.randn(2)}
    file = tmp_path / "earlier.safetensors"
    EarlierWeights(file, "this").write(weights, 10)
    resumed = EarlierWeights(file, "this").read(weights, 10)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    for wrong in (
        lambda: EarlierWeights(file, "another").read(weights, 10),
        lambda: EarlierWeights(file, "this").read(weights, 20),
        lambda: EarlierWeights(file, "this").read({"a": weights["a"]}, 10),
    ):
        with pytest.raises(TrainingError, match="does not hold weights of this training"):
            wrong()
    EarlierWeights(file, "this").write({"a": torch.tensor([float("nan")])}, 10)
    with pytest.raises(TrainingError, match="not finite"):
        EarlierWeights(file, "this").read({"a": torch.zeros(1)}, 10)
    alone = EarlierWeights(None)
    alone.write(weights, 10)
    weights["a"] += 1
    assert not torch.equal(alone.read(weights, 10)["a"], weights["a"]), "a copy"


def test_weights_that_withstand_attacks_are_nearer_to_a_goal_that_asks_for_that() -> None:
    goal, ua = replace(GOAL, asr=0.1), (seen(0.95),)
    attacked, hardened = (Probed(step, ua, 0.01, asr=asr) for step, asr in ((40, 0.6), (70, 0.12)))
    assert attacked.nearness(goal) < hardened.nearness(goal) and attacked.nearness(GOAL) == hardened.nearness(GOAL)


def test_earlier_weights_that_are_lost_leave_the_last_ones_whole() -> None:
    harms = {10: 0.1, 40: 0.04, 70: 0.06, 100: 0.08}
    until, history = trained_with(Fake(lambda step, s: Probed(step, (seen(0.95 if s == 1 else 0.5),), harms[step], s)))
    history[-1] = without_earlier(history[-1])
    assert (kept_step(history), kept_strength(history), until.chosen(history).drift) == (100, 1.0, 0.08)
    assert "after step 40 came nearer to it, but could not be read again" in until.summary(history)


def test_the_images_of_a_probe_show_the_highest_goal_and_no_more() -> None:
    assert probability_below(1 - HIGHEST, 0, probe.MANY) >= SURE > probability_below(0.999 - HIGHEST, 0, probe.MANY)


def test_a_few_steps_are_all_taken_at_a_falling_rate() -> None:
    first = decide(GOAL, [], EVERY, 12)
    assert (first.phase, first.length) == (S, 12), "the phase in which the rate falls to 0"
    until, history = trained_with(Fake(lambda step, s: Probed(step, (seen(0.7),), 0.01, s)), budget=12)
    assert len(history) == 12 and not until.reached(history)


def test_a_method_whose_target_cannot_move_gets_a_higher_rate_instead() -> None:
    probes = [Probed(10 * i, (seen(0.5),), 0.0) for i in range(1, 6)]
    moves, stays = (decide(GOAL, probes, EVERY, BUDGET, guided) for guided in (True, False))
    assert (moves.factor, moves.guidance > 0) == (1, True)
    assert (stays.factor, stays.guidance) == (3, 0)


@pytest.mark.parametrize(
    ("found", "phase", "start", "length", "factor"),
    [
        ([], C, 0, 10, 1),
        ([(0.2, None), (0.5, 0.1)], C, 20, 10, 1),
        ([(0.85, 0.1)], S, 10, 30, 1),
        ([(k / 10, None) for k in range(8)] + [(0.85, 0.1)], S, 90, 45, 1),
        ([(0.95, 0.1), (0.95, 0.02)], R, 40, 30, 1),
        ([(0.95, 0.1), (0.7, 0.02)], C, 40, 10, 1),
        ([(0.95, 0.1), (0.95, 0.04)], S, 40, 30, 1 / 2),
        ([(0.95, 0.1), (0.95, 0.04), (0.95, 0.02)], R, 70, 30, 1 / 2),
        ([(0.95, 0.1), (0.95, 0.04), (0.95, 0.039)], S, 70, 30, 1 / 4),
        ([(0.95, 0.1), (0.95, 0.04), (0.95, 0.039), (0.95, 0.038)], G, 100, 30, 1 / 4),
        ([(0.95, 0.1), (0.95, 0.08), (0.95, 0.06), (0.95, 0.05), (0.95, 0.04), (0.95, 0.03)], G, 160, 30, 1 / 16),
        ([(0.0, None), (0.0, 0.0)], C, 20, 10, 3),
        ([(0.0, None), (0.0, 0.0), (0.0, None), (0.1, 0.0)], C, 40, 10, 9),
        ([(0.4, None), (0.5, 0.1), (0.5, None), (0.4, 0.1)], C, 40, 10, 1),
        ([(0.9, 0.7)], C, 10, 10, 1 / 4),
        ([(0.9, 0.7)] * 4, G, 40, 0, 1 / 64),
    ],
    ids=str,
)
def test_probes_decide_what_comes_next(
    found: list[tuple[float, float | None]], phase: Phase, start: int, length: int, factor: float
) -> None:
    decision = after(*found)
    assert (decision.phase, decision.start, decision.factor) == (phase, start, factor)
    assert phase in (R, G) or decision.length == length
    assert decision.restart is (found[-1:] == [(0.9, 0.7)] and phase is C)
    guided = found in ([(0.95, 0.1), (0.7, 0.02)], [(0.4, None), (0.5, 0.1), (0.5, None), (0.4, 0.1)])
    assert (decision.guidance > 0) is guided is decision.grown


def test_the_budget_is_kept_and_ends_with_a_falling_rate() -> None:
    decision = after(*[(0.5, None)] * 20)
    assert decision.phase is Phase.SETTLE and decision.start + decision.length == BUDGET
    assert after(*[(0.5, None)] * 20, (0.6, 0.0)).phase is Phase.GIVE_UP


def test_of_several_concepts_the_worst_decides_and_the_others_are_drawn_less() -> None:
    until = Until(
        GOAL, EVERY, BUDGET, Fake(lambda *_: Probed(10, (seen(0.95), seen(0.3)))), nullcontext, concepts=2, lr=1e-3
    )
    history: list[dict[str, float]] = [{"step": i, "forget": 0.5} for i in range(1, 11)]
    assert until.before(history[:9]) == 1e-3 and until.frequencies is None
    until.after(history)
    until.before(history)
    assert until.now.phase is Phase.CONTINUE and until.now.unfinished == (1,)
    frequencies = until.frequencies
    assert frequencies is not None and frequencies[0] < frequencies[1] == 1


@pytest.mark.parametrize(
    ("whole", "at", "kept", "reached"),
    [
        ((0.95, 0.01), {0.85: (0.95, 0.01), 0.7: (0.95, None), 0.55: (0.7, None)}, 0.85, True),
        ((0.95, 0.01), {0.85: (0.8, 0.01), 0.7: (0.95, None), 0.55: (0.7, None)}, 1.0, True),
        ((0.95, 0.01), {0.7: (0.8, None)}, 1.0, True),
        ((0.95, 0.01), {0.7: (0.95, None), 0.55: (0.95, None), 0.4: (0.95, 0.01), 0.25: (0.95, None)}, 0.4, True),
        ((0.95, 0.03), {0.73: (0.8, 0.02), 0.86: (0.95, 0.019), 0.7: (0.8, None)}, 0.86, True),
        ((0.95, 0.03), {0.73: (0.8, 0.02), 0.86: (0.95, 0.025), 0.79: (0.8, 0.021), 0.7: (0.8, None)}, 0.86, False),
        ((0.95, 0.03), {0.73: (0.95, 0.025), 0.45: (0.8, 0.021), 0.55: (0.8, None)}, 0.73, False),
        ((0.4, 0.01), {}, 1.0, False),
        ((0.95, 0.8), {0.5: (0.95, 0.3), 0.25: (0.6, 0.02)}, 0.25, False),
        ((0.95, float("nan")), {0.5: (0.95, 0.02)}, 0.5, True),
    ],
    ids=str,
)
def test_the_smallest_change_that_erases_is_kept_with_a_step_of_margin_and_of_a_wrecked_model_a_small_one(
    whole: tuple[float, float], at: dict[float, tuple[float, float | None]], kept: float, reached: bool
) -> None:
    found = {1.0: whole, **at}
    until, history = trained_with(Fake(lambda step, s: Probed(step, (seen(found[s][0]),), found[s][1], s)))
    assert kept_strength(history) == kept and until.reached(history) is reached
    data = json.loads(json.dumps(until.as_json(history)))
    assert data["strength"] == kept and {look["strength"] for look in data["probes"]} == set(found)
    assert ("was reached" in until.summary(history)) is reached


def test_a_goal_for_attacks_keeps_the_whole_change() -> None:
    """A smaller one erases as well, but withstands less."""
    until, history = trained_with(
        Fake(lambda step, s: Probed(step, (seen(0.95),), 0.01, s, 0.0)), Goal(0.9, 0.02, asr=0.05)
    )
    assert kept_strength(history) == 1.0 and until.reached(history)


def test_the_rate_falls_to_zero_before_the_last_probe_and_what_moves_is_drawn_more_often() -> None:
    until = Until(GOAL, EVERY, BUDGET, Fake(lambda step, _: Probed(step, (seen(0.95),), 0.01)), nullcontext, lr=1e-3)
    history: list[dict[str, float]] = []
    rates, drawn = [], []
    while not until.stops(history):
        rates.append(until.before(history))
        drawn.append(until.retain_frequencies)
        history.append({"step": len(history) + 1, "forget": 0.5})
        until.after(history)
    assert rates == pytest.approx([1e-3] * 10 + [1e-3 * k / 30 for k in range(30, 0, -1)])
    assert drawn[:20] == [None] * 20  # measured after every second interval
    assert all(each is not None and each[1] > 10 * each[0] == 10 * each[2] for each in drawn[20:])
    assert all(set(row) == {"step", "forget"} for row in losses_of(history))


def test_a_change_that_drifts_too_far_is_scaled_down_before_it_is_trained_again() -> None:
    """By what the drift of each strength says about the next one; all looks are recorded, and one decides."""
    drifts = {1.0: 0.03, 0.73: 0.021, 0.66: 0.019}
    found = Fake(lambda step, s: Probed(step, (seen(0.95 if s > 0.6 else 0.5),), drifts.get(s), s))
    until, history = trained_with(found)
    assert len(history) == 40 and kept_strength(history) == 0.66 and until.reached(history)
    last = [look for look in until.as_json(history)["probes"] if look["step"] == 40]
    assert (last[0]["strength"], last[0]["decides"]) == (0.66, True)
    assert [(look["strength"], look["decides"]) for look in last[1:]] == [(1.0, False), (0.73, False), (0.4, False)]


def test_other_images_that_are_no_longer_as_prompted_count_as_drift_does() -> None:
    """Training continues with more retain samples, of more weight, until they are again, or it no longer helps."""
    drops = {40: 0.06, 70: 0.03, 100: 0.02}
    found = Fake(lambda step, s: Probed(step, (seen(0.95),), 0.01, s, ra_drop=drops.get(step)))
    until, history = trained_with(found)
    assert len(history) == 100 and until.reached(history)
    probes = [Probed(10, (seen(0.95),), 0.01), Probed(40, (seen(0.95),), 0.01, ra_drop=0.06)]
    now = decide(GOAL, probes, EVERY, BUDGET)
    assert now.harmed and (now.phase, now.factor, now.retain) == (S, 0.5, HEAVIER)
    until.now = now
    assert until.weights({"retain": 2.0, "adversarial": 0.3}) == {"retain": 2.0 * HEAVIER, "adversarial": 0.3}
    assert not probes[1].reaches(GOAL) and probes[1].reaches(Goal.parse("ua>=0.9, ra_drop<=0.06"))
    for drop, reached in ((0.01, False), (0.0, True), (-0.01, True)):
        assert Probed(40, (seen(0.95),), 0.0, ra_drop=drop).reaches(Goal.parse("ua>=0.9, ra_drop<=0")) is reached
    assert "drift 0.0100, RA -6.0 points" in str(probes[1])


def lacks(step: int, anchor: float) -> Probed:
    """The concept is gone, and the anchor shown in so many images."""
    return Probed(step, (Seen(48, 0.95, 0.9, anchor, 0.9 if anchor >= 0.9 else 0.0),), 0.01)


def test_an_anchor_that_is_not_shown_is_trained_on_without_moving_the_target_away() -> None:
    now = decide(GOAL, [lacks(10, 0.2)], EVERY, BUDGET)
    assert (now.phase, now.guidance, now.grown) == (C, 0.0, False)
    still = [lacks(10 * i, 0.5) for i in range(1, 5)]
    now = decide(GOAL, still, EVERY, BUDGET)
    assert (now.phase, now.guidance, now.grown) == (C, 0.0, True), "it stands still: more forget samples"
    now = decide(GOAL, [*still, *(lacks(40 + 10 * i, 0.5) for i in range(1, 5))], EVERY, BUDGET)
    assert now.phase is S, "and still it stands"
    rising = [lacks(10, 0.95), lacks(40, 0.5), lacks(50, 0.95), lacks(80, 0.7), lacks(90, 0.95)]
    assert decide(GOAL, rising, EVERY, BUDGET).phase is S
    assert decide(GOAL, [*rising, lacks(130, 0.95)], EVERY, BUDGET).phase is R
    assert decide(GOAL, [*rising, lacks(130, 0.6)], EVERY, BUDGET).phase is G, "it does not get better"
    assert "UA 95.0 %, anchor in 20.0 % on 48" in str(lacks(10, 0.2))
    assert Probed.of_row(lacks(10, 0.2).as_row() | {"step": 10}) == lacks(10, 0.2)


@pytest.mark.parametrize(("harms", "steps", "kept"), [((0.01, 0.01), 40, 40), ((0.1, 0.04, 0.06, 0.08), 100, 40)])
def test_a_training_cancelled_in_a_probe_resumes_to_the_same_weights(
    tmp_path: Path, harms: tuple[float, ...], steps: int, kept: int
) -> None:
    """Until a probe is recorded, nothing is decided: the resumed training takes it first. Of one that gets worse, the
    weights that came nearest to the goal are those after step 40, resumed or not."""
    cancelled: list[int] = []

    def at(step: int, strength: float) -> Probed:
        if step in stops and step not in cancelled:
            cancelled.append(step)
            raise Cancelled("stopped")
        return Probed(step, (seen(0.95 if strength == 1 else 0.5),), harms[(step - 10) // 30], strength)

    def trained(state: Path) -> Trained:
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 4), torch.randn(32, 6)
        named = dict(layer.named_parameters())
        sources = {name: p.detach().clone() for name, p in named.items()}
        settings = TrainingSettings(BUDGET, lambda _: 0.0, lambda p: torch.optim.Adam(p, lr=1e-3))
        until = Until(GOAL, EVERY, BUDGET, Fake(at), nullcontext, lr=1e-3)
        until.write = EarlierWeights(state.with_suffix(".earlier"), "run").write
        losses = {"forget": lambda: layer(x).square().mean()}
        return train(
            named, Mask.full(named), lambda _: {name: of() for name, of in losses.items()}, settings,
            sources=sources, watch=until, state=StateFile(state, "run", 0.0),
        )  # fmt: skip

    stops: tuple[int, ...] = ()
    whole = trained(tmp_path / "whole.safetensors")
    stops = (10, steps)
    for _ in stops:
        with pytest.raises(Cancelled):
            trained(tmp_path / "part.safetensors")
    resumed = trained(tmp_path / "part.safetensors")
    assert cancelled == [10, steps] and (len(whole.history), kept_step(whole.history)) == (steps, kept)
    assert resumed.history == whole.history
    ends = [resumed.masters, whole.masters]
    if kept < steps:
        files = (tmp_path / "part.earlier", tmp_path / "whole.earlier")
        ends += [EarlierWeights(file, "run").read(whole.masters, kept) for file in files]
        assert not torch.equal(ends[2]["weight"], ends[0]["weight"])
    assert all(torch.equal(ends[i][name], ends[i + 1][name]) for i in range(0, len(ends), 2) for name in ends[0])


@pytest.mark.parametrize("stop", [EVERY, 4], ids=["a probe", "a loss that is not finite"])
def test_a_wrecked_model_begins_again_from_the_original_weights_resumed_or_not(tmp_path: Path, stop: int) -> None:
    """As a probe finds it, or a step whose loss is not finite."""
    messages: list[str] = []

    def stops_when_wrecked(event: Event) -> None:
        messages.append(event.message)
        if event.step == stop:
            raise Cancelled("stopped")

    def trained(state: Path, progress: Any = silent) -> tuple[Trained, dict[int, torch.Tensor], Until]:
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 4), torch.randn(32, 6)
        named = dict(layer.named_parameters())
        sources = {name: p.detach().clone() for name, p in named.items()}
        settings = TrainingSettings(BUDGET, lambda _: 0.0, lambda p: torch.optim.Adam(p, lr=1e-3))
        found = Fake(lambda step, s: Probed(step, (seen(0.95),), 0.7 if step == EVERY == stop else 0.01, s))
        before: dict[int, torch.Tensor] = {-1: sources["weight"]}

        def losses(step: int) -> dict[str, torch.Tensor]:
            before[step] = layer.weight.detach().clone()
            factor = float("inf") if step + 1 == stop < EVERY else 1.0
            return {"forget": factor * layer(x).square().mean(), "retain": layer(x).mean()}

        until = Until(GOAL, EVERY, BUDGET, found, nullcontext, lr=1e-3)
        file = StateFile(state, "run", 0.0)
        done = train(named, Mask.full(named), losses, settings, progress, sources=sources, watch=until, state=file)
        return done, before, until

    whole, before, until = trained(tmp_path / "whole.safetensors")
    assert torch.equal(before[stop], before[-1]) and not torch.equal(before[stop - 1], before[-1])
    assert until.as_json(whole.history)["lr_factor"] == BACK and until.reached(whole.history)
    with pytest.raises(Cancelled):
        trained(tmp_path / "part.safetensors", stops_when_wrecked)
    resumed, _, _ = trained(tmp_path / "part.safetensors")
    assert resumed.history == whole.history
    assert all(torch.equal(resumed.masters[name], master) for name, master in whole.masters.items())
    if stop < EVERY:
        assert losses_of(whole.history)[stop - 1].keys() == {"step", "retain"}, "what is known of it"
        assert messages[-1] == "the loss is inf at step 4: training begins again"
        assert until.as_json(whole.history)["failed_steps"] == [stop]


@pytest.mark.parametrize("first", [1, 45], ids=["from the first step", "after a closing look"])
def test_losses_that_are_never_finite_again_end_with_the_weights_of_the_best_look_or_an_error(first: int) -> None:
    layer, x = nn.Linear(6, 4), torch.ones(32, 6)
    named = dict(layer.named_parameters())
    sources = {name: p.detach().clone() for name, p in named.items()}
    settings = TrainingSettings(BUDGET, lambda _: 0.0, lambda p: torch.optim.Adam(p, lr=1e-3))
    until = Until(GOAL, EVERY, BUDGET, Fake(lambda step, s: Probed(step, (seen(0.95),), 0.04, s)), nullcontext, lr=1e-3)
    until.write, kept = lambda _, step: kept.append(step), list[int]()

    def trained() -> Trained:
        def losses(step: int) -> dict[str, torch.Tensor]:
            return {"forget": layer(x).square().mean() * (float("nan") if step + 1 >= first else 1.0)}

        return train(named, Mask.full(named), losses, settings, sources=sources, watch=until)

    if first == 1:
        with pytest.raises(TrainingError, match=f"the loss is nan at step {RESTARTS + 1}"):
            trained()
        return
    history = trained().history
    failures = [first + i for i in range(RESTARTS + 1)]
    assert (kept, kept_step(history), len(history)) == ([40], 40, failures[-1])
    assert until.as_json(history)["failed_steps"] == failures and not until.reached(history)


def test_confidence_is_the_posterior_of_the_rate() -> None:
    draws = torch.distributions.Beta(1.5, 8.5).sample((200_000,))  # type: ignore[no-untyped-call]
    assert probability_below(0.2, 1, 9) == pytest.approx(float((draws <= 0.2).float().mean()), abs=5e-3)
    assert probability_below(1.0, 0, 9) == 1 and probability_below(0.02, 5, 5) < 1e-6


def test_the_rate_is_the_sign_step_that_removes_the_loss_to_first_order() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(32, 6)
    named = dict(layer.named_parameters())
    mask = Mask.random(named, 0.5, 0)
    loss = F.mse_loss(layer(x), torch.zeros(32, 4))
    gradients = torch.autograd.grad(loss, list(named.values()))
    norm = sum(float((g.abs() * mask.dense(n)).sum()) for n, g in zip(named, gradients, strict=True))
    made = (F.mse_loss(layer(x), torch.zeros(32, 4)) for _ in range(2))
    assert first_order_rate(named, mask, made) == pytest.approx(TIMES * float(loss) / norm, rel=1e-5)
    with pytest.raises(TrainingError, match="gives no learning rate"):
        first_order_rate(named, mask, [0 * F.mse_loss(layer(x), x[:, :4])])


SMALL: dict[str, Any] = {
    "until": "ua>=0.5, anchor>=0.1, retain_drift<=0.9, ra_drop<=1", "sampling_steps": 4, "steps": 60,
    "forget_latents": 16, "retain_latents": 16, "eval_images": 0, "device": "cpu", "batch_size": 8,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_towards_a_goal_stops_early_and_resumes_to_the_same_bytes(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MANY", 32)
    monkeypatch.setattr(probe, "OTHERS", 16)
    events: list[Event] = []
    run = salun.erase(shapes, "circle", progress=events.append, run_dir=tmp_path / "whole", **SMALL)
    until = run.record.more["until"]
    assert all(0 <= look["anchor"] <= 1 for look in until["probes"])
    assert until["reached"] and until["steps"] < 60 and len(run.history) == until["steps"]
    assert set(run.history[-1]) == {"step", "forget", "retain"}
    assert any("probing" in event.metrics for event in events)
    assert any("held-out images" in event.message for event in events)
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "On the way to the goal" in page and "was reached after" in page

    drawn, failing = salun_method.draw, 8  # between two probes: targets computed ahead are of an older decision then

    def spoilt(*given: Any) -> Draw:
        batch, step = drawn(*given), given[5] + 1
        return replace(batch, noise=batch.noise * float("inf")) if step == failing else batch

    monkeypatch.setattr(salun_method, "draw", spoilt)
    strict = SMALL | {"until": "ua>=0.1, anchor>=0, retain_drift<=0.001, ra_drop<=1"}
    events.clear()
    run = salun.erase(shapes, "circle", progress=events.append, run_dir=tmp_path / "strict", **strict)
    until = run.record.more["until"]
    assert until["failed_steps"] == [failing] and run.history[failing - 1] == {"step": failing}
    assert f"the loss is nan at step {failing}: training begins again" in [event.message for event in events]
    page = (tmp_path / "strict" / "report.html").read_text(encoding="utf-8")
    assert f"was not finite at step {failing}: training began again from the original weights." in page
    assert not until["reached"] and until["lr_factor"] < BACK
    assert any(look["ra_drop"] is not None for look in until["probes"])
    assert all(look["anchor"] is None for look in until["probes"])
    trained = [i for i, event in enumerate(events) if event.stage is Stage.TRAINING]
    sampled = [event for event in events[trained[0] :] if event.stage is Stage.SAMPLING]
    assert sampled[-1].step == sampled[-1].total == 2 * SMALL["retain_latents"], "other images were harmed"

    def stop(at: int, event: Event) -> None:
        if event.stage is Stage.TRAINING and event.step == at:
            raise Cancelled("stopped")

    for at in (failing, until["steps"] - 2):
        with pytest.raises(Cancelled):
            salun.erase(shapes, "circle", progress=partial(stop, at), run_dir=tmp_path / "again", resume=True, **strict)
    resumed = salun.erase(shapes, "circle", progress=silent, run_dir=tmp_path / "again", resume=True, **strict)
    assert resumed.record.more["until"] == until
    assert all(torch.equal(resumed.erased[name], tensor) for name, tensor in run.erased.items())
