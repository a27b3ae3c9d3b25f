"""Progress without asking: on a terminal and in a notebook, nothing elsewhere, nothing where it is turned off."""

from __future__ import annotations

import io
import sys
import types

import pytest

import salun
from salun.diffusion.model.stable_diffusion import Model
from salun.display import shown
from salun.progress import Event, Stage, silent

TINY = {"steps": 1, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_erase_shows_progress_on_a_terminal_unless_told_not_to(
    shapes: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    salun.erase(shapes, "circle", **TINY)
    assert capsys.readouterr() == ("", ""), "no terminal"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    salun.erase(shapes, "circle", progress=salun.silent, **TINY)
    assert not terminal.getvalue()
    salun.erase(shapes, "circle", **TINY)
    assert "training" in terminal.getvalue()
    assert not capsys.readouterr().out


def test_progress_in_a_notebook_without_widgets_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with shown(None) as progress:
        for step in range(1, 101):
            progress(Event(Stage.TRAINING, step, 100, {"forget": 0.5}))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "training 1/100  forget 0.5"
    assert 10 <= len(printed) <= 12


def test_a_progress_that_is_given_is_used_as_it_is() -> None:
    events: list[Event] = []
    with shown(events.append) as progress:
        progress(Event(Stage.TRAINING, 1, 1))
    assert len(events) == 1
    with shown(None, quiet=True) as progress:
        assert progress is silent
