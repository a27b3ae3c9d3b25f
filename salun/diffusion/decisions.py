"""What a training towards a goal does next, decided from its probes so far.

Decisions depend on the recorded probes alone, so that a resumed training takes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from salun.diffusion.goal import PLAUSIBLE, SURE, Goal, Probed

FASTER, MOST = 3.0, 27.0  # by which the rate rises while UA does not move, and at most in all
SLOWER, BACK = 0.5, 0.25  # by which it falls where other images are harmed, and where the model is wrecked
HEAVIER = 3.0  # by which the retain loss's weight rises where other images are harmed
GUIDED, FARTHEST = 0.25, 0.75  # by which the target's guidance η rises where the anchor is not enough; at most in all
HARDEST, UNSETTLED = 1.5, 2.0  # at most, where attacks succeed; drift at a constant rate, in times of that at the end
PAIR, STUCK, MOVED = 2, 4, 0.05  # probes that are compared; those without progress; what progress is, a fraction
UNMOVED = 0.1  # UA up to which the rate is too low, rather than the anchor not enough
SETTLING = 3  # probe intervals, at least, over which the rate falls to 0
TRIES, RESTARTS = 4, 3  # at lower rates against harm to other images, and from the original weights
BETTER, VAIN = 0.95, 2  # a try that leaves more harm than this times the least so far is in vain; tries in vain at most


class Phase(str, Enum):
    """What a training towards a goal does next."""

    CONTINUE = "continue"
    SETTLE = "settle"  # take the noise of the steps out of the weights: let the learning rate fall to 0
    REACHED = "reached"
    GIVE_UP = "give up"

    __str__ = str.__str__


@dataclass(frozen=True)
class Decision:
    """What follows from the probes so far.

    Args:
        start: The step after which it was taken.
        length: Steps to the next probe.
        factor: Of the learning rate.
        retain: Of the retain loss's weight.
        guidance: η of the forget target, beyond that of the options (see `frozen_predictions`).
        restart: Whether to begin again from the original weights.
        unfinished: Concepts that still show, or whose anchor does not, by number; empty before the first probe.
        grown: Whether few forget latents do not suffice: UA, or the anchor, stands still or was lost.
    """

    phase: Phase
    start: int
    length: int
    factor: float = 1.0
    guidance: float = 0.0
    restart: bool = False
    unfinished: tuple[int, ...] = ()
    retain: float = 1.0
    grown: bool = False

    @property
    def harmed(self) -> bool:
        """Whether other images were harmed, so that few retain samples do not suffice."""
        return self.retain > 1


def decide(goal: Goal, probes: Sequence[Probed], every: int, budget: int, guided: bool = True) -> Decision:
    """What to do after these probes of a training.

    Train at a constant rate, with a probe every so many steps, until the concept is plausibly gone and the anchor
    shown. Then let the rate fall to 0, over half as many steps again, and look closely: if the goal holds, it is
    reached; if UA was lost, train on, towards a target further from the concept; if other images are harmed, and no
    smaller change helps, train on at half the rate, falling again, with more retain samples and weight on them. While
    UA stands still, the rate rises, or, where the concept is gone from some images, the target moves, and so it does
    while attacks succeed and other images stay. Where the concept is gone and the anchor is not shown, training
    continues with more forget samples, and ends where that stands still. A wrecked model, or a loss that is not finite:
    training begins again from the original weights, at a quarter of the rate.

    Args:
        every: Steps between probes.
        budget: Steps at most.
        guided: Whether the method's target can move; otherwise the rate rises in its place.
    """
    *_, last = _decisions(goal, probes, every, budget, guided)
    return last


def best_of(goal: Goal, probes: Sequence[Probed], every: int, budget: int, guided: bool = True) -> Probed | None:
    """The probe nearest to the goal of those after the rate fell to 0, the last of equals.

    None where all of them found the model wrecked, and before the first of them. Arguments as of `decide`.
    """
    decisions = _decisions(goal, probes, every, budget, guided)
    settled = [probe for probe, before in zip(probes, decisions, strict=False) if before.phase is Phase.SETTLE]
    usable = [each for each in reversed(settled) if not each.wrecked]
    return max(usable, key=lambda each: each.nearness(goal), default=None)


def _decisions(
    goal: Goal, probes: Sequence[Probed], every: int, budget: int, guided: bool = True
) -> Iterator[Decision]:
    """The first decision, and the one after each probe."""
    short = budget <= (SETTLING + 1) * every  # no more than those that settle
    now = Decision(Phase.SETTLE, 0, budget) if short else Decision(Phase.CONTINUE, 0, every)
    yield now
    constant, idle, tries, vain, restarts = 0, -1, 0, 0, 0  # constant: steps at a constant rate
    retain, harm, settled_at = 1.0, math.inf, -1.0  # the least harm, and the last `progress`, of those that settled
    for i, probe in enumerate(probes):
        settled, factor, guidance, restart = now.phase is Phase.SETTLE, now.factor, now.guidance, False
        grown = now.grown
        constant += 0 if settled else now.length
        end = probe.step >= budget
        if settled and probe.reaches(goal):
            phase = Phase.REACHED
        elif probe.wrecked and restarts < RESTARTS and probe.step + (SETTLING + 1) * every <= budget:
            phase, factor, restart = Phase.CONTINUE, factor * BACK, True
            restarts, constant, idle = restarts + 1, 0, i
            tries, vain, harm, settled_at = 0, 0, math.inf, -1.0
        elif end or probe.wrecked:
            phase = Phase.GIVE_UP
        elif _attacked(goal, probe, now.guidance, settled) and probe.confidence >= (SURE if settled else PLAUSIBLE):
            phase, guidance, idle, grown = Phase.CONTINUE, min(guidance + GUIDED, HARDEST), i, True
        elif settled and probe.sure:
            vain += not probe.harm(goal) < BETTER * harm
            harmed = probe.harm(goal) > 1  # else attacks succeed, against which less harm does not help
            phase = Phase.SETTLE if harmed and tries < TRIES and vain < VAIN else Phase.GIVE_UP
            tries, harm, settled_at = tries + 1, min(harm, probe.harm(goal)), -1.0
            factor, retain = (factor * SLOWER, HEAVIER) if phase is Phase.SETTLE else (factor, retain)
        elif settled:
            before, stands = (factor, guidance), probe.progress < settled_at + MOVED
            if probe.gone < PLAUSIBLE:
                factor, guidance = _stronger(factor, guidance, guided)
                vain_now = (factor, guidance) == before and (stands or probe.ua <= UNMOVED)  # nothing is left to raise
            else:
                vain_now = probe.gone >= SURE and stands
            phase, idle, settled_at = Phase.GIVE_UP if vain_now else Phase.CONTINUE, i, probe.progress
            grown = grown or probe.confidence < PLAUSIBLE
        else:
            phase = Phase.SETTLE if probe.confidence >= PLAUSIBLE else Phase.CONTINUE
            since = probes[idle + 1 : i + 1]
            if phase is Phase.CONTINUE and probe.gone < PLAUSIBLE and _stands_still(since, "ua"):
                before = factor, guidance
                factor, guidance = _stronger(factor, guidance, guided and probe.ua > UNMOVED)
                grown, idle = grown or probe.ua > UNMOVED, i
                phase = Phase.SETTLE if (factor, guidance) == before else Phase.CONTINUE  # nothing is left to raise
            elif phase is Phase.CONTINUE and probe.gone >= PLAUSIBLE and _stands_still(since, "progress"):
                phase, grown, idle = Phase.SETTLE if grown else Phase.CONTINUE, True, i  # what lacks is the anchor
        length = max(SETTLING * every, constant // 2)
        if phase is Phase.CONTINUE and probe.step + every + length > budget and not restart:
            phase = Phase.SETTLE  # the last steps are always those that settle
        length = min(length if phase is Phase.SETTLE else every, budget - probe.step)
        unfinished = tuple(k for k, each in enumerate(probe.concepts) if each.confidence < PLAUSIBLE)
        now = Decision(phase, probe.step, length, factor, guidance, restart, unfinished, retain, grown)
        yield now


def _attacked(goal: Goal, probe: Probed, guidance: float, settled: bool) -> bool:
    """Whether attacks succeed, and the target may yet move further from the concept."""
    retained = probe.drift is None or probe.harm(goal) <= (1.0 if settled else UNSETTLED)
    return probe.asr is not None and not probe.withstands(goal) and retained and guidance < HARDEST


def _stronger(factor: float, guidance: float, guided: bool) -> tuple[float, float]:
    """The learning rate's factor and η where the concept stays: one of them rises, up to its limit.

    An η that attacks have raised beyond that stays.
    """
    if guided:
        return factor, max(guidance, min(guidance + GUIDED, FARTHEST))
    return min(factor * FASTER, MOST), guidance


def _stands_still(since: Sequence[Probed], name: Literal["ua", "progress"]) -> bool:
    """Whether a value of the probes since the last change has not moved, and other images are there still."""
    if len(since) < PAIR or all(probe.drift is None for probe in since):
        return False
    values: list[float] = [getattr(probe, name) for probe in since]
    recent, earlier = sum(values[-PAIR:]) / PAIR, sum(values[-STUCK : -STUCK + PAIR]) / PAIR
    return recent <= UNMOVED or (len(since) >= STUCK and recent - earlier < MOVED)
