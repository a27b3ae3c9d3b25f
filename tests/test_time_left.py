"""How long a run still takes, by its events: invented ones, and those of recorded runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from salun.progress import Event, Stage, StageCost, in_jobs, in_parts
from salun.time_left import Position, TimeLeft, in_words

RECORDED = Path(__file__).parent / "recorded_events.json"


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def times_left(stages: list[StageCost], *events: tuple[float, Event]) -> list[tuple[float, float] | None]:
    """The seconds left at each event. events: the seconds since the last one, and the event."""
    clock, found = Clock(), []
    follow = TimeLeft(clock)
    follow.at(Event(Stage.PLANNING, stages=stages))
    for seconds, event in events:
        clock.now += seconds
        found.append(follow.at(event).left)
    return found


STAGES = [
    StageCost(Stage.SAMPLING, 100, forward=1000),
    StageCost(Stage.SALIENCY, 10, backward=100),
    StageCost(Stage.TRAINING, 100, backward=1000),
]


def test_time_left_is_that_of_all_stages_at_the_speed_of_their_kind() -> None:
    sampled, scored = times_left(STAGES, (10, Event(Stage.SAMPLING, 50, 100)), (20, Event(Stage.SALIENCY, 10, 10)))
    assert sampled == (10 + 6 + 60, 10 + 6 + 60), "3 passes for one with gradients, while none was measured"
    assert scored == (200, 200), "1,000 samples with gradients at the measured speed"


def test_time_left_is_not_made_of_what_took_no_time() -> None:
    cached, first, second = times_left(
        STAGES,
        (0.6, Event(Stage.SAMPLING, 100, 100, restored=100)),
        (0.6, Event(Stage.TRAINING, 61, 100, restored=60)),
        (9.4, Event(Stage.TRAINING, 62, 100, restored=60)),
    )
    assert cached is None, "sampling came from the cache, so nothing is known"
    assert first == (pytest.approx(39 * 0.6), pytest.approx(39 * 0.6))
    assert second == (38 * 5, 38 * 5)


def test_time_left_is_a_range_where_the_run_decides_on_its_steps() -> None:
    stages = [StageCost(Stage.TRAINING, 120, backward=120, most=360)]
    assert times_left(stages, (100, Event(Stage.TRAINING, 20, 50)))[0] == (30 * 5, 340 * 5)


def test_time_left_of_a_stage_that_comes_twice_is_that_of_both() -> None:
    """As an evaluation calibrates and asks one detector after the other."""
    stages = [StageCost(each, 10, forward=100) for each in (Stage.DETECTING, Stage.CALIBRATING, Stage.DETECTING)]
    events = [(5, Event(each.stage, 5, 10)) for each in stages]
    assert times_left(stages, *events) == [(25, 25), (15, 15), (5, 5)]


def test_time_left_counts_a_probe_of_the_training_but_no_step_for_it() -> None:
    stages = [StageCost(Stage.TRAINING, 100, backward=100, most=300)]
    probe = (8, Event(Stage.TRAINING, metrics={"probing": 8}))
    events = [(10, Event(Stage.TRAINING, 10, 100)), probe, (2, Event(Stage.TRAINING, 11, 100))]
    assert times_left(stages, *events) == [
        (90, 290),
        (82, 282),
        (pytest.approx(89 * 20 / 11), pytest.approx(289 * 20 / 11)),
    ]


def test_a_note_on_resumed_steps_begins_no_stage() -> None:
    """Targets of the steps that are left are still computed before them."""
    stages = [StageCost(Stage.FROZEN_TARGETS, 10, forward=30), StageCost(Stage.TRAINING, 10, backward=10)]
    note = (1, Event(Stage.TRAINING, 6, 10, message="resuming after step 6", restored=6))
    targets = [(2, Event(Stage.FROZEN_TARGETS, step, 10, restored=6)) for step in (7, 8)]
    assert times_left(stages, note, *targets)[1:] == [(14, 14), (12, 12)]


def test_time_left_of_several_jobs_is_that_of_those_that_are_not_finished() -> None:
    clock, positions = Clock(), list[Position]()
    follow = TimeLeft(clock)
    jobs = list(in_jobs(lambda event: positions.append(follow.at(event)), [STAGES[-1:]] * 3))
    clock.now = 10
    jobs[1](Event(Stage.TRAINING, 50, 100))  # so the first one was done before
    assert positions[-1] == Position(2, 3, 0.5, (10 + 20, 10 + 20))
    jobs[2](Event(Stage.PLANNING, message="what it does", stages=STAGES))  # the second failed
    assert positions[-1] == Position(3, 3, pytest.approx(2 / 3), (20, 20))


def test_a_guess_of_the_steps_is_replaced_by_the_first_event() -> None:
    stages = [StageCost(Stage.UNLEARNING, 100, backward=100, guessed=True)]
    assert times_left(stages, (4, Event(Stage.UNLEARNING, 4, 10))) == [(6, 6)]


def test_parts_of_a_stage_count_on() -> None:
    seen: list[Event] = []
    for progress, events in zip(in_parts(seen.append, [4, 3]), ([(2, 4), (4, 4)], [(0, 0), (3, 3)]), strict=True):
        for step, total in events:
            progress(Event(Stage.SAMPLING, step, total, restored=step))
    assert [(e.step, e.total, e.restored) for e in seen] == [(2, 7, 2), (4, 7, 4), (0, 0, 0), (7, 7, 7)]


@dataclass(frozen=True)
class Moment:
    """What was known at an event of a recorded run.

    left: The time left that was given. true: That which it took.
    """

    stage: str
    step: int
    fraction: float
    left: tuple[float, float] | None
    true: float


def replayed(name: str) -> list[Moment]:
    """A recorded run: `tools/record_events.py`."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    clock, moments = Clock(), []
    follow = TimeLeft(clock)
    stages = [StageCost(Stage(stage), *numbers) for stage, *numbers in recorded["stages"]]
    follow.at(Event(Stage.PLANNING, stages=stages, resumed=recorded["resumed"]))
    for seconds, stage, step, total, restored in recorded["events"]:
        clock.now = seconds
        position = follow.at(Event(Stage(stage), step, total, restored=restored))
        moments.append(Moment(stage, step, position.fraction, position.left, recorded["seconds"] - seconds))
    return moments


