"""How the core reports progress to a host, and how a host stops a run.

A host implements one method. It raises `Cancelled` from it to stop the run at the next step; the run then leaves no
incomplete file, and a state to resume from where it has a run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Stage(str, Enum):
    """What a run is doing. Hosts give each a label in their own words."""

    PLANNING = "planning"
    LOADING = "loading"
    MEASURING = "measuring"
    CHECKING = "checking"
    COMPARING = "comparing"
    SAMPLING = "sampling"
    ENCODING = "encoding"
    IMAGES_BEFORE = "images before"
    IMAGES_AFTER = "images after"
    CALIBRATING = "calibrating"
    PROBING = "probing"
    DETECTING = "detecting"
    EVALUATING = "evaluating"
    SALIENCY = "saliency"
    FROZEN_TARGETS = "frozen targets"
    TRAINING = "training"
    ORIGINAL = "original"
    UNLEARNING = "unlearning"
    RETRAINING = "retraining"
    RELEARNING = "relearning"
    CURVATURE = "curvature"
    SEARCHING = "searching"
    ATTACKING = "attacking"
    SAVING = "saving"
    WRITING = "writing"
    EXPORTING = "exporting"
    STOPPING = "stopping"

    __str__ = str.__str__


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage of a run.

    Args:
        steps: Steps, as the stage's events count them.
        forward: Passes of one sample through the network without gradients.
        backward: Passes of one sample forward and backward.
        most: Steps at most, where the run decides on their number; 0 where `steps` is exact. Passes are those of
            `steps`.
        guessed: Whether `steps` is a guess, which the first event of the stage replaces.
        closing: Passes without gradients with the last step, which are in neither of the others.
        job: The number of its job, from 1, in a run of several jobs; 0 in others.
    """

    stage: Stage
    steps: int
    forward: int = 0
    backward: int = 0
    most: int = 0
    guessed: bool = False
    closing: int = 0
    job: int = 0

    @property
    def passes(self) -> int:
        """Of the steps, in passes without gradients: a forward and backward pass costs as much as three of them."""
        return self.forward + 3 * self.backward


@dataclass(frozen=True)
class Event:
    """One step of one stage.

    stage: what is being done.
    step, total: 1-based position; total 0 in a note, or where a host can only stop the run.
    metrics: metrics known at this step, such as losses.
    image: uint8 (h, w, 3), a preview, where there is one.
    message: a line for people, where there is one.
    restored: how many of the steps took no time: from the cache, or taken before the run was resumed.
    stages: what the run does, in order, in the event that announces it.
    resumed: in that event, whether the run was begun before.
    job: the number of its job, from 1, in a run of several jobs; 0 in others.
    """

    stage: Stage
    step: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    image: np.ndarray | None = None
    message: str = ""
    restored: int = 0
    stages: Sequence[StageCost] = ()
    resumed: bool = False
    job: int = 0


class Progress(Protocol):
    """A host's callback, called at every step from the thread of the run."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """A progress that reports nothing."""


def in_parts(progress: Progress, sizes: Sequence[int]) -> Iterator[Progress]:
    """A progress for each part of a stage. Each part counts its own steps; what is reported counts those of all.

    Args:
        sizes: Steps of the parts.
    """
    total = sum(sizes)
    done = restored = 0
    for size in sizes:
        latest = 0

        def report(event: Event, /, done: int = done, restored: int = restored) -> None:
            nonlocal latest
            if event.total:
                latest = event.restored
                event = replace(event, step=done + event.step, total=total, restored=restored + latest)
            progress(event)

        yield report
        done, restored = done + size, restored + latest


def in_jobs(progress: Progress, jobs: Sequence[Sequence[StageCost]], resumed: bool = False) -> Iterator[Progress]:
    """Announce the stages of all jobs of a run. A progress for each job; what a job itself announces is not reported.

    Args:
        jobs: The stages of each.
        resumed: Whether the run was begun before.
    """
    stages = [replace(cost, job=number) for number, costs in enumerate(jobs, 1) for cost in costs]
    progress(Event(Stage.PLANNING, stages=stages, resumed=resumed))
    for number in range(1, len(jobs) + 1):

        def report(event: Event, /, number: int = number) -> None:
            progress(replace(event, stages=(), job=number))

        yield report


def merged(stages: Sequence[StageCost]) -> list[StageCost]:
    """Those that have steps; two of the same kind after each other become one."""
    listed: list[StageCost] = []
    for cost in stages:
        if listed and listed[-1].stage is cost.stage:
            a, b = listed.pop(), cost
            steps, forward, backward = a.steps + b.steps, a.forward + b.forward, a.backward + b.backward
            cost = replace(a, steps=steps, forward=forward, backward=backward, closing=a.closing + b.closing)
        if cost.steps:
            listed.append(cost)
    return listed
