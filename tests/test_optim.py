"""The packed masked optimizer: equal to torch's own on salient entries, and silent everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from salun.errors import MaskError, TrainingError
from salun.masking.mask import Mask
from salun.masking.optim import MaskedOptimizer, Mode
from salun.masking.proximal import SoftThreshold

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
MAKERS: dict[str, Make] = {
    "adam": lambda p: Adam(p, lr=1e-2),
    "sgd": lambda p: SGD(p, lr=1e-1, momentum=0.9, weight_decay=5e-2),
}
STEPS = 12


def loss_of(module: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
    return F.cross_entropy(module(x.to(dtype)).float(), y)


def random_mask(module: nn.Module, density: float = 0.4) -> Mask:
    return Mask.random(dict(module.named_parameters()), density, seed=5)


def train(
    module: nn.Module, mask: Mask, make: Make, mode: Mode, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    with MaskedOptimizer(dict(module.named_parameters()), mask, make, mode) as optimizer:
        for step in range(STEPS):
            optimizer.backward(loss_of(module, step, dtype))
            if mode == "pack":
                optimizer.step()
            assert not optimizer.found_inf
        return {name: master.clone() for name, master in optimizer.masters.items()}


@pytest.mark.parametrize("mode", ["step", "pack"])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_salient_entries_follow_torchs_own_optimizer(little: nn.Module, maker: str, mode: Mode) -> None:
    """The reference trains all weights with gradients, weight decay and momentum cut to the mask by hand."""
    reference, mask = copy.deepcopy(little), random_mask(little)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    optimizer = MAKERS[maker](reference.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(reference, step).backward()
        for name, p in reference.named_parameters():
            assert p.grad is not None
            p.grad.mul_(mask.dense(name))
        optimizer.step()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                p.copy_(torch.where(mask.dense(name), p, start[name]))
    train(little, mask, MAKERS[maker], mode)
    for (name, ours), theirs in zip(little.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")  # fp32 tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["step", "pack"])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_weights_outside_the_mask_never_move(little: nn.Module, maker: str, mode: Mode, dtype: torch.dtype) -> None:
    """Bit for bit, weight decay and momentum included; a NaN and a −0 outside the mask stay what they are."""
    little.to(dtype)
    mask = random_mask(little)
    before = {name: p.detach().clone() for name, p in little.named_parameters()}
    train(little, mask, MAKERS[maker], mode, dtype)
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    for name, p in little.named_parameters():
        outside = ~mask.dense(name)
        assert torch.equal(p.detach()[outside].view(integers), before[name][outside].view(integers))
    assert any(not torch.equal(p, before[name]) for name, p in little.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_their_masters_rounded(little: nn.Module, dtype: torch.dtype) -> None:
    """Updates too small for the weights' dtype add up in the master."""
    little.to(dtype)
    start = {name: p.detach().clone() for name, p in little.named_parameters()}
    mask = random_mask(little)

    def tiny(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(parameters, lr=1e-6)

    masters = train(little, mask, tiny, "step", dtype)
    moved = 0
    for name, p in little.named_parameters():
        if name in masters:
            chosen = mask.dense(name)
            assert torch.equal(p.detach()[chosen], masters[name].to(dtype))
            moved += int((masters[name] != start[name][chosen].float()).sum())
    assert moved > 0


def test_masters_come_from_the_checkpoint_not_from_its_cast(little: nn.Module) -> None:
    sources = {name: p.detach().clone() for name, p in little.named_parameters()}
    little.to(torch.bfloat16)
    mask = random_mask(little)
    with MaskedOptimizer(dict(little.named_parameters()), mask, MAKERS["adam"], sources=sources) as optimizer:
        for name, master in optimizer.masters.items():
            assert torch.equal(master, sources[name][mask.dense(name)])


def test_only_salient_entries_have_masters_and_moments(little: nn.Module) -> None:
    mask = random_mask(little, 0.25)
    with MaskedOptimizer(dict(little.named_parameters()), mask, MAKERS["adam"]) as optimizer:
        optimizer.backward(loss_of(little, 0))
        state = optimizer.state()
    held = {key: sum(t.numel() for name, t in state.items() if name.endswith(key)) for key in ("master", "exp_avg")}
    assert held == {"master": mask.selected, "exp_avg": mask.selected}


def test_pack_accumulates_and_clips_like_one_large_batch(little: nn.Module) -> None:
    other, mask = copy.deepcopy(little), random_mask(little)
    named = dict(little.named_parameters()), dict(other.named_parameters())
    with (
        MaskedOptimizer(named[0], mask, MAKERS["sgd"], "pack") as one,
        MaskedOptimizer(named[1], mask, MAKERS["sgd"], "pack", loss_scale=1024.0) as two,
    ):
        one.backward((loss_of(little, 0) + loss_of(little, 1)) / 2)
        one.step(max_norm=0.05)
        two.backward(loss_of(other, 0) / 2)
        two.backward(loss_of(other, 1) / 2)
        two.step(max_norm=0.05)
    for a, b in zip(little.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # sums in another order


def test_reduce_sees_the_packed_gradients_before_the_step(little: nn.Module) -> None:
    mask, seen = random_mask(little), []

    def reduce(gradients: list[Tensor]) -> None:
        seen.append(sum(g.numel() for g in gradients))
        for gradient in gradients:
            gradient.zero_()

    before = [p.detach().clone() for p in little.parameters()]
    with MaskedOptimizer(dict(little.named_parameters()), mask, lambda p: SGD(p, lr=1.0), "pack") as optimizer:
        optimizer.backward(loss_of(little, 0))
        optimizer.step(reduce=reduce)
    assert seen == [mask.selected + 1]  # and whether one is not finite
    assert all(torch.equal(a, b) for a, b in zip(before, little.parameters(), strict=True))


def poisoned(module: nn.Module) -> Tensor:
    """A finite loss with a NaN in the gradient of the first weight only."""
    first = next(module.parameters())
    return (first - first.detach()).abs().sqrt().sum() + loss_of(module, 0)


def fused(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=1e-2, fused=True)


@pytest.mark.parametrize("make", [MAKERS["adam"], fused], ids=["flag read by the host", "flag read by the kernel"])
@pytest.mark.parametrize("mode", ["step", "pack"])
@pytest.mark.parametrize(
    "spoil", [poisoned, lambda module: loss_of(module, 0) * float("nan")], ids=["gradient", "loss"]
)
def test_a_step_that_is_not_finite_changes_no_weight_nor_do_those_after_it(
    spoil: Callable[[nn.Module], Tensor], mode: Mode, make: Make, little: nn.Module
) -> None:
    before = [p.detach().clone() for p in little.parameters()]
    with MaskedOptimizer(dict(little.named_parameters()), random_mask(little), make, mode) as optimizer:
        for loss in (spoil, lambda module: loss_of(module, 0)):
            optimizer.backward(loss(little))
            if mode == "pack":
                optimizer.step()
            assert optimizer.failed
    assert all(torch.equal(a, b) for a, b in zip(before, little.parameters(), strict=True))


def test_a_step_that_overflows_is_skipped_and_halves_the_loss_scale(little: nn.Module) -> None:
    before = [p.detach().clone() for p in little.parameters()]
    mask = random_mask(little)
    with MaskedOptimizer(dict(little.named_parameters()), mask, fused, "pack", loss_scale=8.0) as optimizer:
        optimizer.backward(poisoned(little))
        optimizer.step()
        assert optimizer.found_inf and not optimizer.failed and optimizer.loss_scale == 4
        assert all(torch.equal(a, b) for a, b in zip(before, little.parameters(), strict=True))
        optimizer.backward(loss_of(little, 0))
        optimizer.step()
        assert not optimizer.found_inf and optimizer.loss_scale == 4
    assert not all(torch.equal(a, b) for a, b in zip(before, little.parameters(), strict=True))


def test_nothing_is_left_behind(little: nn.Module) -> None:
    little.requires_grad_(False)
    with MaskedOptimizer(dict(little.named_parameters()), random_mask(little), MAKERS["adam"]) as optimizer:
        optimizer.backward(loss_of(little, 0))
    after = [p.detach().clone() for p in little.parameters()]
    assert not any(p.requires_grad for p in little.parameters())
    little.requires_grad_(True)
    loss_of(little, 1).backward()  # a hook left behind would take the gradient and step
    assert all(p.grad is not None for p in little.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, little.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["step", "pack"])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_state_loaded_continues_as_if_never_stopped(little: nn.Module, maker: str, mode: Mode) -> None:
    other, mask = copy.deepcopy(little), random_mask(little)
    whole = train(little, mask, MAKERS[maker], mode)

    def some(steps: range, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        with MaskedOptimizer(dict(other.named_parameters()), mask, MAKERS[maker], mode) as optimizer:
            if state is not None:
                optimizer.load_state(state, 5)
            for step in steps:
                optimizer.backward(loss_of(other, step))
                if mode == "pack":
                    optimizer.step()
            return {name: t.clone() for name, t in optimizer.state().items()}

    half = some(range(5), None)
    other.load_state_dict(copy.deepcopy(other).state_dict())
    rest = some(range(5, STEPS), half)
    for name, master in whole.items():
        assert torch.equal(rest[f"{name}/master"], master)


def test_a_state_of_another_run_is_refused(little: nn.Module) -> None:
    with MaskedOptimizer(dict(little.named_parameters()), random_mask(little), MAKERS["adam"]) as optimizer:
        with pytest.raises(TrainingError, match="belongs to another run"):
            optimizer.load_state({"0.weight/master": torch.zeros(1)}, 5)
        with pytest.raises(TrainingError, match="does not train"):
            optimizer.load_state({"other/master": torch.zeros(1)}, 5)


def test_a_mask_that_fits_not_or_selects_nothing_is_refused(little: nn.Module) -> None:
    parameters = dict(little.named_parameters())
    with pytest.raises(MaskError, match="does not fit"):
        MaskedOptimizer(parameters, Mask.full({"0.weight": torch.zeros(1)}), MAKERS["adam"])
    empty = Mask.from_dense({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()})
    with pytest.raises(MaskError, match="selects no weight"):
        MaskedOptimizer(parameters, empty, MAKERS["adam"])


def test_soft_thresholding_returns_the_smallest_changes_to_zero(little: nn.Module) -> None:
    """At step t of T, at least (1 − density)·(1 − t/T) of all entries are exactly θ₀; the last step shrinks none."""
    start = {name: p.detach().clone() for name, p in little.named_parameters()}
    parameters = dict(little.named_parameters())
    with MaskedOptimizer(parameters, Mask.full(parameters), MAKERS["adam"], "pack") as optimizer:
        soft = SoftThreshold(optimizer, density=0.2)
        total = sum(p.numel() for p in parameters.values())
        for step in range(1, 11):
            optimizer.backward(loss_of(little, step))
            optimizer.step()
            before = {name: m.clone() for name, m in optimizer.masters.items()}
            soft(step, 10)
            unmoved = sum(int((p == start[name]).sum()) for name, p in little.named_parameters())
            assert unmoved >= int(0.8 * total * (1 - step / 10))
            for name, master in optimizer.masters.items():
                assert torch.all((master - start[name].flatten()).abs() <= (before[name] - start[name].flatten()).abs())
        assert soft.final_density() == 1 - unmoved / total


def test_a_soft_threshold_is_the_proximal_step_of_salun_soft(little: nn.Module) -> None:
    """Δ ← sign(Δ)·max(|Δ| − τ, 0), τ the k-th smallest |Δ|, k = (1 − density)·N·(1 − step/total)."""
    parameters = dict(little.named_parameters())
    start = torch.cat([p.detach().flatten() for p in parameters.values()])
    with MaskedOptimizer(parameters, Mask.full(parameters), MAKERS["adam"], "pack") as optimizer:
        soft = SoftThreshold(optimizer, density=0.3)
        for step in (1, 2):
            optimizer.backward(loss_of(little, step))
            optimizer.step()
        change = torch.cat(list(optimizer.masters.values())) - start
        k = int(0.7 * len(change) * (1 - 2 / 8))
        tau = change.abs().sort().values[k - 1]
        soft(2, 8)
        after = torch.cat(list(optimizer.masters.values())) - start
    torch.testing.assert_close(after, change.sign() * (change.abs() - tau).clamp(min=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_state_in_host_memory_changes_no_result(density: float) -> None:
    """On a GPU only the place differs; here the same path runs with both on the CPU."""
    results = []
    for cpu_offload in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(8, 4)
        parameters = dict(module.named_parameters())
        mask = Mask.random(parameters, density, 0)
        with MaskedOptimizer(
            parameters, mask, lambda p: torch.optim.Adam(p, lr=1e-2), cpu_offload=cpu_offload
        ) as optimizer:
            for _ in range(5):
                optimizer.backward(module(torch.ones(2, 8)).square().sum())
            assert {m.device.type for m in optimizer.masters.values()} == {"cpu"}
        results.append(module.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["step", "pack"])
def test_a_gradient_that_was_left_in_the_module_is_no_part_of_the_first_step(little: nn.Module, mode: Mode) -> None:
    clean, mask = copy.deepcopy(little), random_mask(little)
    loss_of(little, 99).backward()
    found = [train(module, mask, MAKERS["sgd"], mode) for module in (clean, little)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