@pytest.mark.parametrize("name", ["begun", "resumed"])
def test_time_left_of_a_recorded_run_is_about_right(name: str) -> None:
    """A goal and the detector `self`, whose calibration takes longer than sampling all images."""
    moments = replayed(name)
    whole = moments[0].true
    fractions = [moment.fraction for moment in moments]
    assert fractions == sorted(fractions)
    known = [moment for moment in moments if moment.left is not None]
    assert len(known) > len(moments) / 2
    for moment in known:
        assert moment.left is not None
        low, high = moment.left
        assert low / 1.75 - whole / 20 <= moment.true <= 1.75 * high + whole / 20, moment
    if name == "resumed":
        trained = next(i for i, moment in enumerate(moments) if moment.stage == "training" and moment.step)
        assert moments[trained - 1].left is None, "nothing is promised before the training continues"
        assert all(moment.left is not None for moment in moments[trained:])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), ((3, 9), "less than a minute left"), ((55, 70), "about 1 minute left"),
     ((118, 125), "about 2 minutes left"),
     ((100, 800), "2 to 13 minutes left"), ((10, 100), "up to 2 minutes left"), ((1500, 1560), "about 25 minutes left"),
     ((5000, 9000), "1.5 to 2.5 hours left"), ((200_000, 200_000), "about 2 days left")],
)  # fmt: skip
def test_time_left_is_said_in_words(seconds: tuple[float, float] | None, text: str) -> None:
    assert in_words(seconds) == text
