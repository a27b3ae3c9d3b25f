"""How far a run is and how long it still takes: from the costs of its stages, and the time of its steps so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from salun.progress import Event, Stage, StageCost

ENOUGH = 0.5  # seconds of work from which a speed follows
UNFINISHED = 0.99  # fraction of an announced run at most: what follows its last stage takes time too
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Args:
        number, count: The present stage's number from 1 and how many there are; 0 for a stage that was not announced.
        fraction: Of the run that is done, 0 to 1; of the stage where none was announced.
        left: Seconds left, at least and at most; None while no speed is known.
    """

    number: int
    count: int
    fraction: float
    left: tuple[float, float] | None


@dataclass
class _Timed:
    """A stage and its work so far.

    Args:
        steps: In all, by its last event or else its cost.
        done: Steps that are done, of which `restored` took no time.
        seconds: Of the steps that took time.
        waited: Seconds since the last step.
        over: Whether a later stage has begun.
        earlier, earlier_restored: Steps before it began again.
    """

    cost: StageCost
    steps: int
    done: int = 0
    restored: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    over: bool = False
    earlier: int = 0
    earlier_restored: int = 0

    @property
    def passes_each(self) -> float:
        """Passes of a step."""
        return self.cost.passes / self.cost.steps if self.cost.steps else 0.0

    @property
    def worked(self) -> int:
        """Steps that took time."""
        return max(self.done - self.restored, 0)

    def end(self) -> None:
        """A later stage has begun: what came after the last step was work too."""
        if self.worked:
            self.seconds += self.waited
        self.over, self.waited = True, 0.0

    def steps_left(self) -> tuple[int, int]:
        """At least and at most."""
        if self.over:
            return 0, 0
        left = max(self.steps - self.done, 0)
        return left, max(self.cost.most - self.done, left)


@dataclass
class TimeLeft:
    """Follows the events of a run.

    The time left is the sum over the stages: a stage with measured steps is taken to continue at their speed, one that
    has not begun at that of stages of its kind (with gradients or without). Steps that took no time tell nothing.

    Args:
        now: The time in seconds.
    """

    now: Callable[[], float] = time.monotonic
    _stages: dict[Stage, _Timed] = field(default_factory=dict, init=False)
    _announced: bool = field(default=False, init=False)
    _present: Stage | None = field(default=None, init=False)
    _last: float = field(default=0.0, init=False)
    _fraction: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.now()

    def at(self, event: Event) -> Position:
        """Take in an event."""
        now = self.now()
        passed, self._last = now - self._last, now
        if event.stages:
            self._announce(event.stages)
        elif event.message and not event.total:  # a note on any stage begins none
            self._last -= passed
        elif not self._announced:
            known = self._stages.get(event.stage)
            stage = self._only(event)
            self._take(stage, event, passed if stage is known else 0.0)
        elif event.stage in self._stages and not self._stages[event.stage].over:
            self._take(self._stages[event.stage], event, passed)
        elif self._present is not None:  # small work in between counts as the present stage's
            self._stages[self._present].waited += passed
        return self._position()

    def _announce(self, stages: Sequence[StageCost]) -> None:
        self._stages = {cost.stage: _Timed(cost, cost.steps) for cost in stages}
        self._announced, self._present, self._fraction = True, None, 0.0

    def _only(self, event: Event) -> _Timed:
        """The stage of a run that announced none, each time it begins: what came before its first event is not its."""
        stage = self._stages.get(event.stage)
        if stage is None or event.step < stage.done:
            cost = StageCost(event.stage, event.total, forward=event.total)
            begun = _Timed(cost, event.total, event.step, event.step)
            self._stages, self._fraction = {event.stage: begun}, 0.0
        return self._stages[event.stage]

    def _take(self, stage: _Timed, event: Event, passed: float) -> None:
        if event.stage is not self._present:
            order = list(self._stages)
            for earlier in order[: order.index(event.stage)]:  # also one that a resumed run skips
                self._stages[earlier].end()
            self._present = event.stage
        stage.waited += passed
        if event.step < stage.done - stage.earlier:  # it begins again, as saliency does for each concept
            stage.earlier, stage.earlier_restored = stage.done, stage.restored
        done, total = stage.earlier + event.step, stage.earlier + event.total
        restored = stage.earlier_restored + event.restored
        if event.total:
            exact = bool(stage.cost.most) or not self._announced
            stage.steps = total if exact else max(total, stage.cost.steps)
        if done <= stage.done:
            return
        if done - stage.done > restored - stage.restored:
            stage.seconds += stage.waited
        stage.waited, stage.done, stage.restored = 0.0, done, max(stage.restored, restored)

    def _position(self) -> Position:
        timed = list(self._stages.values())
        total = sum(stage.steps * stage.passes_each for stage in timed)
        done = sum((stage.steps if stage.over else stage.done) * stage.passes_each for stage in timed)
        fraction = min(done / total, UNFINISHED if self._announced else 1.0) if total else 0.0
        self._fraction = max(self._fraction, fraction)
        number = list(self._stages).index(self._present) + 1 if self._announced and self._present else 0
        return Position(number, len(timed) if self._announced else 0, self._fraction, self._left(timed))

    def _left(self, timed: list[_Timed]) -> tuple[float, float] | None:
        least = most = 0.0
        counted = [stage for stage in timed if stage.cost.passes]
        if not counted:
            return None
        for stage in counted:
            low, high = stage.steps_left()
            if not high:
                continue
            each = self._seconds_each(stage, timed)
            if each is None:
                return None
            least += max(low * each - stage.waited, 0.0)
            most += max(high * each - stage.waited, 0.0)
        return least, most

    def _seconds_each(self, stage: _Timed, timed: list[_Timed]) -> float | None:
        """Seconds of a step of a stage; None while nothing is known."""
        if stage.worked and stage.seconds >= ENOUGH:
            return stage.seconds / stage.worked
        with_gradients = bool(stage.cost.backward)
        measured = [each for each in timed if each.worked and each.cost.passes]
        for group in ([each for each in measured if bool(each.cost.backward) is with_gradients], measured):
            seconds, passes = sum(s.seconds for s in group), sum(s.worked * s.passes_each for s in group)
            if seconds >= ENOUGH and passes:
                return stage.passes_each * seconds / passes
        return None


def in_words(left: tuple[float, float] | None) -> str:
    """A time left as people say it, no more exact than it is known; "" for an unknown one."""
    if left is None:
        return ""
    low, high = left
    if high < 50:
        return "less than a minute left"
    if high < 1.5 * HOUR:
        a, b = _rounded(low / MINUTE), max(_rounded(high / MINUTE), 1)
        return _range(a, b, "minute")
    if high < 2 * DAY:
        return _range(round(2 * low / HOUR) / 2, round(2 * high / HOUR) / 2, "hour")
    return _range(round(low / DAY), round(high / DAY), "day")


def _rounded(minutes: float) -> int:
    return round(minutes) if minutes < 20 else 5 * round(minutes / 5)


def _range(low: float, high: float, unit: str) -> str:
    units = unit if high == 1 else f"{unit}s"
    if low == high:
        return f"about {high:g} {units} left"
    return f"{low:g} to {high:g} {units} left" if low >= 1 else f"up to {high:g} {units} left"
