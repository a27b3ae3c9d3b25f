"""A job's progress and time left, estimated from the costs of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from salun.display import LABELS
from salun.progress import Event, Progress, Stage, StageCost

SAVING = 0.05  # fraction of an erasure that writing its files takes
MIN_FRACTION = 0.03  # below it, no time left is estimated
MEASURED = 0.5  # seconds of a stage after which its pace is known
CORRECTED = 1.5  # a time left is corrected upward if it is too short by this factor; otherwise it only counts down
REPEATED = (Stage.SAMPLING, Stage.ENCODING, Stage.IMAGES_BEFORE, Stage.SALIENCY, Stage.FROZEN_TARGETS)


def with_saving(costs: Sequence[StageCost]) -> list[StageCost]:
    """The stages of an erasure, with the writing of its files at the end."""
    total = sum(cost.passes for cost in costs)
    return [*costs, StageCost(Stage.SAVING, 1, forward=max(1, round(total * SAVING / (1 - SAVING))))]


def continued(progress: Progress, costs: Sequence[StageCost]) -> Progress:
    """A progress that counts on where a stage begins again, as sampling does with each set of prompts.

    Args:
        costs: With the steps of all parts of a stage.
    """
    steps = {cost.stage: cost.steps for cost in costs}
    passed: dict[Stage, tuple[int, int]] = {}  # stage → steps of its earlier parts, and of the present one

    def counted(event: Event, /) -> None:
        if event.stage in steps and event.total:
            earlier, last = passed.get(event.stage, (0, 0))
            if event.step < last:
                earlier += last
            passed[event.stage] = earlier, event.step
            total = max(steps[event.stage], earlier + event.total)
            event = replace(event, step=earlier + event.step, total=total)
        progress(event)

    return counted


class ProgressEstimator:
    """Estimates progress: `at` takes a stage's step and returns (fraction done, seconds left or None).

    The fraction never decreases. The time left is (1 − fraction) × the seconds of the entire job at the present pace:
    that of the present stage, or else of the slowest stage so far, as what comes out of a cache says nothing about
    what is computed. A step that takes longer than the rest of its
    stage should have taken slows the pace.

    Args:
        costs: The stages of the job, in order.
        now: The time in seconds.
        resumed: Whether stages before the training are repeated from what is saved, so that their pace says nothing.
    """

    def __init__(
        self, costs: Sequence[StageCost], now: Callable[[], float] = time.monotonic, resumed: bool = False
    ) -> None:
        self._now, self._resumed = now, resumed
        self.fraction = 0.0
        self._spans: dict[str, tuple[float, float]] = {}  # stage → where it begins, its length
        passes = [cost.passes for cost in costs]
        for i, cost in enumerate(costs):
            self._spans[cost.stage] = (sum(passes[:i]) / sum(passes), passes[i] / sum(passes))
        self._stage = ""
        self._began = (0.0, 0.0)  # when and at which fraction the stage began
        self._reached = (0.0, 0.0)  # when and at which fraction its last step ended
        self._rate: float | None = None  # seconds of the entire job at the pace of the present stage
        self._slowest: float | None = None  # likewise, of the stages before it
        self._last: tuple[float, float] | None = None  # when `left` was computed last, and its value

    def at(self, stage: str, step: int, total: int) -> tuple[float, float | None]:
        """Record a step. A stage without a cost does not change the fraction."""
        now = self._now()
        if stage in self._spans and total:
            start, length = self._spans[stage]
            done = step - 1 if stage == Stage.SAVING else step  # reported before each file, not after
            reached = start + length * min(max(done, 0) / total, 1.0)
            if stage != self._stage:
                self._enter(stage, now, reached)
            self._measure(now, reached, start + length)
            self.fraction = max(self.fraction, reached)
        return self.fraction, self._left(now)

    def _enter(self, stage: str, now: float, reached: float) -> None:
        if self._rate is not None and not (self._resumed and self._stage in REPEATED):
            self._slowest = max(self._slowest or 0.0, self._rate)
        self._stage, self._rate = stage, None
        self._began = self._reached = (now, reached)

    def _measure(self, now: float, reached: float, end: float) -> None:
        """Update the pace of the present stage. end: the fraction at which it ends."""
        if reached > self._reached[1]:
            self._reached = (now, reached)
        seconds, progress = self._reached[0] - self._began[0], self._reached[1] - self._began[1]
        if progress > 0 and seconds > MEASURED:
            self._rate = seconds / progress
        if end > self._began[1]:  # it is at least as slow as if it ended now
            least = (now - self._began[0]) / (end - self._began[1])
            if least > max(self._rate or 0.0, self._slowest or 0.0):
                self._rate = least

    def _left(self, now: float) -> float | None:
        rate = self._rate if self._rate is not None else self._slowest
        if self._resumed and self._stage in REPEATED:
            return None
        if rate is None or self.fraction < MIN_FRACTION:
            return None
        left = (1 - self.fraction) * rate
        if self._last is not None:
            expected = max(0.0, self._last[1] - (now - self._last[0]))
            if expected < left <= CORRECTED * expected + 10:
                left = expected
        self._last = (now, left)
        return left


def label(stage: str) -> str:
    """A stage's label on the page, that of the command line; “starting” for "", before the first stage."""
    return next((text.lower() for known, text in LABELS.items() if known == stage), stage) or "starting"
