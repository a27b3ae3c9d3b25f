"""How far a whole job is, and how long it still takes, from the steps of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salun.diffusion.plan import Plan

KNOWN_FROM = 0.03  # of the job: before that a time left would be a guess
CORRECTED = 1.5  # a time left that turns out this many times too short is put right; less than that only counts down


def shares_of_erasure(plan: Plan) -> dict[str, float]:
    """Stage → its share of an erasure, in the order of the stages, by the passes through the UNet that it takes."""
    concepts, options = len(plan.concepts), plan.options
    forget, retain = plan.forget_latents * concepts, plan.retain_latents
    drawn = (0 if options.forget_images else forget) + (forget if plan.anchor_share else 0) + retain
    pictures = plan.eval_images * (concepts + 1) * plan.sampling.passes
    backward = 3  # a backward pass costs two forward ones
    scored = options.method == "salun" and options.mask in ("saliency", "shuffled")
    passes = {
        "sampling": drawn * plan.sampling.passes,
        "images before": pictures,
        "saliency": forget * plan.saliency_timesteps * 2 * backward if scored else 0,
        "frozen targets": plan.steps * plan.batch_size * 2 if plan.needs_frozen else 0,
        "training": plan.steps * plan.batch_size * 2 * backward,
        "images after": pictures,
    }
    whole = sum(passes.values()) / 0.95
    return {**{stage: n / whole for stage, n in passes.items()}, "saving": 0.05}


class ProgressEstimator:
    """The position of a job: `at` takes a stage's step and gives (fraction done, seconds left or None).

    The fraction never falls. The time left is (1 − fraction) × the seconds that a unit of the present stage takes.
    """

    def __init__(self, shares: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._shares, self._now = dict(shares), now
        self.fraction = 0.0
        self._stage = ""
        self._began = (0.0, 0.0)  # when and at which fraction the stage began
        self._rate: float | None = None  # seconds for the whole job at the present pace
        self._told: tuple[float, float] | None = None  # when and what was told last

    def at(self, stage: str, step: int, total: int) -> tuple[float, float | None]:
        """Take note of a step. A stage without a share does not move the position."""
        now = self._now()
        if stage in self._shares and total:
            before = sum(share for name, share in list(self._shares.items())[: list(self._shares).index(stage)])
            done = step - 1 if stage == "saving" else step  # told before each file, not after
            reached = before + self._shares[stage] * min(max(done, 0) / total, 1.0)
            if stage != self._stage:
                self._stage, self._began = stage, (now, reached)
            gone, won = now - self._began[0], reached - self._began[1]
            if won > 0 and gone > 0.5:
                self._rate = gone / won
            self.fraction = max(self.fraction, reached)
        return self.fraction, self._left(now)

    def _left(self, now: float) -> float | None:
        if self._rate is None or self.fraction < KNOWN_FROM:
            return None
        left = (1 - self.fraction) * self._rate
        if self._told is not None:
            expected = max(0.0, self._told[1] - (now - self._told[0]))
            if expected < left <= CORRECTED * expected + 10:
                left = expected
        self._told = (now, left)
        return left
