"""Progress without asking: a bar on a terminal and in a notebook, lines elsewhere, nothing where it is turned off."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest

import salun
from salun.diffusion.model.stable_diffusion import Model
from salun.display import shown
from salun.progress import Event, Stage, StageCost, silent
from salun.time_left import TimeLeft, in_words

TINY = {"steps": 1, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_erase_shows_progress_unless_told_not_to(
    shapes: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    salun.erase(shapes, "circle", **TINY)
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("Erasing “circle” (anchor: “square”) from shapes by SalUn on 50 % of the weights, 1 ")
    assert "4/4 Training: 1/1" in printed.err, "lines where there is no terminal"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    salun.erase(shapes, "circle", progress=salun.silent, **TINY)
    assert not terminal.getvalue()
    salun.erase(shapes, "circle", **TINY)
    assert "4/4 Training" in terminal.getvalue()
    assert not capsys.readouterr().out


def drawn(monkeypatch: pytest.MonkeyPatch, columns: int, *events: Event) -> list[str]:
    """What a terminal of that many columns shows, one text each time that the line is written."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    with shown(None) as progress:
        for event in events:
            progress(event)
    return re.split("[\r\n]", terminal.getvalue())


def test_a_bar_is_one_line_of_the_run_with_the_stage_and_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [StageCost(Stage.SAMPLING, 100, forward=100), StageCost(Stage.SALIENCY, 10, backward=100)]
    events = [Event(Stage.PLANNING, message="a plan " * 20, stages=stages), Event(Stage.SAMPLING, 100, 100)]
    shown_lines = drawn(monkeypatch, 80, *events, Event(Stage.SALIENCY, 5, 10, {"loss": 0.5}))
    assert max(map(len, shown_lines)) < 80
    assert any(line.startswith("2/2 Finding salient weights") and " 62% " in line for line in shown_lines)
    assert not any("loss" in line for line in shown_lines)
    assert any(
        "loss 0.5" in line for line in drawn(monkeypatch, 160, *events, Event(Stage.SALIENCY, 5, 10, {"loss": 0.5}))
    )


def test_progress_in_a_notebook_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    with shown(None) as progress:
        for step in range(1, 101):
            progress(Event(Stage.TRAINING, step, 100, {"forget": 0.5}, message="a note" if step == 1 else ""))
    printed = capsys.readouterr()
    assert printed.out == "a note\n"
    assert "Training" in printed.err and "100%" in printed.err and "forget 0.5" in printed.err


def test_a_progress_that_is_given_is_used_as_it_is() -> None:
    events: list[Event] = []
    with shown(events.append) as progress:
        progress(Event(Stage.TRAINING, 1, 1))
    assert len(events) == 1
    with shown(None, quiet=True) as progress:
        assert progress is silent


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), ((3, 9), "less than a minute left"), ((55, 70), "about 1 minute left"),
     ((118, 125), "about 2 minutes left"),
     ((100, 800), "2 to 13 minutes left"), ((10, 100), "up to 2 minutes left"), ((1500, 1560), "about 25 minutes left"),
     ((5000, 9000), "1.5 to 2.5 hours left"), ((200_000, 200_000), "about 2 days left")],
)  # fmt: skip
def test_time_left_is_told_in_words(seconds: tuple[float, float] | None, text: str) -> None:
    assert in_words(seconds) == text
