"""Hardening: adversarial embeddings that are kept while a model unlearns, and the dose that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import salun
from salun.diffusion import harden
from salun.diffusion.context import training_session
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.decisions import FARTHEST, GUIDED, Phase, decide
from salun.diffusion.goal import Goal, Probed, Seen
from salun.diffusion.harden import RATE, Pool
from salun.diffusion.losses import draw
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import HARDENED, make_plan
from salun.diffusion.stages import erasure_stages
from salun.diffusion.task import ErasureTask
from salun.errors import Cancelled, ConfigError, TrainingError
from salun.masking.mask import Mask

from .conftest import SHORT

FEW: dict[str, Any] = {**SHORT, "eval_images": 0, "batch_size": 4, "lr": 1e-3}


def pool_of(shapes: Model, size: int, concept: list[str] | str = "circle") -> Pool:
    """A pool on the original's weights. The caller has configured the model."""
    plan = make_plan(shapes.settings, "shapes", concept, EraseOptions(**FEW, harden=size))
    with shapes.configured(plan.options):
        data = build_training_set(shapes, plan)
    return Pool(ErasureTask(shapes, plan, data, Mask.full(shapes.parameters())), size)


def test_a_hardened_training_resumes_to_the_same_bytes(shapes: Model, tmp_path: Path) -> None:
    common: dict[str, Any] = {**FEW, "steps": 3, "harden": 2, "target_guidance": 0.5, "seed": 5}
    whole = salun.erase(shapes, "circle", progress=salun.silent, **common)
    assert [set(row) for row in whole.history] == [{"step", "forget", "retain", "adversarial"}] * 3

    def stop(event: salun.Event, /) -> None:
        if event.stage == "training" and event.step == 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        salun.erase(shapes, "circle", progress=stop, run_dir=tmp_path / "r", **common)
    resumed = salun.erase(shapes, "circle", progress=salun.silent, run_dir=tmp_path / "r", resume=True, **common)
    assert resumed.record.resumed == 1 and resumed.history == whole.history
    assert resumed.erased.keys() == whole.erased.keys()
    assert all(torch.equal(resumed.erased[name], tensor) for name, tensor in whole.erased.items())


def test_a_members_steps_are_adams(shapes: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(shapes, 2)
    expected = torch.nn.Parameter(pool.vectors[0][[1]].clone())
    other = pool.vectors[0][0].clone()
    adam = torch.optim.Adam([expected], lr=RATE)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, expected.shape[1], generator=generator) for _ in range(4)]

    def given(loss: Tensor, of: Any, dtype: torch.dtype) -> list[Tensor]:
        return [drawn[taken]]

    monkeypatch.setattr(harden, "gradients", given)
    for taken in range(4):
        pool._improve(taken, 0, 1)
        expected.grad = drawn[taken]
        adam.step()
    assert torch.allclose(pool.vectors[0][[1]], expected, atol=1e-6) and torch.equal(pool.vectors[0][0], other)


def test_a_member_learns_to_denoise_the_concept_and_its_loss_is_on_the_forget_targets(shapes: Model) -> None:
    pool = pool_of(shapes, 1)
    pool.vectors[0][0] = shapes.token_embeddings[0][shapes.tokens("crescent")[0]]
    data = pool.task.training_set
    t, noise = torch.full((8,), 700), torch.randn(8, *shapes.latent_shape, generator=torch.Generator().manual_seed(0))
    x_t = shapes.schedule.add_noise(data.forget_latents, noise, t)

    def error() -> float:
        with torch.no_grad():
            output = shapes.predict(x_t, t, pool._conditioning(0, 0, range(8)))
        return float((output - noise).square().mean())

    before = error()
    for step in range(15):
        pool._improve(step, 0, 0)
    assert error() < before
    batch = draw(shapes, data, 4, 0.5, 0, 0)
    loss = pool.loss(20, batch, torch.zeros(4, *shapes.latent_shape))
    with torch.no_grad():
        half = slice(0, 4)
        noisy = shapes.schedule.add_noise(batch.x_0[half], batch.noise[half], batch.t[half])
        output = shapes.predict(noisy, batch.t[half], pool._conditioning(0, 0, (batch.picked % 8).tolist()))
    assert float(loss) == pytest.approx(float(output.square().mean()), rel=1e-4)


