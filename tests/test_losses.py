"""The losses, against formulas written out, on a denoiser small enough to follow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.diffusion.losses import (
    Draw,
    ErasureData,
    draw,
    frozen_predictions,
    retain_saliency_losses,
    saliency_losses,
    training_losses,
)
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.schedule import DISCRETE


class Toy:
    """ε = w·x_t + mean(hidden): linear, so that every loss can be written down."""

    def __init__(self, prediction_type: str = "epsilon") -> None:
        self.schedule = DISCRETE[prediction_type](torch.linspace(0.99, 0.01, 50))
        self.device = torch.device("cpu")
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.asked: list[Tensor] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.tensor([[[float(len(p))]] for p in prompts]))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(x_t) == len(t) == len(conditioning)
        self.asked.append(conditioning.hidden)
        return self.weight * x_t + conditioning.hidden.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.fixture
def data() -> ErasureData:
    generator = torch.Generator().manual_seed(0)
    toy = Toy()
    return ErasureData(
        forget_latents=torch.randn(5, 2, 4, 4, generator=generator),
        anchor_latents=torch.randn(5, 2, 4, 4, generator=generator),
        retain_latents=torch.randn(7, 2, 4, 4, generator=generator),
        forget=toy.encode(["f" * (10 + i) for i in range(5)]),
        anchor=toy.encode(["a" * (20 + i) for i in range(5)]),
        retain=toy.encode(["r" * (30 + i) for i in range(7)]),
        empty=toy.encode([""]),
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_agree(kind: str) -> None:
    """x_0 and ε can be recovered from x_t and the target: the definitions of ε and v."""
    toy = Toy(kind)
    x_0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 20, 49])
    a = toy.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t, target = toy.schedule.add_noise(x_0, noise, t), toy.schedule.target(x_0, noise, t)
    if kind == "epsilon":
        recovered = (x_t - (1 - a).sqrt() * target) / a.sqrt()
    else:
        recovered = a.sqrt() * x_t - (1 - a).sqrt() * target
    torch.testing.assert_close(recovered, x_0, atol=1e-5, rtol=1e-4)  # division by √0.01 costs digits
    assert torch.equal(toy.schedule.x_0(x_t, target, t), recovered)


def test_the_saliency_loss_is_minus_the_guided_error(data: ErasureData) -> None:
    """Its gradient is that of −MSE(ε, (1+w)·ε_c − w·ε_∅), the empty prompt's part included."""
    toy = Toy()
    found = list(saliency_losses(toy, data, guidance=2.0, batch_size=3, passes=2, seed=1))
    assert [n for _, n in found] == [3, 2, 3, 2]
    loss = found[0][0]
    forget, empty = toy.asked[0].chunk(2)
    assert forget.flatten().tolist() == [10, 11, 12]
    assert not empty.any()
    gradient = torch.autograd.grad(loss, toy.weight)[0]
    # (1+w)(θx + c) − w(θx + 0) = θx + (1+w)c: recover x_t and ε from the same draws
    from salun.diffusion.losses import _noise
    from salun.randomness import step_generator

    x_0 = data.forget_latents[:3]
    t, noise = _noise(toy, x_0, step_generator(1, -1))
    x_t, c = toy.schedule.add_noise(x_0, noise, t), forget.view(3, 1, 1, 1)
    weight = torch.tensor(0.5, requires_grad=True)
    by_hand = -F.mse_loss(weight * x_t + 3.0 * c, noise)
    torch.testing.assert_close(loss.detach(), by_hand.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, weight)[0])


def test_the_retain_saliency_loss_is_the_error_at_the_timesteps_of_the_forget_samples(data: ErasureData) -> None:
    from salun.diffusion.losses import _noise
    from salun.randomness import step_generator

    toy, picked = Toy(), [6, 2, 0, 5, 1]
    found = list(retain_saliency_losses(toy, data, picked, batch_size=3, passes=2, seed=1))
    assert [n for _, n in found] == [3, 2, 3, 2]
    for i, (loss, _) in enumerate(found):
        rows, like = picked[i % 2 * 3 :][:3], data.forget_latents[i % 2 * 3 :][:3]
        t, noise = _noise(toy, like, step_generator(1, -1 - i))
        x_t = toy.schedule.add_noise(data.retain_latents[rows], noise, t)
        c = torch.tensor([30.0 + row for row in rows]).view(-1, 1, 1, 1)
        torch.testing.assert_close(loss, F.mse_loss(toy.weight * x_t + c, noise))


