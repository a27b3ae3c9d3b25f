"""Masked training: the one loop. It knows named parameters and named losses, neither diffusion nor classifiers.

`losses(step)` must depend on its step alone, so that a resumed run takes the steps of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from salun.compute.processes import ALONE, Processes
from salun.errors import Cancelled, TrainingError
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer, Mode
from salun.masking.proximal import SoftThreshold
from salun.masking.training_state import Checkpointer, LossRow, StateFile
from salun.progress import Event, Progress, Stage, silent

Losses = Callable[[int], Mapping[str, Tensor]]
"""step (0-based) → the step's losses by name, each a scalar with a graph. A step may be taken again (fp16)."""
Schedule = Callable[[int], float]
"""step (0-based) → learning rate."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""packed float32 vectors → their optimizer; its learning rate is set at every step."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to minimize.

    Args:
        steps: Optimizer steps.
        lr: The learning rate of each step.
        optimizer: Makes the optimizer of the selected weights.
        weights: Factor of a named loss in the sum that is minimized; 1 for a loss that is not named here.
        soft_density: SalUn-soft's target density, or None for no soft threshold.
        mode: "step" updates inside the backward pass. "pack", one update after it, is taken in any case with a soft
            threshold, fp16 weights or several processes.
        stage: What progress is reported as.
        cpu_offload: Whether master weights and moments stay in CPU memory.
    """

    steps: int
    lr: Schedule
    optimizer: MakeOptimizer
    weights: Mapping[str, float] = field(default_factory=dict)
    soft_density: float | None = None
    mode: Mode = "step"
    stage: Stage = Stage.TRAINING
    cpu_offload: bool = False


