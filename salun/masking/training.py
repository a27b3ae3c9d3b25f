"""Masked training: the one loop. It knows named parameters and named losses, neither diffusion nor classifiers.

`losses(step)` must depend on its step alone, so that a resumed run takes the steps of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, isfinite, isnan, nan, pi
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from salun.compute.processes import ALONE, Processes
from salun.errors import Cancelled, TrainingError
from salun.masking.late import LateValues
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer, Mode
from salun.masking.proximal import SoftThreshold
from salun.masking.training_state import Checkpointer, LossRow, StateFile
from salun.progress import Event, Progress, Stage, silent

Losses = Callable[[int], Mapping[str, Tensor]]
"""step (0-based) → the step's losses by name, each a scalar with a graph. The first may be taken again (fp16)."""
Schedule = Callable[[int], float]
"""step (0-based) → learning rate."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""packed float32 vectors → their optimizer; its learning rate is set at every step."""


LARGEST_SCALE = 2.0**16  # of the loss of fp16 weights, in whose gradients small values would vanish


@dataclass(frozen=True)
class TrainingSettings:
    """How to minimize.

    Args:
        steps: Optimizer steps.
        lr: The learning rate of each step.
        optimizer: Makes the optimizer of the selected weights.
        weights: Factor of a named loss in the sum that is minimized; 1 for a loss that is not named here.
        soft_density: SalUn-soft's target density, or None for no soft threshold.
        protected: Name of a loss whose gradient the others must not oppose (gradient surgery), and which has no common
            graph with them; "" for none.
        max_norm: Norm that the gradient of a step is clipped to; None for no clipping.
        mode: "step" updates inside the backward pass. "pack", one update after it, is taken in any case with a soft
            threshold, gradient surgery, clipping, fp16 weights or several processes.
        stage: What progress is reported as.
        cpu_offload: Whether master weights and moments stay in CPU memory.
    """

    steps: int
    lr: Schedule
    optimizer: MakeOptimizer
    weights: Mapping[str, float] = field(default_factory=dict)
    soft_density: float | None = None
    protected: str = ""
    max_norm: float | None = None
    mode: Mode = "step"
    stage: Stage = Stage.TRAINING
    cpu_offload: bool = False


