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

TINY = {"steps": 1, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_erase_shows_progress_unless_asked_not_to(
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