def test_each_concept_has_members_of_its_own(shapes: Model) -> None:
    pool = pool_of(shapes, 3, ["circle", "red"])
    assert [len(vectors) for vectors in pool.vectors] == [6]
    red = shapes.token_embeddings[0][shapes.tokens("red")[0]]
    assert torch.equal(pool.vectors[0][3], red)
    assert all(row.count(-1) == 1 for rows in pool.rows for row in rows)
    texts = ["one red circle, plain style"] * 2
    known = shapes.encode_tokens([shapes.tokens(text) for text in texts])
    with torch.no_grad():
        attacking = pool.attacking(1, texts)
    same = [torch.allclose(mine, plain) for mine, plain in zip(attacking.hidden, known.hidden, strict=True)]
    assert same == [True, False], "the first starts as the concept's own word, the second as the anchor's"


def test_a_members_prompt_says_what_else_its_image_shows(shapes: Model) -> None:
    """The concept's word alone is replaced: with that word as member, each sample's encoding is its prompt's."""
    pool = pool_of(shapes, 1, ["circle", "star"])
    data = pool.task.training_set
    for concept, word in enumerate(("circle", "star")):
        pool.vectors[0][concept] = shapes.token_embeddings[0][shapes.tokens(word)[0]]
        with torch.no_grad():
            mine = pool._conditioning(concept, concept, range(8)).hidden
        assert torch.allclose(mine, data.forget.hidden[8 * concept : 8 * concept + 8], atol=1e-5)


