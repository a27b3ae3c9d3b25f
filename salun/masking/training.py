"""Masked fine-tuning: the loop. It knows named parameters and two losses, neither diffusion nor classifiers.

Everything random in a step comes from `step_generator(seed, step)`, so a resumed run takes the very steps that the
uninterrupted one would have taken.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salun.checkpoints import safetensors_io
from salun.compute.processes import ALONE, Processes
from salun.errors import Cancelled, ConfigError, ModelError, TrainingError
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer, Mode
from salun.masking.proximal import SoftThreshold
from salun.progress import Event, Progress, Stage, silent

logger = logging.getLogger("salun")
Losses = Callable[[int], tuple[Tensor, Tensor]]
"""step (0-based) → (forget loss, retain loss), each a scalar with a graph."""


@dataclass(frozen=True)
class TrainingSettings:
    """steps: optimizer steps. lr: Adam's. retain_weight: the papers' α. soft_density: SalUn-soft's target, or None.

    lr_decay: share of the steps, at the end, over which the rate falls linearly to 0, so that the last steps' noise
    does not stay in the weights (0: constant, as in the paper). save_every: seconds between saved states; more where
    saving itself takes long, so that it costs a tenth of the time at most; 0: after every step. fingerprint: what a
    saved state must carry to be taken up again. optimizer: adam, or adam8bit (bitsandbytes': its moments take a quarter
    of the memory).
    """

    steps: int
    lr: float
    retain_weight: float
    soft_density: float | None = None
    lr_decay: float = 0.0
    save_every: float = 60.0
    fingerprint: str = ""
    optimizer: str = "adam"


@dataclass(frozen=True)
class Trained:
    """What came of it.

    masters: name → float32 values of the salient entries, to be rounded to the checkpoint's dtype where it is written.
    history: (step, forget loss, retain loss), steps counted from 1. final_density: SalUn-soft's, else None.
    """

    masters: dict[str, Tensor]
    history: list[tuple[int, float, float]] = field(default_factory=list)
    final_density: float | None = None


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: a CPU generator that depends on the run's seed and the step alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 7_919 + 17) % (1 << 63))


def fine_tune(
    parameters: Mapping[str, nn.Parameter],
    mask: Mask,
    losses: Losses,
    settings: TrainingSettings,
    progress: Progress = silent,
    sources: Mapping[str, Tensor] | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
    cpu_offload: bool = False,
) -> Trained:
    """Minimise forget + α·retain over the masked entries with Adam.

    sources: the checkpoint's own tensors, before any cast. state_path: where masters, moments and losses are kept while
    running (removed by the caller once the result is written); with `resume` a state found there is taken up.
    processes: each gives the losses of its own share of the batch; the packed gradients are averaged, so that all hold
    the same weights, and the first one saves. on_host: masters and moments stay in host memory.
    Raises TrainingError for a loss or gradient that is not finite, MaskError for a mask that does not fit; `Cancelled`
    from `progress` passes through, with the state saved.
    """
    soft, keeps = settings.soft_density is not None, processes.rank == 0

    def make(masters: object) -> torch.optim.Optimizer:
        if settings.optimizer == "adam8bit":
            return _adam8bit(masters, settings.lr)
        return torch.optim.Adam(masters, lr=settings.lr, fused=_can_fuse(parameters, cpu_offload))  # type: ignore[arg-type]

    history: list[tuple[int, float, float]] = []
    half = any(p.dtype == torch.float16 for p in parameters.values())
    mode: Mode = "pack" if soft or half or processes.count > 1 else "step"
    scale = 2.0**16 if half else 1.0  # of the loss, so that small gradients do not vanish in fp16
    with MaskedOptimizer(parameters, mask, make, mode, sources, cpu_offload) as optimizer:
        proximal = SoftThreshold(optimizer, settings.soft_density) if settings.soft_density is not None else None
        if resume and state_path is not None and processes.share(state_path.exists()):
            history, scale = _load_state(state_path, optimizer, settings, scale)
        wait, saved = settings.save_every, time.monotonic()
        try:
            for step in range(len(history), settings.steps):
                optimizer.set_lr(settings.lr * _lr_factor(step, settings))
                while True:
                    forget, retain = losses(step)
                    _all_finite(forget + retain, step, processes)
                    optimizer.backward(forget + settings.retain_weight * retain, scale)
                    fine = optimizer.step(reduce=processes.average) if mode == "pack" else not optimizer.not_finite
                    if fine or scale == 1.0:
                        break
                    scale /= 2  # a gradient was too large for fp16: the step was left out, and is taken again
                if not fine:
                    raise TrainingError(
                        f"a gradient stopped being finite at step {step + 1}: lower the learning rate (--lr)"
                    )
                if proximal is not None:
                    proximal(step + 1, settings.steps)
                seen = torch.stack([forget.detach(), retain.detach()]).float()
                processes.average([seen])
                history.append((step + 1, float(seen[0]), float(seen[1])))
                now = time.monotonic()
                if keeps and state_path is not None and (now - saved >= wait or step + 1 == settings.steps):
                    try:
                        _save_state(state_path, optimizer, history, scale, settings.fingerprint)
                    except ModelError as error:  # a full disk costs the means to resume, not the run
                        progress(
                            Event(Stage.TRAINING, step + 1, settings.steps, message=f"the state is not saved: {error}")
                        )
                    saved = time.monotonic()
                    wait = max(settings.save_every, 10 * (saved - now)) if settings.save_every else 0.0
                progress(
                    Event(
                        Stage.TRAINING, step + 1, settings.steps, {"forget": history[-1][1], "retain": history[-1][2]}
                    )
                )
        except Cancelled:  # raised between steps, so masters, moments and history belong together
            if keeps and state_path is not None:
                try:
                    _save_state(state_path, optimizer, history, scale, settings.fingerprint)
                except ModelError as error:  # a full disk: what was stopped is stopped nevertheless
                    logger.warning("the state to go on from is not saved: %s", error)
            raise
        return Trained(
            {name: m.to("cpu", copy=True) for name, m in optimizer.masters.items()},
            history,
            proximal.final_density() if proximal is not None else None,
        )


def _all_finite(loss: Tensor, step: int, processes: Processes) -> None:
    """Raises TrainingError on all processes if the loss of one is not finite, so that none waits for it."""
    if processes.count > 1:
        bad = (~torch.isfinite(loss.detach())).float().view(1)
        processes.all_reduce_sum([bad])
        if bad.item():
            raise TrainingError(f"the loss stopped being finite at step {step + 1}: lower the learning rate (--lr)")


def check_optimizer(name: str) -> None:
    """Raises ConfigError if an optimizer's library is not installed."""
    if name == "adam8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "is adam8bit, but bitsandbytes is not installed",
            option="optimizer",
            advice="`pip install salun[bitsandbytes]`, or use adam",
            code="no-bitsandbytes",
        )


