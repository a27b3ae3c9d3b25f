"""Saliency: what is summed, how it is weighted, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.errors import Cancelled, MaskError
from salun.masking.saliency import saliency_mask, scores_from_losses, sensitivity_ratio
from salun.progress import Event


def batches(module: nn.Module, sizes: list[int]) -> Iterator[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    for n in sizes:
        x, y = torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)
        yield -F.cross_entropy(module(x), y), n


def test_scores_are_absolute_values_of_the_gradient_of_the_whole_set(little: nn.Module) -> None:
    """Batches of unequal size, weighted by it, give the gradient of the mean over all samples."""
    scores = scores_from_losses(dict(little.named_parameters()), batches(little, [5, 5, 2]))
    generator = torch.Generator().manual_seed(1)
    drawn = [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (5, 5, 2)]
    loss = -F.cross_entropy(little(torch.cat([x for x, _ in drawn])), torch.cat([y for _, y in drawn]))
    for (name, _), gradient in zip(
        little.named_parameters(), torch.autograd.grad(loss, list(little.parameters())), strict=True
    ):
        torch.testing.assert_close(scores[name], gradient.abs())  # float32 sums in another order


def test_a_gradient_that_was_left_in_the_module_is_no_part_of_the_scores(little: nn.Module) -> None:
    clean = scores_from_losses(dict(little.named_parameters()), batches(little, [5, 5]))
    F.cross_entropy(little(torch.ones(1, 6)), torch.zeros(1, dtype=torch.int64)).backward()
    again = scores_from_losses(dict(little.named_parameters()), batches(little, [5, 5]))
    assert all(torch.equal(clean[name], again[name]) for name in clean)


def test_the_ratio_is_that_of_two_saliencies(little: nn.Module) -> None:
    """|g_f| / (|g_r| + ε), ε a tenth of the mean of |g_r|, from gradients of the whole sets."""
    named, generator = dict(little.named_parameters()), torch.Generator().manual_seed(3)
    sets = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(2)]
    forget, retain = (torch.autograd.grad(F.cross_entropy(little(x), y), list(named.values())) for x, y in sets)
    epsilon = 0.1 * torch.cat([each.abs().flatten() for each in retain]).mean()
    scores = [scores_from_losses(named, [(F.cross_entropy(little(x), y), 8)]) for x, y in sets]
    ratio = sensitivity_ratio(*scores)
    for name, g_f, g_r in zip(named, forget, retain, strict=True):
        torch.testing.assert_close(ratio[name], g_f.abs() / (g_r.abs() + epsilon))
    with pytest.raises(MaskError, match="no gradient"):
        sensitivity_ratio(ratio, {name: torch.zeros_like(each) for name, each in ratio.items()})


def test_batches_that_disagree_cancel() -> None:
    """Signed sums, not sums of absolute values."""
    weight = nn.Parameter(torch.ones(2))
    losses = [((weight * torch.tensor([1.0, 1.0])).sum(), 1), ((weight * torch.tensor([-1.0, 1.0])).sum(), 1)]
    assert scores_from_losses({"w": weight}, losses)["w"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_whatever_the_weights(dtype: torch.dtype) -> None:
    """256 + 1 is 256 in bf16; 4096 + 1 is 4096 in fp16."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    big = 4096.0
    losses = [((weight * big).sum(), 1), ((weight * 1.0).sum(), 1)]
    scores = scores_from_losses({"w": weight}, losses)
    assert scores["w"].dtype == torch.float32
    assert scores["w"].item() == (big + 1) / 2


def test_nothing_is_left_on_the_model(little: nn.Module) -> None:
    little.requires_grad_(False)
    next(little.parameters()).requires_grad_(True)
    before = [p.detach().clone() for p in little.parameters()]
    scores_from_losses(dict(little.named_parameters()), batches(little, [4]))
    assert [p.requires_grad for p in little.parameters()] == [True, False, False, False]
    assert all(p.grad is None for p in little.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, little.parameters(), strict=True))


def test_a_parameter_the_loss_does_not_reach_scores_zero() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert scores_from_losses({"a": used, "b": unused}, [(used.sum(), 1)])["b"].tolist() == [0, 0, 0]


def test_losses_and_gradients_that_are_not_finite_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(MaskError, match="batch 1"):
        scores_from_losses({"w": weight}, [((weight * float("nan")).sum(), 1)])
    with pytest.raises(MaskError, match="gradient of w is not finite"):
        scores_from_losses({"w": weight}, [(weight.sqrt().sum(), 1)])
    with pytest.raises(MaskError, match="no losses"):
        scores_from_losses({"w": weight}, [])


def test_cancel_stops_between_batches_and_cleans_up(little: nn.Module) -> None:
    seen = []

    def stop(event: Event) -> None:
        seen.append(event)
        raise Cancelled

    with pytest.raises(Cancelled):
        scores_from_losses(dict(little.named_parameters()), batches(little, [4, 4, 4]), stop)
    assert len(seen) == 1
    assert all(p.grad is None for p in little.parameters())


def test_the_mask_of_any_module(little: nn.Module) -> None:
    mask = saliency_mask(little, batches(little, [8]), density=0.1)
    assert mask.selected == 10
    assert set(mask) == {name for name, _ in little.named_parameters()}


@pytest.mark.slow
def test_selecting_takes_no_more_than_a_hundredth_of_the_scores_memory() -> None:
    """Peak resident memory in a process of its own, 100 M scores (400 MB); beside the mask itself (12.5 MB)."""
    program = """
import re, torch
def peak():  # kB; what getrusage tells begins with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
from salun.masking.threshold import select_largest
scores = {"w": torch.rand(100_000_000, generator=torch.Generator().manual_seed(0))}
select_largest({"w": scores["w"][:200_000]}, 100)
before = peak()
select_largest(scores, 50_000_000)
print((peak() - before) * 1024)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert int(result.stdout) - 12_500_000 <= 4_000_000
