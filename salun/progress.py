"""How the core reports progress to a host, and how a host stops a run.

A host implements one method. It raises `Cancelled` from it to stop the run at the next step; the run then leaves no
incomplete file, and a state to resume from where it has a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """

    stage: Stage
    steps: int
    forward: int = 0
    backward: int = 0
    most: int = 0

    @property
    def passes(self) -> int:
        """In passes without gradients: a forward and backward pass costs as much as three of them."""
        return self.forward + 3 * self.backward


@dataclass(frozen=True)
class Event:
    """One step of one stage.

    stage: what is being done.
    step, total: 1-based position; total 0 where it is not known.
    metrics: metrics known at this step, such as losses.
    image: uint8 (h, w, 3), a preview, where there is one.
    message: a line for people, where there is one.
    restored: how many of the steps took no time: from the cache, or taken before the run was resumed.
    stages: what the run does, in order, in the event that announces it.
    """

    stage: Stage
    step: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    image: np.ndarray | None = None
    message: str = ""
    restored: int = 0
    stages: Sequence[StageCost] = ()


class Progress(Protocol):
    """A host's callback, called at every step from the thread of the run."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """A progress that reports nothing."""
