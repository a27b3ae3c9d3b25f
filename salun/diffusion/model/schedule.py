"""Noise schedules: how noise is mixed in, what the network predicts, and ᾱ from a diffusers scheduler config.

A config describes both how a model was trained (betas, prediction type) and a sampler. salun trains by the first and
samples by its own sampler, so what only a sampler reads (`timestep_spacing`, `steps_offset`, `set_alpha_to_one`,
`clip_sample`, `thresholding`, sigmas) counts only where that sampler is the config's own: see `sampler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints.safetensors_io import truncated
from salun.errors import ModelError, some

FIELDS = (  # by which diffusers defines ᾱ
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_USUAL = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
_SCALED = {**_NARROW, "beta_schedule": "scaled_linear"}
DEFAULTS: dict[str, dict[str, Any]] = {  # schedulers that define ᾱ by betas, and which of their defaults are unusual
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": _NARROW,
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "LCMScheduler": _SCALED,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": _SCALED,
    "UniPCMultistepScheduler": {},
}
COSINE = "squaredcos_cap_v2"
MOST_TIMESTEPS = 100_000


def schedule_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of `FIELDS` that the config or its scheduler's defaults give: each scheduler of diffusers takes them.

    Raises ModelError for a scheduler whose noise is not defined by betas.
    """
    scheduler = config.get("_class_name", "DDIMScheduler")
    if scheduler not in DEFAULTS:
        raise ModelError(
            f"{name} has the unsupported scheduler {truncated(str(scheduler))!r}: salun supports models that were "
            "trained with betas (DDIM, DDPM, PNDM, Euler, DPM-Solver, UniPC, LCM and others)"
        )
    if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        what = "use_flow_sigmas" if config.get("use_flow_sigmas") else "timestep_type 'continuous'"
        raise ModelError(f"the scheduler config of {name} sets {what}, which is not supported")
    return {**_USUAL, **DEFAULTS[scheduler], **{key: config[key] for key in FIELDS if key in config}}


def alphas_cumprod(config: Mapping[str, Any], name: str) -> Tensor:
    """ᾱ_t, float32 (T,), from a diffusers scheduler config. Raises ModelError for an unsupported one."""
    fields = schedule_fields(config, name)
    steps = fields["num_train_timesteps"]
    if type(steps) is not int or not 2 <= steps <= MOST_TIMESTEPS:
        raise ModelError(
            f"the scheduler config of {name} has {truncated(repr(steps))} as num_train_timesteps; a whole number from "
            f"2 to {MOST_TIMESTEPS:,} is expected"
        )
    trained, kind = fields.get("trained_betas"), fields["beta_schedule"]
    if trained is not None:  # whatever the other fields say, as in diffusers
        betas = _trained(trained, steps, name)
    elif kind == COSINE:  # Nichol & Dhariwal 2021, eq. 17
        s = torch.arange(steps + 1, dtype=torch.float64) / steps
        bars = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999).float()
    elif kind not in ("linear", "scaled_linear"):
        known = f"linear, scaled_linear, {COSINE} and trained_betas"
        raise ModelError(f"{name} has the noise schedule {truncated(str(kind))!r}; salun supports {known}")
    else:
        start, end = (_beta(fields[key], key, name) for key in ("beta_start", "beta_end"))
        power = 2 if kind == "scaled_linear" else 1
        betas = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float32) ** power
    alphas = torch.cumprod(1 - betas, 0)
    if fields.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
    return alphas


def _beta(value: Any, key: str, name: str) -> float:
    if not _is_beta(value):
        what = f"{truncated(repr(value))} as {key}"
        raise ModelError(f"the scheduler config of {name} has {what}; a number between 0 and 1 is expected")
    return float(value)


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _trained(values: Any, steps: int, name: str) -> Tensor:
    """β_t as the config lists them. Raises ModelError unless there is one of each timestep, between 0 and 1."""
    if not isinstance(values, (list, tuple)):
        raise ModelError(f"the scheduler config of {name} has trained_betas that are not a list of numbers")
    if len(values) != steps:
        raise ModelError(
            f"the scheduler config of {name} has {len(values)} trained_betas for {steps} num_train_timesteps"
        )
    strange = [f"number {i} is {truncated(repr(value))}" for i, value in enumerate(values, 1) if not _is_beta(value)]
    if strange:
        raise ModelError(
            f"the scheduler config of {name} has trained_betas that are not between 0 and 1: {some(strange)}"
        )
    return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class _Discrete:
    """The part of `Schedule` that does not depend on what the network predicts.

    Args:
        alphas_cumprod: ᾱ of every training timestep, float32 (T,), on the CPU.
    """

    alphas_cumprod: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)  # by device

    def sample_t(self, n: int, generator: torch.Generator, part: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        first, end = map(self.t_at, part)
        return torch.randint(first, max(first + 1, end), (n,), generator=generator)

    def t_at(self, fraction: float) -> int:
        return int(fraction * len(self.alphas_cumprod))

    def noisier_half(self, n: int) -> Tensor:
        steps = len(self.alphas_cumprod)
        return torch.linspace(steps // 2, steps - 1, n).long()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (DDPM eq. 4)."""
        a = self._at(t, x_0)
        return a.sqrt() * x_0 + (1 - a).sqrt() * noise

    def _at(self, t: Tensor, like: Tensor) -> Tensor:
        """ᾱ_t, (n, 1, 1, 1)."""
        if like.device not in self._copies:
            self._copies[like.device] = self.alphas_cumprod.to(like.device)
        return self._copies[like.device][t].view(-1, 1, 1, 1)


class DiscreteEpsilon(_Discrete):
    """Discrete timesteps; the network predicts the noise ε (Ho et al. 2020)."""

    prediction_type = "epsilon"

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """(x_t − √(1−ᾱ_t)·ε) / √ᾱ_t (DDPM eq. 15)."""
        a = self._at(t, x_t)
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()


class DiscreteV(_Discrete):
    """Discrete timesteps; the network predicts v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0 (Salimans & Ho 2022, appendix D)."""

    prediction_type = "v_prediction"

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = self._at(t, x_0)
        return a.sqrt() * noise - (1 - a).sqrt() * x_0

    def x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """√ᾱ_t·x_t − √(1−ᾱ_t)·v."""
        a = self._at(t, x_t)
        return a.sqrt() * x_t - (1 - a).sqrt() * output


DISCRETE: dict[str, type[DiscreteEpsilon] | type[DiscreteV]] = {
    kind.prediction_type: kind for kind in (DiscreteEpsilon, DiscreteV)
}
"""Prediction type, as diffusers names it → schedule."""


def schedule_of(config: Mapping[str, Any], name: str) -> DiscreteEpsilon | DiscreteV:
    """The schedule by which a model was trained, from its scheduler config.

    Raises:
        ModelError: Training that salun cannot repeat.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in DISCRETE:
        raise ModelError(f"{name} predicts {truncated(str(prediction))!r}; salun supports {' and '.join(DISCRETE)}")
    return DISCRETE[prediction](alphas_cumprod(config, name))