class Watch(Protocol):
    """Follows a training: sets its rate, adds measurements to its history, begins it again, and ends it.

    All of it depends on the history alone, so that a resumed training goes the same way.
    """

    def before(self, history: list[LossRow]) -> float:
        """Called before each step: its learning rate."""

    def restarts(self, history: list[LossRow]) -> bool:
        """Whether the next step begins from the original weights."""

    def expected(self, history: list[LossRow]) -> int:
        """The step at which the training may end, for the progress."""

    def after(self, history: list[LossRow]) -> None:
        """Called after each step; adds what the last row lacks, so that a call that was interrupted is repeated."""

    def stops(self, history: list[LossRow]) -> bool:
        """Whether to end the training here."""


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        masters: Name → float32 values of the selected weights, to be rounded to the checkpoint's dtype on writing.
        history: One row a step: {"step": 1, …} and its losses by name, before weighting.
        final_density: Fraction of weights that SalUn-soft changed; None without a soft threshold.
    """

    masters: dict[str, Tensor]
    history: list[LossRow] = field(default_factory=list)
    final_density: float | None = None


def constant(lr: float) -> Schedule:
    """The same learning rate at every step."""
    return lambda step: lr


def linear_decay(lr: float, steps: int, fraction: float) -> Schedule:
    """A rate that falls linearly to 0 over the last `fraction` of the steps, so that their noise leaves the weights."""
    falling = fraction * steps
    return lambda step: lr * (min(1.0, (steps - step) / falling) if falling else 1.0)


def cosine_decay(lr: float, steps: int) -> Schedule:
    """A rate that falls to 0 along a half cosine."""
    return lambda step: lr * (1 + cos(pi * step / steps)) / 2


def train(
    parameters: Mapping[str, nn.Parameter],
    mask: Mask,
    losses: Losses,
    settings: TrainingSettings,
    progress: Progress = silent,
    *,
    stop: Callable[[int], bool] | None = None,
    watch: Watch | None = None,
    sources: Mapping[str, Tensor] | None = None,
    state: StateFile | None = None,
    processes: Processes = ALONE,
) -> Trained:
    """Minimize the weighted sum of the losses over the selected weights; all others are never written.

    Args:
        parameters: Every parameter in the mask's scope, by name.
        stop: Called with the number of steps taken after each; True ends the training early.
        watch: Takes the place of the settings' learning rate, and may end the training early.
        sources: The checkpoint's tensors before any cast, from which master weights are gathered; a watch needs them.
        state: Where masters, moments and losses are saved while running; a state that is there is resumed. The caller
            removes it once the result is written.
        processes: Each gives the losses of its part of the batch. Packed gradients are averaged, so that all hold the
            same weights; the first process saves.

    Raises:
        TrainingError: A loss or gradient is not finite, or the saved state belongs to another run.
        MaskError: The mask does not fit the parameters.
        Cancelled: From `progress`; the state is saved before.
    """
    half = any(p.dtype == torch.float16 for p in parameters.values())
    mode: Mode = "pack" if settings.soft_density is not None or half or processes.count > 1 else settings.mode
    with MaskedOptimizer(parameters, mask, settings.optimizer, mode, sources, settings.cpu_offload) as optimizer:
        threshold = SoftThreshold(optimizer, settings.soft_density) if settings.soft_density is not None else None
        history, scale = _resumed(state, optimizer, settings.steps, 2.0**16 if half else 1.0, processes)
        resumed = len(history)
        checkpointer = Checkpointer(state, optimizer) if state is not None and processes.rank == 0 else None
        try:
            if watch is not None and history:
                _measured(watch, history, processes)  # what a cancel interrupted
            for step in range(len(history), settings.steps):
                if watch is not None and watch.stops(history):
                    break
                optimizer.set_lr(_rate(step, settings, watch, history, optimizer, sources))
                named, scale = _step(optimizer, losses, step, settings.weights, scale, processes)
                history.append({"step": (done := step + 1), **_values(named, processes)})
                if threshold is not None:
                    threshold(done, settings.steps)
                total = settings.steps if watch is None else _measured(watch, history, processes)
                failure = checkpointer.save_if_due(history, scale, done == total) if checkpointer is not None else ""
                shown = {name: history[-1][name] for name in named}
                progress(Event(settings.stage, done, total, shown, None, failure, resumed))
                if stop is not None and stop(done):
                    break
        except Cancelled:  # raised between steps, so masters, moments and history belong together
            if checkpointer is not None:
                checkpointer.save_on_cancel(history, scale)
            raise
        density = threshold.final_density() if threshold is not None else None
        return Trained({name: m.to("cpu", copy=True) for name, m in optimizer.masters.items()}, history, density)


def _resumed(
    state: StateFile | None, optimizer: MaskedOptimizer, steps: int, scale: float, processes: Processes
) -> tuple[list[LossRow], float]:
    """The history so far, and the scale of the loss, so that small gradients do not vanish in fp16."""
    if state is None or not processes.broadcast(state.path.exists()):
        return [], scale
    return state.load(optimizer, steps, scale)


def _rate(
    step: int,
    settings: TrainingSettings,
    watch: Watch | None,
    history: list[LossRow],
    optimizer: MaskedOptimizer,
    sources: Mapping[str, Tensor] | None,
) -> float:
    """The learning rate of a step, which a watch may let begin from the original weights."""
    if watch is None:
        return settings.lr(step)
    if watch.restarts(history):
        assert sources is not None
        optimizer.reset(sources)
    return watch.before(history)


def _measured(watch: Watch, history: list[LossRow], processes: Processes) -> int:
    """Let it add its measurements, the first process's for all; returns the step at which the training may end."""
    watch.after(history)
    history[-1] = processes.broadcast(history[-1])
    return len(history) if watch.stops(history) else watch.expected(history)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ w·loss in the order of the losses; a loss without a weight is added as it is."""
    first, *others = (loss * weights[name] if name in weights else loss for name, loss in losses.items())
    total: Tensor = sum(others, first)
    return total


def _step(
    optimizer: MaskedOptimizer,
    losses: Losses,
    step: int,
    weights: Mapping[str, float],
    scale: float,
    processes: Processes,
) -> tuple[Mapping[str, Tensor], float]:
    """Take one step; returns its losses, and the loss scale, which is halved until every gradient fits fp16."""
    while True:
        named = losses(step)
        total = weighted_sum(named, weights)
        _check_finite(total, step, processes)
        optimizer.backward(total, scale)
        if optimizer.mode == "pack":
            finite = optimizer.step(reduce=processes.average if processes.count > 1 else None)
        else:
            finite = not optimizer.not_finite
        if finite:
            return named, scale
        if scale == 1.0:
            raise TrainingError(f"a gradient is not finite at step {step + 1}", advice="Lower the learning rate ({lr})")
        scale /= 2  # the step changed no weight, and is taken again


def _check_finite(loss: Tensor, step: int, processes: Processes) -> None:
    """Raises TrainingError on all processes if the loss of one is not finite, so that none waits for it."""
    if processes.count > 1:
        bad = (~torch.isfinite(loss.detach())).float().view(1)
        processes.all_reduce_sum([bad])
        if bad.item():
            raise TrainingError(f"the loss is not finite at step {step + 1}", advice="Lower the learning rate ({lr})")


def _values(named: Mapping[str, Tensor], processes: Processes) -> LossRow:
    """The losses as numbers, averaged over the processes."""
    values = torch.stack([loss.detach() for loss in named.values()]).float()
    processes.average([values])
    return dict(zip(named, values.tolist(), strict=True))
