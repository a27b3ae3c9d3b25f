"""Weight saliency: signed gradient sums → scores → the exact global threshold → the mask (SalUn, section 4, eq. 3–4).

The authors' published code at various times kept the lowest half, or summed absolute gradients; this is the stated
method: add signed gradients over the forget set, take the absolute value, keep the top `density` of all parameters
ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn

from salun.compute.processes import ALONE, Processes
from salun.errors import MaskError
from salun.masking.late import LateValues
from salun.masking.mask import Mask
from salun.progress import Event, Progress, Stage, silent

RATIO_EPSILON = 0.1  # of the mean of |g_r|


def scores_from_losses(
    parameters: Mapping[str, nn.Parameter],
    losses: Iterable[tuple[Tensor, int]],
    progress: Progress = silent,
    total: int = 0,
    processes: Processes = ALONE,
    cpu_offload: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """|Σ_b n_b·∇L_b| / Σ n_b for every parameter, float32 whatever the weights' dtype.

    A parameter that the loss does not reach scores 0. `requires_grad` of every parameter is restored.

    Args:
        losses: (mean loss of a batch, number of samples in it), with a graph down to `parameters`; drawn one at a time,
            so a generator keeps one graph alive. Gradients are consumed inside the backward pass and freed at once.
        total: Number of batches, for progress; 0 where it is not known.
        processes: Each gives its own batches; the sums are all-reduced before the absolute value.
        cpu_offload: The sums are kept in CPU memory.
        scale: Of the loss in the backward pass, for fp16, in which small gradients would vanish; the scores are those
            of the loss itself.

    Raises:
        MaskError: A loss or a gradient is not finite, or there are no losses.
    """
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float32, device="cpu" if cpu_offload else p.device)
        for name, p in parameters.items()
    }
    seen, late = 0, LateValues[int]()

    def report(arrived: list[tuple[int, list[float]]]) -> None:
        for step, (loss,) in arrived:
            if not isfinite(loss):
                raise MaskError(f"the saliency loss of batch {step} is {loss}: weights or data are not finite")
            progress(Event(Stage.SALIENCY, step, total, {"loss": loss}))

    with summed(parameters, sums, scale) as add:
        for step, (loss, n) in enumerate(losses, 1):
            add(loss, n)
            seen += n
            report(late.add(step, loss.detach().float().view(1)))
        report(late.rest())
    counted = torch.tensor(float(seen), device=next(iter(sums.values())).device)
    processes.all_reduce_sum([*sums.values(), counted])
    seen = int(counted)
    if not seen:
        raise MaskError("there are no losses: saliency needs at least one batch of the forget set")
    for total_gradient in sums.values():
        total_gradient.abs_().div_(seen)
    finite = torch.stack([torch.isfinite(each).all() for each in sums.values()]).tolist()
    for name, good in zip(sums, finite, strict=True):
        if not good:
            raise MaskError(
                f"the gradient of {name} is not finite, so no mask can be made", advice="Use {dtype} bf16 or fp32"
            )
    return sums


def sensitivity_ratio(forget: dict[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|g_f| / (|g_r| + ε), ε = `RATIO_EPSILON` · the mean of |g_r| over all parameters together; written into `forget`.

    Not in the paper. ε bounds the ratio where the signed sums of g_r happen to cancel.

    Args:
        forget, retain: |g_f| and |g_r|, as of `scores_from_losses`.

    Raises:
        MaskError: g_r is 0 everywhere, so that there is nothing to compare with.
    """
    total = sum(each.numel() for each in retain.values())
    epsilon = RATIO_EPSILON * sum(float(each.mean()) * each.numel() for each in retain.values() if each.numel()) / total
    if not epsilon:
        raise MaskError("the retain loss has no gradient, so no ratio can be made", advice="Use {mask} saliency")
    for name, each in retain.items():
        forget[name].div_(each.add(epsilon))
    return forget


@contextmanager
def summed(
    parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], scale: float = 1.0
) -> Iterator[Callable[[Tensor, int], None]]:
    """Context manager: a function that adds n·∇L of a batch's mean loss L to the sums, without waiting for the device.

    Args:
        sums: float32, of the parameters' names and shapes.
        scale: Of the loss in the backward pass.
    """
    weight = 1.0

    def add(name: str, gradient: Tensor) -> None:
        sums[name].add_(gradient.to(sums[name].device), alpha=weight / scale)

    def backward(loss: Tensor, n: int) -> None:
        nonlocal weight
        weight = float(n)
        (loss * scale if scale != 1.0 else loss).backward()

    with each_gradient(parameters, add):
        yield backward


@contextmanager
def each_gradient(parameters: Mapping[str, nn.Parameter], consume: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context manager: every gradient goes to `consume` inside the backward pass and is freed at once."""
    required = {name: p.requires_grad for name, p in parameters.items()}

    def hook(name: str) -> Callable[[Tensor], None]:
        def run(parameter: Tensor) -> None:
            assert parameter.grad is not None
            consume(name, parameter.grad)
            parameter.grad = None

        return run

    hooks = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None  # an older one would be added to the first batch's
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for each in hooks:
            each.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def saliency_mask(
    module: nn.Module,
    losses: Iterable[tuple[Tensor, int]],
    density: float = 0.5,
    progress: Progress = silent,
) -> Mask:
    """The SalUn mask of any module from its forgetting losses, such as −CE on the forget set.

    Args:
        module: In eval mode.
        losses: (mean loss of a batch, number of samples in it).
        density: Fraction of the weights to select.
    """
    named = dict(module.named_parameters())
    return Mask.from_scores(scores_from_losses(named, losses, progress), density)
