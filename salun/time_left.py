"""How far a run is and how long it still takes: from the costs of its stages, and the time of its steps so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from salun.progress import Event, Stage, StageCost

ENOUGH = 0.5  # seconds of work from which a speed follows
UNFINISHED = 0.99  # fraction of an announced run at most: what follows its last stage takes time too
ANY = "any"
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Args:
        number, count: The stage's number from 1, and how many there are; in a run of several jobs those of the job. 0
            for a stage that was not announced.
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

    @property
    def complete(self) -> bool:
        """Whether its last step was taken: what closes it is reported with that step."""
        return self.over or self.done >= self.steps > 0

    def end(self) -> None:
        """A later stage has begun: what came after the last step was work too."""
        if self.worked:
            self.seconds += self.waited
        self.over, self.waited = True, 0.0

    def steps_left(self) -> tuple[int, int]:
        """At least and at most."""
        if self.over or (self.cost.most and self.complete):
            return 0, 0
        left = max(self.steps - self.done, 0)
        return left, max(self.cost.most - self.done, left)


@dataclass
class TimeLeft:
    """Follows the events of a run.

    The time left is the sum over the stages: a stage with measured steps is taken to continue at their speed, one that
    has not begun at that of stages of its kind, or else of those with gradients, or without. Steps that took no time
    tell nothing. After a resume, no time left is given until the training continues.

    Args:
        now: The time in seconds.
    """

    now: Callable[[], float] = time.monotonic
    _stages: list[_Timed] = field(default_factory=list, init=False)
    _announced: bool = field(default=False, init=False)
    _resumed: bool = field(default=False, init=False)
    _present: int | None = field(default=None, init=False)
    _last: float = field(default=0.0, init=False)
    _fraction: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.now()

    def at(self, event: Event) -> Position:
        """Take in an event."""
        now = self.now()
        passed, self._last = now - self._last, now
        if event.job:
            self._begin_job(event.job)
        if event.stages:
            self._announce(event)
        elif event.message and not event.total:  # a note on any stage begins none
            self._last -= passed
        elif event.total and not self._announced:
            known = self._stages[0] if self._stages else None
            stage = self._only(event)
            self._take(stage, event, passed if stage is known else 0.0)
        elif event.total and (number := self._number_of(event)) is not None:
            if not event.message:  # such as from which step a run is resumed
                self._begin(number)
            self._take(self._stages[number], event, passed)
        elif self._present is not None:  # small work in between counts as the present stage's
            self._stages[self._present].waited += passed
        return self._position(event)

    def _announce(self, event: Event) -> None:
        self._stages = [_Timed(cost, cost.steps) for cost in event.stages]
        self._announced, self._resumed, self._present, self._fraction = True, event.resumed, None, 0.0

    def _only(self, event: Event) -> _Timed:
        """The stage of a run that announced none, each time it begins: what came before its first event is not its."""
        stage = self._stages[0] if self._stages else None
        if stage is None or stage.cost.stage is not event.stage or event.step < stage.done:
            cost = StageCost(event.stage, event.total, forward=event.total)
            self._stages, self._present, self._fraction = [_Timed(cost, event.total, event.step, event.step)], 0, 0.0
        return self._stages[0]

    def _number_of(self, event: Event) -> int | None:
        """Where a stage is among those announced: the present one, or the next of its kind; None for one that is over.

        A run may do the same several times, as it detects the concept by one detector after the other.
        """
        following = range(self._present or 0, len(self._stages))
        wanted = event.stage, event.job
        return next((i for i in following if (self._stages[i].cost.stage, self._stages[i].cost.job) == wanted), None)

    def _begin_job(self, job: int) -> None:
        """Begin the first stage of a job, unless it has begun. Those of earlier jobs are over, as of finished ones."""
        first = next((i for i, stage in enumerate(self._stages) if stage.cost.job == job), None)
        if first is not None and (self._present is None or self._present < first):
            self._begin(first)

    def _begin(self, number: int) -> None:
        for earlier in self._stages[:number]:  # also one that a resumed run skips
            earlier.end()
        self._present = number

    def _take(self, stage: _Timed, event: Event, passed: float) -> None:
        stage.waited += passed
        if event.step < stage.done - stage.earlier:  # it begins again, as saliency does for each concept
            stage.earlier, stage.earlier_restored = stage.done, stage.restored
        done, total = stage.earlier + event.step, stage.earlier + event.total
        restored = stage.earlier_restored + event.restored
        exact = bool(stage.cost.most) or stage.cost.guessed or not self._announced
        stage.steps = total if exact else max(total, stage.cost.steps)
        if done <= stage.done:
            return
        if done - stage.done > restored - stage.restored:
            stage.seconds += stage.waited
        stage.waited, stage.done, stage.restored = 0.0, done, max(stage.restored, restored)

    def _position(self, event: Event) -> Position:
        stages, present = self._stages, self._present
        total = sum(stage.steps * stage.passes_each + stage.cost.closing for stage in stages)
        done = sum((stage.steps if stage.over else stage.done) * stage.passes_each for stage in stages)
        done += sum(stage.cost.closing for stage in stages if stage.complete)
        fraction = min(done / total, UNFINISHED if self._announced else 1.0) if total else 0.0
        self._fraction = max(self._fraction, fraction)
        number = count = 0
        if event.job and stages:
            number, count = event.job, stages[-1].cost.job
        elif self._announced and present is not None and stages[present].cost.stage is event.stage:
            number, count = present + 1, len(stages)
        return Position(number, count, self._fraction, self._left())

    @property
    def _continues(self) -> bool:
        """Whether a run that was resumed trains again, or is past its training."""
        return any(stage.over or stage.worked for stage in self._stages if stage.cost.stage is Stage.TRAINING)

    def _left(self) -> tuple[float, float] | None:
        least = most = 0.0
        counted = [stage for stage in self._stages if stage.cost.passes]
        if not counted or (self._resumed and not self._continues):
            return None
        speeds = _Speeds.of(counted)
        for stage in counted:
            low, high = stage.steps_left()
            closing = 0 if stage.complete else stage.cost.closing
            if not high and not closing:
                continue
            each, of_a_pass = speeds.of_a_step(stage), speeds.of_a_pass(backward=False) if closing else 0.0
            if each is None or of_a_pass is None:
                return None
            least += max(low * each + closing * of_a_pass - stage.waited, 0.0)
            most += max(high * each + closing * of_a_pass - stage.waited, 0.0)
        return least, most


@dataclass(frozen=True)
class _Speeds:
    """Seconds and passes that were measured: on each kind of stage, with and without gradients, and on all (`ANY`)."""

    measured: Mapping[str | bool | None, tuple[float, float]]

    @classmethod
    def of(cls, stages: Sequence[_Timed]) -> _Speeds:
        """Those of stages that have passes."""
        sums: dict[str | bool | None, tuple[float, float]] = {}
        for stage in stages:
            if stage.worked:
                for group in (stage.cost.stage, bool(stage.cost.backward), ANY):
                    seconds, passes = sums.get(group, (0.0, 0.0))
                    sums[group] = seconds + stage.seconds, passes + stage.worked * stage.passes_each
        return cls(sums)

    def of_a_step(self, stage: _Timed) -> float | None:
        """Seconds of a step of a stage; None while nothing is known."""
        if stage.worked and stage.seconds >= ENOUGH:
            return stage.seconds / stage.worked
        of_a_pass = self.of_a_pass(bool(stage.cost.backward), stage.cost.stage)
        return stage.passes_each * of_a_pass if of_a_pass is not None else None

    def of_a_pass(self, backward: bool, kind: Stage | None = None) -> float | None:
        """As measured on stages of this kind, or else on those with or without gradients, or on any."""
        for group in (kind, backward, ANY):
            seconds, passes = self.measured.get(group, (0.0, 0.0))
            if seconds >= ENOUGH and passes:
                return seconds / passes
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