def test_the_embedding_that_judges_attacks_better_than_the_anchor_and_leaves_the_pool_as_it_is(
    shapes: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the inversion loss on images of the concept, against the network as it is."""
    monkeypatch.setattr(harden, "LONGER", 25)
    pool = pool_of(shapes, 2)
    state = {name: tensor.clone() for name, tensor in pool.state().items()}
    with shapes.temporarily_trainable():
        (learned,) = pool.judge(3, 0)
        assert _inversion_loss(pool, learned) < _inversion_loss(pool, pool._starts(0)[0][1:2])
        (again,) = pool.judge(3, 0)
    assert torch.equal(learned, again), "the same step gives the same embedding"
    assert all(torch.equal(tensor, state[name]) for name, tensor in pool.state().items())


def _inversion_loss(pool: Pool, vector: torch.Tensor) -> float:
    model, data = pool.task.model, pool.task.training_set
    x_0, generator = data.forget_latents, torch.Generator().manual_seed(0)
    noise = torch.randn(x_0.shape, generator=generator)
    t = model.schedule.sample_t(len(x_0), generator)
    with torch.no_grad():
        conditioning = pool._conditioning(0, 0, range(len(x_0)), [vector])
        output = model.predict(model.schedule.add_noise(x_0, noise, t), t, conditioning)
    return float(torch.nn.functional.mse_loss(output, model.schedule.target(x_0, noise, t)))


def test_a_state_of_another_pool_is_an_error(shapes: Model) -> None:
    pool = pool_of(shapes, 2)
    state = {name: tensor.clone() for name, tensor in pool.state().items()}
    for wrong in (
        {**state, "vectors 0": state["vectors 0"][:1]},
        {**state, "counts": state["counts"].float()},
        {name: tensor for name, tensor in state.items() if name != "first 0"},
        {**state, "second 0": state["second 0"] + float("nan")},
    ):
        with pytest.raises(TrainingError, match="do not fit"):
            pool.load_state(wrong)
    pool.load_state(state)


def probed(step: int, ua: float, confidence: float, drift: float | None, asr: float | None) -> Probed:
    return Probed(step, (Seen(64, ua, confidence),), drift, 1.0, asr)


def test_the_target_moves_away_while_attacks_succeed_and_others_stay() -> None:
    goal = Goal(0.9, 0.02, asr=0.05)
    risen = decide(goal, [probed(10, 0.95, 0.9, 0.03, 0.4)], 10, 300)
    assert (risen.phase, risen.guidance) == (Phase.CONTINUE, GUIDED)
    kept = decide(goal, [probed(10, 0.95, 0.9, 0.1, 0.4)], 10, 300)
    assert (kept.phase, kept.guidance) == (Phase.SETTLE, 0.0), "other images moved too far"
    safe = decide(goal, [probed(10, 0.95, 0.9, 0.01, 0.0)], 10, 300)
    assert safe.phase is Phase.SETTLE
    end = probed(10 + safe.length, 0.95, 0.9, 0.01, 0.0)
    assert decide(goal, [probed(10, 0.95, 0.9, 0.01, 0.0), end], 10, 300).phase is Phase.REACHED
    again = probed(10 + safe.length, 0.95, 0.9, 0.01, 0.3)
    more = decide(goal, [probed(10, 0.95, 0.9, 0.01, 0.0), again], 10, 300)
    assert (more.phase, more.guidance) == (Phase.CONTINUE, GUIDED)
    many = [probed(10 * i, 0.95, 0.9, 0.01, 0.4) for i in range(1, 12)]
    assert decide(goal, many, 10, 300).guidance > FARTHEST
    assert end.reaches(goal)
    assert not again.reaches(goal) and again.reaches(Goal(0.9, 0.02))


def test_a_goal_for_attacks_hardens_and_hardening_has_a_goal(shapes: Model) -> None:
    assert str(Goal.parse("asr<=0.1")) == "ua>=0.98, retain_drift<=0.02, ra_drop<=0.02, asr<=0.1"
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(until="asr<=0.1"))
    assert plan.options.harden == 8 and plan.goal == Goal(anchor=0.0, asr=0.1)
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(harden=4))
    assert plan.goal == HARDENED and plan.options.harden == 4
    plain = make_plan(shapes.settings, "shapes", "circle", EraseOptions(steps=5))
    fixed = make_plan(shapes.settings, "shapes", "circle", EraseOptions(harden=4, steps=5))
    assert fixed.goal is None and fixed.recipe.retain_weight > plain.recipe.retain_weight
    passes = [sum(cost.passes for cost in erasure_stages(each) if cost.stage == "training") for each in (plain, fixed)]
    assert passes[1] == 3.5 * passes[0], "a step takes longer, and the dry run says so"
    with pytest.raises(ConfigError, match="harden does not work with the method esd"):
        make_plan(shapes.settings, "shapes", "circle", EraseOptions(harden=4, method="esd"))
    with pytest.raises(ConfigError, match="harden needs the frozen target"):
        make_plan(shapes.settings, "shapes", "circle", EraseOptions(harden=4, target="online"))


@pytest.mark.slow
def test_a_probe_of_a_hardened_training_is_attacked(shapes: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from salun.diffusion import probe

    monkeypatch.setattr(probe, "MANY", 24)
    monkeypatch.setattr(probe, "OTHERS", 8)
    monkeypatch.setattr(probe, "ATTACKED", 8)
    monkeypatch.setattr(harden, "LONGER", 3)
    monkeypatch.setattr(harden, "ROUND", 3)
    goal = {
        "until": "ua>=0.01, retain_drift<=0.9, ra_drop<=1, asr<=1",
        "steps": 4,
        "forget_latents": 16,
        "sampling_steps": 6,
    }
    run = salun.erase(shapes, "circle", progress=salun.silent, **{**FEW, **goal})
    until = run.record.more["until"]
    assert until["goal"] == goal["until"]
    assert until["probes"][-1]["asr"] is not None


def test_a_host_whose_model_shows_no_tokens_is_reported_before_anything_is_sampled(shapes: Model) -> None:
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(harden=4))
    bare: Any = object()
    with pytest.raises(ConfigError, match="harden needs the tokens"), training_session(bare, plan):
        pass