class Watch(Protocol):
    """Follows a training: sets its rate and weights, adds measurements to its history, begins it again, and ends it.

    All of it depends on the history alone, so that a resumed training goes the same way.
    """

    def before(self, history: list[LossRow]) -> float:
        """Called before each step: its learning rate."""

    def weights(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """Called after that: the factors of the losses in the step, from those of the settings."""

    def restarts(self, history: list[LossRow]) -> bool:
        """Whether the next step begins from the original weights."""

    def expected(self, history: list[LossRow]) -> int:
        """The step at which the training may end, for the progress."""

    def after(self, history: list[LossRow]) -> None:
        """Called after each step; adds what the last row lacks, so that a call that was interrupted is repeated."""

    def looks(self, history: list[LossRow]) -> bool:
        """Whether `after` looks at the network now, for which all losses must be known."""

    def failed(self, history: list[LossRow]) -> bool:
        """Called when the last row's loss or gradient was not finite.

        Returns whether the training begins again, or ends with earlier weights; False is an error.
        """

    def keep(self, history: list[LossRow], masters: Mapping[str, Tensor]) -> None:
        """Called after that: keeps a copy of the weights, float32 by name, if they may be taken at the end."""

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


def by_step(rates: Sequence[float]) -> Schedule:
    """A rate for each step."""
    return lambda step: rates[step]


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
        TrainingError: A loss or gradient is not finite, and no watch begins again; or the saved state belongs to
            another run.
        MaskError: The mask does not fit the parameters.
        Cancelled: From `progress`; the state is saved before.
    """
    half = any(p.dtype == torch.float16 for p in parameters.values())
    mode, scale = _mode(settings, half, processes), LARGEST_SCALE if half else 1.0
    with MaskedOptimizer(parameters, mask, settings.optimizer, mode, sources, settings.cpu_offload, scale) as optimizer:
        threshold = SoftThreshold(optimizer, settings.soft_density) if settings.soft_density is not None else None
        history = _History(_resumed(state, optimizer, settings.steps, processes), optimizer, processes, watch)
        rows, resumed = history.rows, len(history.rows)
        checkpointer = Checkpointer(state, optimizer) if state is not None and processes.rank == 0 else None
        try:
            if watch is not None and rows:
                _measured(watch, history, optimizer)  # what a cancel interrupted
            while (step := len(rows)) < settings.steps and not (watch is not None and watch.stops(rows)):
                anew = not step or _begins_again(watch, rows, optimizer, sources)
                optimizer.set_lr(settings.lr(step) if watch is None else watch.before(rows))
                weights = settings.weights if watch is None else watch.weights(settings.weights)
                how = processes, settings.protected, settings.max_norm
                take = partial(take_step, optimizer, losses, step, weights, *how)
                history.add(step, *(_first(take, optimizer) if half and anew else take()))
                if threshold is not None:
                    threshold(step + 1, settings.steps)
                total = settings.steps if watch is None else _measured(watch, history, optimizer)
                note = history.reported(_saved(checkpointer, history, len(rows) == total))
                progress(Event(settings.stage, len(rows), total, history.latest(), None, note, resumed))
                if stop is not None and stop(step + 1):
                    break
        except Cancelled:  # raised between steps, so masters, moments and history belong together
            if checkpointer is not None:
                checkpointer.save_on_cancel(history.settled(), history.scale)
            raise
        return _trained(optimizer, history.settled(), threshold)


def _mode(settings: TrainingSettings, half: bool, processes: Processes) -> Mode:
    """How gradients are taken: whether something needs all of them before the step. half: of fp16 weights."""
    at_once = settings.soft_density is not None or settings.max_norm is not None or settings.protected
    return "pack" if at_once or half or processes.count > 1 else settings.mode


def _resumed(state: StateFile | None, optimizer: MaskedOptimizer, steps: int, processes: Processes) -> list[LossRow]:
    """The history so far; the optimizer then has the saved masters, moments and loss scale."""
    if state is None or not processes.broadcast(state.path.exists()):
        return []
    return state.load(optimizer, steps)


def _first(
    take: Callable[[], tuple[tuple[str, ...], Tensor]], optimizer: MaskedOptimizer
) -> tuple[tuple[str, ...], Tensor]:
    """Take the first step until its loss scale fits fp16; a later one that does not is skipped."""
    taken = take()
    while bool(optimizer.found_inf) and not bool(optimizer.failed):
        taken = take()
    return taken


def _trained(optimizer: MaskedOptimizer, rows: list[LossRow], threshold: SoftThreshold | None) -> Trained:
    masters = {name: m.to("cpu", copy=True) for name, m in optimizer.masters.items()}
    return Trained(masters, rows, threshold.final_density() if threshold is not None else None)


def _saved(checkpointer: Checkpointer | None, history: _History, last: bool) -> str:
    """Save the state if it is time to; the reason of a failure, else ""."""
    due = checkpointer is not None and checkpointer.is_due(last)
    return checkpointer.save(history.settled(), history.scale) if checkpointer is not None and due else ""


class _History:
    """The losses of all steps, and the loss scale, as far as the device has computed them.

    Those of a step that is not read yet are NaN in its row. If a step's loss or gradient was not finite, reading them
    raises TrainingError, or, where a watch continues, ends the history with that step; the steps since then changed no
    weight. Several processes read them at once, so that all see it at the same step.
    """

    def __init__(
        self, rows: list[LossRow], optimizer: MaskedOptimizer, processes: Processes, watch: Watch | None
    ) -> None:
        self.rows, self.scale, self.processes = rows, float(optimizer.loss_scale), processes
        self._optimizer, self._watch, self._notes = optimizer, watch, list[str]()
        self._names: tuple[str, ...] = ()
        self._late = LateValues[tuple[int, tuple[str, ...]]](at_once=processes.count > 1)

    def add(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        """Note a step (0-based) whose losses of these names are on their way; see `take_step`."""
        self._names = names
        self.rows.append({"step": step + 1, **dict.fromkeys(names, nan)})
        self.processes.average([values])
        self._fill(self._late.add((step, names), values))

    def settled(self) -> list[LossRow]:
        """All rows, complete."""
        self._fill(self._late.rest())
        return self.rows

    def latest(self) -> LossRow:
        """The last step's losses, or, where they are on their way, those of the last step with the same ones."""
        read = (row for row in reversed(self.rows) if not isnan(row.get(self._names[0], nan)))
        row = next(read, dict.fromkeys(self._names, nan))
        return {name: row[name] for name in self._names if not isnan(row[name])}

    def reported(self, note: str) -> str:
        """A note after those of steps that failed, which are reported once."""
        notes, self._notes = [*self._notes, *filter(None, [note])], []
        return "; ".join(notes)

    def _fill(self, arrived: list[tuple[tuple[int, tuple[str, ...]], list[float]]]) -> None:
        for (step, names), (*losses, total, failed, self.scale) in arrived:
            known = dict(zip(names, losses, strict=True))
            if not isfinite(total) or failed:
                self._failed(step, known, total)
                return  # what was computed after it does not count
            self.rows[step].update(known)

    def _failed(self, step: int, losses: Mapping[str, float], total: float) -> None:
        """End the history with a step that failed, with those of its losses that are finite."""
        problem, advice = f"a gradient is not finite at step {step + 1}", "Lower the learning rate ({lr})"
        if not isfinite(total):
            problem, advice = f"the loss is {total} at step {step + 1}", "Use a smaller {lr}, or a wider {dtype}"
        ended = [*self.rows[:step], {"step": step + 1, **{n: each for n, each in losses.items() if isfinite(each)}}]
        if self._watch is None or not self._watch.failed(ended):
            raise TrainingError(problem, advice=advice)
        self._late.drop()
        self.rows[:] = ended
        self.scale = self._optimizer.forgive()
        again = self._watch.restarts(self.rows)
        self._notes.append(f"{problem}: " + ("training begins again" if again else "earlier weights are taken"))


def _begins_again(
    watch: Watch | None,
    history: list[LossRow],
    optimizer: MaskedOptimizer,
    sources: Mapping[str, Tensor] | None,
) -> bool:
    """Whether a watch lets the next step begin from the original weights, which are there then."""
    if watch is None or not watch.restarts(history):
        return False
    assert sources is not None
    optimizer.reset(sources)
    return True


def _measured(watch: Watch, history: _History, optimizer: MaskedOptimizer) -> int:
    """Let it add its measurements, the first process's for all; returns the step at which the training may end."""
    if watch.looks(history.rows):
        history.settled()
    rows = history.rows
    watch.after(rows)
    rows[-1] = history.processes.broadcast(rows[-1])
    watch.keep(rows, optimizer.masters)
    return len(rows) if watch.stops(rows) else watch.expected(rows)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ w·loss in the order of the losses; a loss without a weight is added as it is."""
    first, *others = (loss * weights[name] if name in weights else loss for name, loss in losses.items())
    total: Tensor = sum(others, first)
    return total


def take_step(
    optimizer: MaskedOptimizer,
    losses: Losses,
    step: int,
    weights: Mapping[str, float],
    processes: Processes = ALONE,
    protected: str = "",
    max_norm: float | None = None,
) -> tuple[tuple[str, ...], Tensor]:
    """Take one step, without waiting for the device.

    Args:
        step: 0-based.
        weights, protected, max_norm: As in `TrainingSettings`; a norm needs mode "pack".

    Returns:
        The names of its n losses, and float32 (n + 3,): the losses, their weighted sum, 1 if it failed as no smaller
        loss scale can mend, and the loss scale of the next step. After a step that failed no weight changes.
    """
    named = losses(step)
    total = weighted_sum(named, weights)
    reduce = processes.average if processes.count > 1 else None
    if protected:
        others = {name: loss for name, loss in named.items() if name != protected}
        optimizer.backward_apart(weighted_sum(others, weights), named[protected], weights.get(protected, 1.0), reduce)
    else:
        optimizer.backward(total)
    if optimizer.mode == "pack":
        optimizer.step(max_norm, reduce=reduce, reduced=bool(protected))
    device = total.device
    ends = [each.to(device, non_blocking=True) for each in (optimizer.failed, optimizer.loss_scale)]
    values = [loss.detach().float() for loss in (*named.values(), total)]
    return tuple(named), torch.stack([*values, *ends])
