"""Quantization: whether rounding the weights, as users do to save memory, undoes a small change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.options import Sampling

BLOCK = 64  # weights that share a scale in nf4
NF4_OFFSET = 0.9677083  # the outermost quantile (Dettmers et al. 2023, appendix E)
INT8, FP8 = 127.0, 448.0  # largest values of int8 and float8_e4m3


def cost(options: NoOptions, n: int, sampling: Sampling, batch_size: int) -> int:
    """Passes, of n prompts."""
    return 3 * n * sampling.passes


def quantize(task: AttackTask, options: NoOptions) -> AttackResult:
    """Round all matrices and convolutions to fp8, int8 and nf4, and compute with the rounded values."""
    from salun.diffusion.attacks.task import AttackResult, Best

    best, weights, conditioning = Best(len(task)), task.weights(), task.encode(task.prompts)
    for i, (name, rounded) in enumerate({"fp8": fp8, "int8": int8, "nf4": nf4}.items(), 1):
        with task.altered({key: rounded(weight) for key, weight in weights.items()}):
            latents, shown = task.attempt(conditioning, task.seeds)
        best.add(latents, shown)
        best.curve.append((name, float(shown.mean())))
        task.report(i, 3)
    return AttackResult(best.shown, best.latents, 3, task.passes, best.curve, "format")


def fp8(weight: Tensor) -> Tensor:
    """float8_e4m3 with a scale for each tensor."""
    import torch

    scale = weight.abs().amax().clamp(min=1e-12) / FP8
    values: Tensor = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    return values


def int8(weight: Tensor) -> Tensor:
    """int8 with a scale for each output."""
    scale = weight.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (weight.ndim - 1)) / INT8
    return (weight / scale).round().clamp(-INT8, INT8) * scale


def nf4(weight: Tensor) -> Tensor:
    """4-bit NormalFloat with a scale for each block of 64 (QLoRA, Dettmers et al. 2023)."""
    import torch
    from torch.nn import functional as F

    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = nf4_levels().to(weight)
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(flat / scale, middles)] * scale
    values: Tensor = rounded.flatten()[: weight.numel()].view_as(weight)
    return values


def nf4_levels() -> Tensor:
    """The 16 levels of nf4 in −1…1: quantiles of a normal distribution, with an exact 0."""
    import torch

    def quantiles(n: int) -> Tensor:
        values: Tensor = torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, n, dtype=torch.float64)[:-1])
        return values

    levels = torch.cat([-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9)]).sort().values
    return (levels / levels.abs().max()).float()