def test_the_anchors_prediction_is_the_target_on_the_same_latents(data: ErasureData) -> None:
    toy = Toy()
    sample = draw(toy, data, batch_size=4, anchor_share=0.5, seed=0, step=3)
    frozen = frozen_predictions(toy, sample)
    with torch.no_grad():
        toy.weight.mul_(3)
    forget, retain = training_losses(toy, sample, frozen, "frozen", "frozen")
    x_t = toy.schedule.add_noise(sample.x_0, sample.noise, sample.t)
    c, wanted = (k.hidden.view(-1, 1, 1, 1) for k in (sample.prompts, sample.targets))
    torch.testing.assert_close(forget, F.mse_loss(1.5 * x_t[:4] + c[:4], 0.5 * x_t[:4] + wanted[:4]))
    torch.testing.assert_close(retain, F.mse_loss(1.5 * x_t[4:] + c[4:], 0.5 * x_t[4:] + c[4:]))


def test_a_guided_target_leads_past_the_anchor_for_forget_samples_only(data: ErasureData) -> None:
    toy = Toy()
    sample = draw(toy, data, batch_size=4, anchor_share=0.5, seed=0, step=3)
    plain, guided = frozen_predictions(toy, sample), frozen_predictions(toy, sample, guidance=0.5)
    c, wanted = (k.hidden.view(-1, 1, 1, 1) for k in (sample.prompts, sample.targets))
    torch.testing.assert_close(guided[:4], plain[:4] - 0.5 * (c - wanted)[:4].expand_as(plain[:4]))
    assert torch.equal(guided[4:], plain[4:])


def test_an_online_target_carries_no_gradient(data: ErasureData) -> None:
    """On the same latents the weights cancel, so a target with a graph would leave no gradient at all."""
    toy = Toy()
    sample = draw(toy, data, batch_size=4, anchor_share=0.0, seed=0, step=0)
    forget, retain = training_losses(toy, sample, None, "online", "noise")
    x_t = toy.schedule.add_noise(sample.x_0, sample.noise, sample.t)
    c, wanted = (k.hidden.view(-1, 1, 1, 1) for k in (sample.prompts, sample.targets))
    expected = 2 * ((c - wanted)[:4] * x_t[:4]).mean()
    torch.testing.assert_close(torch.autograd.grad(forget, toy.weight, retain_graph=True)[0], expected)
    torch.testing.assert_close(retain, F.mse_loss(0.5 * x_t[4:] + c[4:], sample.noise[4:]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_anchor_share_chooses_where_the_forget_latents_come_from(data: ErasureData, share: float) -> None:
    sample = draw(Toy(), data, batch_size=16, anchor_share=share, seed=0, step=0)
    source = data.anchor_latents if share else data.forget_latents
    for x_0, prompt, target in zip(
        sample.x_0[:16], sample.prompts.hidden[:16], sample.targets.hidden[:16], strict=True
    ):
        i = int(prompt.item()) - 10  # the prompt stays the forget prompt, the target its anchor, whatever the latents
        assert torch.equal(x_0, source[i])
        assert target.item() == 20 + i


def test_forget_timesteps_come_from_a_part_of_the_schedule_and_retain_timesteps_from_all_of_it(
    data: ErasureData,
) -> None:
    """Of 50 timesteps; the whole schedule is the default, and the other draws do not depend on the part."""

    def drawn(*part: float) -> list[Draw]:
        return [draw(Toy(), data, 8, 0.5, 0, step, forget_timesteps=part) for step in range(40)]  # type: ignore[arg-type]

    for part, expected in (((0.0, 0.5), range(25)), ((0.5, 1.0), range(25, 50)), ((0.99, 1.0), range(49, 50))):
        assert {int(t) for sample in drawn(*part) for t in sample.t[:8]} == set(expected)
    late, every = drawn(0.0, 0.5), [draw(Toy(), data, 8, 0.5, 0, step) for step in range(40)]
    assert {int(t) for sample in late for t in sample.t[8:]} == set(range(50))
    for one, other, default in zip(late, drawn(0.0, 1.0), every, strict=True):
        assert torch.equal(one.t[8:], default.t[8:]) and torch.equal(one.noise, default.noise)
        assert torch.equal(other.t, default.t) and torch.equal(one.x_0, default.x_0)


def test_retain_samples_keep_their_prompt_or_lose_it_to_the_empty_one(data: ErasureData) -> None:
    emptied = 0
    for step in range(40):
        sample = draw(Toy(), data, batch_size=8, anchor_share=0.5, seed=0, step=step)
        for x_0, prompt in zip(sample.x_0[8:], sample.prompts.hidden[8:], strict=True):
            if prompt.item() == 0:
                emptied += 1
            else:
                assert torch.equal(x_0, data.retain_latents[int(prompt.item()) - 30])
        assert torch.equal(sample.prompts.hidden[8:], sample.targets.hidden[8:])
    assert 10 <= emptied <= 60  # a tenth of 320, within five standard deviations


def test_draws_repeat_by_seed_and_step(data: ErasureData) -> None:
    def x_0(seed: int, step: int) -> Tensor:
        return draw(Toy(), data, 4, 0.5, seed, step).noise

    assert torch.equal(x_0(1, 1), x_0(1, 1))
    assert not torch.equal(x_0(1, 1), x_0(1, 2))
    assert not torch.equal(x_0(1, 1), x_0(2, 1))