def _adam8bit(masters: object, lr: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Adam8bit

    made: torch.optim.Optimizer = Adam8bit(masters, lr=lr)
    return made


def _can_fuse(parameters: Mapping[str, nn.Parameter], cpu_offload: bool) -> bool:
    """Whether torch has a one-kernel Adam where the masters lie: on CUDA always, on the CPU since 2.4."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    places = {"cpu"} if cpu_offload else {p.device.type for p in parameters.values()}
    return all(place == "cuda" or (place == "cpu" and release >= (2, 4)) for place in places)


def _lr_factor(step: int, settings: TrainingSettings) -> float:
    """The share of the learning rate left at a step (0-based)."""
    falling = settings.lr_decay * settings.steps
    return min(1.0, (settings.steps - step) / falling) if falling else 1.0


def _save_state(
    path: Path, optimizer: MaskedOptimizer, history: list[tuple[int, float, float]], scale: float, fingerprint: str
) -> None:
    metadata = {"history": json.dumps(history), "scale": str(scale), "fingerprint": fingerprint}
    safetensors_io.write(path, {name: t.detach().cpu() for name, t in optimizer.state().items()}, metadata)


def read_saved_history(path: Path, fingerprint: str, most: int | None = None) -> list[tuple[int, float, float]]:
    """The history of a saved state, which may be untrusted input, without its tensors; empty where there is none.

    most: steps that the run takes in all. Raises TrainingError for a state that cannot be read, belongs to another run,
    or whose history is not one of steps 1, 2, … with finite losses.
    """
    if not path.exists():
        return []
    try:
        metadata = safetensors_io.read_header(path).metadata
        if metadata.get("fingerprint") == fingerprint:
            history = _history(json.loads(metadata["history"]))
    except (ModelError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"the saved state {path} cannot be read ({error}): delete it to train afresh") from error
    if metadata.get("fingerprint") != fingerprint:
        raise TrainingError(
            f"the saved state {path} belongs to other options or another model: repeat those, or delete it"
        )
    if most is not None and len(history) > most:
        raise TrainingError(
            f"the saved state {path} has taken {len(history)} steps, but the run takes {most}: delete it to "
            "train afresh"
        )
    return history


def _history(found: Any) -> list[tuple[int, float, float]]:
    """(step, forget loss, retain loss) of steps 1, 2, …; raises ValueError or TypeError for anything else."""
    history = [(step, forget, retain) for step, forget, retain in found]
    for i, (step, *losses) in enumerate(history, 1):
        if (
            type(step) is not int
            or step != i
            or not all(type(loss) is float and math.isfinite(loss) for loss in losses)
        ):
            raise ValueError(f"entry {i} of its history is not step {i} with two finite losses")
    return history


def _load_state(
    path: Path, optimizer: MaskedOptimizer, settings: TrainingSettings, largest: float
) -> tuple[list[tuple[int, float, float]], float]:
    """The history and loss scale of a saved state, whose tensors the optimizer takes. largest: scale of a fresh run."""
    history = read_saved_history(path, settings.fingerprint, settings.steps)
    header = safetensors_io.read_header(path)
    scale = _scale(header.metadata.get("scale", ""), largest)
    if scale is None:
        raise TrainingError(
            f"the saved state {path} has a loss scale that is not a power of 2 from 1 to {largest:g}: delete it to "
            "train afresh"
        )
    optimizer.check_state({name: (safetensors_io.DTYPES[e.dtype], e.shape) for name, e in header.entries.items()})
    optimizer.load_state(dict(safetensors_io.tensors(path)), len(history))
    return history, scale


def _scale(text: str, largest: float) -> float | None:
    """The loss scale that halving the largest can lead to; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 1.0 <= value <= largest and math.frexp(value)[0] == 0.5 else None
