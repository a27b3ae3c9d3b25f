"""The registry of methods, and the first entries against their equations."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import salun
from salun.diffusion import probe
from salun.diffusion.attacks.soft_tokens import occurrences
from salun.diffusion.data.latents import sample_until
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.estimate import describe_steps
from salun.diffusion.losses import draw, frozen_predictions, training_losses
from salun.diffusion.methods import fmn, rece, speed, spm, uce
from salun.diffusion.methods.fmn import concept_tokens
from salun.diffusion.model.loading import describe
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.negative_guidance import GUIDANCE, SAMPLING_STEPS
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.result import Run
from salun.diffusion.stages import erasure_stages
from salun.diffusion.task import ErasureTask
from salun.diffusion.unread import unread
from salun.errors import Cancelled, ConfigError
from salun.masking.low_rank import LowRank
from salun.methods import METHODS, Method, load
from salun.randomness import step_generator

from .conftest import short_of
from .test_families import make

ALL = [method for registry in METHODS.values() for method in registry.values()]


@pytest.mark.parametrize(
    "method", [m for task in METHODS.values() for m in task.values()], ids=lambda m: f"{m.task}-{m.name}"
)
def test_every_method_has_a_function_and_options_with_help(method: Method) -> None:
    assert method.title and method.paper and callable(load(method.run))
    assert all(item.metadata["help"] for item in dataclasses.fields(method.options))


def test_the_registry_and_options_of_methods_import_no_torch() -> None:
    code = "import sys; import salun.classification.unlearn_options, salun.diffusion.options; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "uce", "lr": 1e-3, "steps": 3}, "steps is 3, but has no .* method uce. Omit steps and lr"),
        ({"method": "uce", "retain_weight": 2.0, "target_guidance": 1.0}, "Omit retain_weight and target_guidance"),
        ({"negative_guidance": 2.0}, "negative_guidance is 2.0, but has no effect with the method salun"),
        ({"method": "ileco", "negative_guidance": 2.0}, "with the method ileco"),
        ({"method": "leco", "density": 0.1}, "density is 0.1, but has no effect with the method leco"),
        ({"method": "ca", "anchor_share": 0.3}, "anchor_share is 0.3"),
        ({"method": "erasediff", "target": "frozen"}, "target is frozen"),
        ({"method": "esd", "forget_latents": 64}, "forget_latents is 64"),
        ({"mask": "full", "density": 0.1, "guidance": 5.0}, "with the mask full. Omit density and guidance"),
        ({"mask": "a.safetensors", "density": 0.1}, "with a mask file"),
        ({"harden_weight": 0.5}, "harden_weight is 0.5, but has no effect with harden at 0"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_options_without_effect_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(**options))


@pytest.mark.parametrize("name", METHODS["diffusion"])
def test_the_options_of_a_record_have_an_effect_or_are_what_a_plan_resolves(name: str) -> None:
    """Earlier versions recorded every number of the recipe."""
    settings = describe("shapes").settings
    plan = make_plan(settings, "shapes", "circle", EraseOptions(method=name))
    assert not unread(plan.options) and make_plan(settings, "shapes", "circle", plan.options).options == plan.options
    before = {n: v for n, v in vars(plan.recipe).items() if getattr(plan.options, n, 0) is None}
    make_plan(settings, "shapes", "circle", dataclasses.replace(plan.options, **before))


def embeddings(*counts: int) -> list[torch.Tensor]:
    """Random embeddings of width 6, float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in counts]


def test_uce_edit_minimizes_its_objective() -> None:
    weight, c, g, r = embeddings(4, 3, 3, 8)
    edited = (weight @ uce.edit_of(c, g, r, 2.0, 0.7, 0.3)).requires_grad_()
    loss = (
        2.0 * (c @ edited.T - g @ weight.T).square().sum()
        + 0.7 * (r @ edited.T - r @ weight.T).square().sum()
        + 0.3 * (edited - weight).square().sum()
    )
    loss.backward()
    assert edited.grad is not None and edited.grad.abs().max() < 1e-9


def test_uce_edit_of_a_concept_to_itself_changes_nothing() -> None:
    (c,) = embeddings(3)
    torch.testing.assert_close(uce.edit_of(c, c, c, 1.0, 1.0, 0.5), torch.eye(6, dtype=torch.float64))


def test_rece_finds_the_embeddings_that_bring_the_concept_back() -> None:
    """Over two projections; no weight on length finds the very preimage."""
    first, second, c, g, r = embeddings(4, 5, 3, 3, 8)
    edit = uce.edit_of(c, g, r, 1.0, 0.1, 0.1)
    gram = first.T @ first + second.T @ second
    found = rece.adversarial(c, edit, gram, 0.2).requires_grad_()
    loss = 0.2 * found.square().sum()
    for weight in (first, second):
        loss = loss + (found @ (weight @ edit).T - c @ weight.T).square().sum()
    loss.backward()
    assert found.grad is not None and found.grad.abs().max() < 1e-9
    torch.testing.assert_close(rece.adversarial(c, edit, gram, 1e-12) @ edit.T, c, rtol=1e-4, atol=1e-6)


def test_speed_edit_is_the_least_change_that_keeps_the_retained_and_the_invariant() -> None:
    c, g, r, k = embeddings(2, 2, 2, 1)
    projection = speed.null_space(r, 1e-9)
    change = speed.edit_of(c, g, projection, k) - torch.eye(6, dtype=torch.float64)
    for kept in (r, k):
        assert (kept @ change.T).abs().max() < 1e-5
    gradient = (change @ c.T - (g - c).T) @ c + change  # of half the objective; it may point along P·k alone
    free = projection - torch.outer(p := projection @ k[0], p) / p.dot(p)
    assert (gradient @ projection @ free).abs().max() < 1e-5
    assert change.abs().max() > 0.01


def test_low_rank_change_has_the_gradient_of_the_weights_led_on() -> None:
    """Against autograd through W₀ + s·BA itself."""
    layer, x = torch.nn.Linear(5, 4), torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    original = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with LowRank(dict(layer.named_parameters()), original, 2, 0.5, seed=3, loss_scale=1024.0) as change:
        assert set(change.factors) == {"weight.A", "weight.B"}
        change.write()
        assert torch.equal(layer.weight, original["weight"]), "nothing is changed at first"
        with torch.no_grad():
            change.factors["weight.B"].fill_(0.3)
        change.write()
        loss = change.lead(layer(x).square().mean())
        loss.backward()
    a, b = (change.factors[f"weight.{name}"] for name in "AB")
    again_a, again_b = (factor.detach().clone().requires_grad_() for factor in (a, b))
    expected = torch.nn.functional.linear(x, original["weight"] + 0.5 * again_b @ again_a, original["bias"])
    expected.square().mean().backward()
    assert loss.item() == pytest.approx(float(expected.square().mean()))
    for ours, theirs in ((a, again_a), (b, again_b)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(change.weights()["weight"].view(4, 5), layer.weight.detach())


def test_uce_edits_keys_and_values_of_cross_attention_alone(shapes: Model) -> None:
    run = salun.erase(shapes, salun.Concept("circle", anchor="square"), method="uce", **short_of("uce"))
    assert run.erased and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in run.erased)
    assert run.history == [] and run.delta.changed > 0
    assert run.metrics["anchor_gap"]["value"] < 0.5, "the forget prompts are answered more like the anchor's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "uce", "scope": "selfattn"}, "scope is selfattn, which has no cross-attention for UCE"),
        ({"method": "rece", "scope": "noxattn"}, "scope is noxattn, which has no cross-attention for RECE"),
        ({"method": "speed", "scope": "selfattn"}, "for SPEED to edit"),
        ({"method": "ca", "until": "ua>=0.9", "anchor_share": 0.0}, "anchor_share is 0, but CA trains on"),
    ],
)
def test_what_a_method_cannot_do_is_rejected_by_the_plan(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(**options))


def test_fmn_needs_the_concept_in_its_prompts(shapes: Model) -> None:
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(method="fmn"))
    fmn.check(plan, shapes)
    with pytest.raises(ConfigError, match="concept is 'zebra', whose tokens are in none of its prompts"):
        fmn.check(dataclasses.replace(plan, concepts=[salun.Concept("zebra")]), shapes)


def test_dry_run_describes_what_each_method_does(shapes: Model) -> None:
    def steps(method: str) -> str:
        options = EraseOptions(**short_of(method), method=method)
        return "\n".join(describe_steps(make_plan(shapes.settings, "shapes", "circle", options)))

    assert "4 steps of 4 forget and 4 retain samples" in steps("salun")
    assert "4 steps of 4 samples" in steps("esd") and "retain" not in steps("esd")
    assert "4 steps of 4 samples" in steps("fmn") and "retain" not in steps("fmn") and "mask" not in steps("fmn")
    assert "sample 8 anchor latents, with" in steps("ca") and "4 steps of 4 samples" in steps("ca")
    assert "UCE, in closed form" in steps("uce") and "steps of" not in steps("uce")


def one_step(shapes: Model, method: str, **options: Any) -> tuple[Run, torch.Generator, Conditioning, Conditioning]:
    """A run of one step of two samples, its random numbers, and its forget prompts and their anchors."""
    few = short_of(method, **{"steps": 1, "batch_size": 2, "eval_images": 0, **options})
    run = salun.erase(shapes, salun.Concept("circle", anchor="square"), method=method, seed=5, **few)
    prompts = run.plan.prompts.concepts[0]
    c, g = (shapes.encode([prompt.text for prompt in each]) for each in (prompts.forget, prompts.anchor))
    return run, step_generator(5, 0), c, g


@torch.no_grad()
def denoised(
    shapes: Model, c: Conditioning, generator: torch.Generator, first: int = 0, end: int = SAMPLING_STEPS
) -> tuple[torch.Tensor, Callable[[Conditioning], torch.Tensor]]:
    """Which prompts were sampled down to a random step, and the original's prediction there under others."""
    rows = torch.randint(len(c), (2,), generator=generator)
    step = int(torch.randint(first, end, (1,), generator=generator))
    empty = shapes.encode([""]).expand(2)
    x_t, t = sample_until(shapes, c[rows], empty, step, SAMPLING_STEPS, GUIDANCE, generator)
    return rows, torch.no_grad()(lambda prompts: shapes.predict(x_t, t, prompts))


def mse(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).square().mean())


@pytest.mark.parametrize("method", ["salun", "salun-soft", "finetune"])
def test_salun_leads_to_the_anchor_of_the_original_and_holds_other_prompts(method: str, shapes: Model) -> None:
    """SalUn, eq. 5, in the first two steps of a training; only then can other prompts have moved."""
    few: dict[str, Any] = {"forget_latents": 2, "sampling_steps": 2, "lr": 1e-3, "steps": 2}
    run, *_ = one_step(shapes, method, **few)
    with shapes.configured(run.plan.options):
        batch = draw(shapes, build_training_set(shapes, run.plan), 2, run.plan.recipe.anchor_share, 5, 0)
    x_t = shapes.schedule.add_noise(batch.x_0, batch.noise, batch.t)
    with torch.no_grad():
        of_c, of_g = (shapes.predict(x_t, batch.t, prompts) for prompts in (batch.prompts, batch.targets))
    assert run.history[0]["forget"] == pytest.approx(mse(of_c[:2], of_g[:2]), rel=1e-4)
    assert run.history[0]["retain"] < 1e-9 < run.history[1]["retain"]


def test_forget_timesteps_are_those_of_the_options_where_the_method_takes_them(shapes: Model) -> None:
    few: dict[str, Any] = {"forget_latents": 2, "sampling_steps": 2, "forget_timesteps": "0-0.25"}
    run, *_ = one_step(shapes, "finetune", **few)
    with shapes.configured(run.plan.options):
        data = build_training_set(shapes, run.plan)
        batch = draw(shapes, data, 2, run.plan.recipe.anchor_share, 5, 0, forget_timesteps=(0, 0.25))
        frozen = frozen_predictions(shapes, batch)
        forget, _ = training_losses(shapes, batch, frozen, "frozen", "frozen")
    assert run.history[0]["forget"] == pytest.approx(float(forget), rel=1e-4)
    for method in ("esd", "erasediff", "uce"):
        with pytest.raises(
            ConfigError, match=f"forget_timesteps is 0-0.25, but has no effect with the method {method}"
        ):
            one_step(shapes, method, **few)
    for wrong in ("0.5", "0.5-0.5", "0.7-0.2", "0-1.1", "0-nan", "-0.1-1", "a-b"):
        with pytest.raises(ConfigError, match="two rising fractions"):
            EraseOptions(forget_timesteps=wrong)


def test_gradient_surgery_changes_what_a_training_learns(shapes: Model) -> None:
    """With recomputed activations too; other methods reject it."""
    few: dict[str, Any] = {"forget_latents": 4, "sampling_steps": 2, "steps": 6, "lr": 1e-4, "batch_size": 4}
    plain, apart, recomputed = (
        one_step(shapes, "salun", **few, **more)[0]
        for more in ({}, {"gradient_surgery": True}, {"gradient_surgery": True, "gradient_checkpointing": True})
    )
    assert apart.history[0] == pytest.approx(plain.history[0], rel=1e-3, abs=1e-9)
    assert apart.history[-1]["retain"] < plain.history[-1]["retain"]
    assert recomputed.history[-1] == pytest.approx(apart.history[-1], rel=1e-3)
    with pytest.raises(ConfigError, match="gradient_surgery is True, but has no effect with the method esd"):
        one_step(shapes, "esd", gradient_surgery=True)


@pytest.mark.parametrize(("method", "first"), [("esd", 0), ("leco", 1)])
def test_esd_and_leco_lead_away_from_the_concept(method: str, first: int, shapes: Model) -> None:
    """ESD, eq. 6; the change of LECO's first step is 0."""
    run, generator, c, _ = one_step(shapes, method, negative_guidance=1.5)
    rows, predict = denoised(shapes, c, generator, first)
    of_c, of_empty = predict(c[rows]), predict(shapes.encode([""]).expand(2))
    expected = mse(of_c, of_empty - 1.5 * (of_c - of_empty))
    assert run.history[0]["erase"] == pytest.approx(expected, rel=1e-4)


def test_esd_of_2025_samples_by_the_original(shapes: Model) -> None:
    """Which the model in training is no longer in its second step."""
    trained, original = (
        one_step(shapes, "esd", steps=2, lr=1e-2, esd_samples=model)[0].history for model in ("training", "original")
    )
    assert trained[0] == original[0] and trained[1] != original[1]


def test_ileco_leads_to_the_anchor_and_spm_holds_other_prompts(shapes: Model) -> None:
    run, generator, c, g = one_step(shapes, "ileco")
    rows, predict = denoised(shapes, c, generator, 1)
    assert run.history[0]["erase"] == pytest.approx(mse(predict(c[rows]), predict(g[rows])), rel=1e-4)
    run, generator, c, _ = one_step(shapes, "spm", steps=2, lr=1e-2)
    rows, predict = denoised(shapes, c, generator, 1)
    of_c, of_empty = predict(c[rows]), predict(shapes.encode([""]).expand(2))
    assert run.history[0]["erase"] == pytest.approx(mse(of_c, 2 * of_empty - of_c), rel=1e-4)
    assert run.history[0]["anchoring"] < 1e-9 < run.history[1]["anchoring"], "nothing has moved at first"
    retain = shapes.encode(["a circle", "a night sky"])
    near, far = spm.distances(retain, shapes.encode(["a circle"])).tolist()
    assert near < 1e-4 < far


def test_ant_leads_away_in_late_steps_alone(shapes: Model) -> None:
    run, generator, c, _ = one_step(shapes, "ant", mask="full", negative_guidance=2.0)
    expected = {}
    for name, first, end, sign in (("late", 7, 50, 1), ("early", 0, 7, -1)):
        rows, predict = denoised(shapes, c, generator, first, end)
        of_c, of_empty = predict(c[rows]), predict(shapes.encode([""]).expand(2))
        expected[name] = mse(of_c, of_empty - sign * 2.0 * (of_c - of_empty))
    assert {name: run.history[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert run.history[0]["empty"] < 1e-9


def test_ca_and_erasediff_follow_the_anchor_of_the_model_in_training(shapes: Model) -> None:
    """CA on images of the anchor, EraseDiff of the concept; both hold on to the noise."""
    run, generator, *_ = one_step(shapes, "ca", forget_latents=2, sampling_steps=2)
    with shapes.configured(run.plan.options):
        data = build_training_set(shapes, run.plan)
    rows = torch.randint(2, (2,), generator=generator)
    t = shapes.schedule.sample_t(2, generator)
    noise = torch.randn(2, *shapes.latent_shape, generator=generator)
    x_t = shapes.schedule.add_noise(data.anchor_latents[rows], noise, t)
    with torch.no_grad():
        of_c, of_g = shapes.predict(x_t, t, data.forget[rows]), shapes.predict(x_t, t, data.anchor[rows])
    assert run.history[0]["erase"] == pytest.approx(mse(of_c, of_g), rel=1e-4)
    target = shapes.schedule.target(data.anchor_latents[rows], noise, t)
    assert run.history[0]["anchor"] == pytest.approx(mse(of_g, target), rel=1e-4)
    run, *_ = one_step(shapes, "erasediff", forget_latents=2, sampling_steps=2)
    with shapes.configured(run.plan.options):
        batch = draw(shapes, build_training_set(shapes, run.plan), 2, 0.0, 5, 0)
    x_t = shapes.schedule.add_noise(batch.x_0, batch.noise, batch.t)
    with torch.no_grad():
        ours, anchors = (shapes.predict(x_t, batch.t, prompts) for prompts in (batch.prompts, batch.targets))
    target = shapes.schedule.target(batch.x_0, batch.noise, batch.t)
    assert run.history[0]["forget"] == pytest.approx(mse(ours[:2], anchors[:2]), rel=1e-4)
    assert run.history[0]["retain"] == pytest.approx(mse(ours[2:], target[2:]), rel=1e-4)


def test_a_low_rank_training_that_was_stopped_resumes_to_the_same_weights(shapes: Model, tmp_path: Path) -> None:
    def stop(event: salun.Event, /) -> None:
        if event.stage == "training" and event.step == 2:
            raise Cancelled("stopped")

    few: dict[str, Any] = {"steps": 3, "lr": 1e-2}
    whole, *_ = one_step(shapes, "leco", **few)
    common = short_of("leco", batch_size=2, eval_images=0, **few) | {"method": "leco", "seed": 5}
    common["run_dir"] = tmp_path / "r"
    with pytest.raises(Cancelled):
        salun.erase(shapes, salun.Concept("circle", anchor="square"), progress=stop, **common)
    steps: list[int] = []

    def note(event: salun.Event, /) -> None:
        if event.stage == "training" and event.step:
            steps.append(event.step)

    resumed = salun.erase(shapes, salun.Concept("circle", anchor="square"), progress=note, resume=True, **common)
    assert steps == [3], "the first two steps were not taken again"
    assert resumed.erased.keys() == whole.erased.keys()
    assert all(torch.equal(resumed.erased[name], tensor) for name, tensor in whole.erased.items())


def test_a_mask_is_taken_by_any_method_that_trains_weights(shapes: Model) -> None:
    run, *_ = one_step(shapes, "esd", mask="saliency", density=0.1, sampling_steps=2)
    assert run.record.mask["mode"] == "saliency" and run.mask.density == pytest.approx(0.1, abs=1e-3)
    assert run.plan.options.scope == "xattn" and run.delta.changed <= run.mask.selected
    with pytest.raises(ConfigError, match="mask is saliency, but the method uce takes none"):
        one_step(shapes, "uce", mask="saliency")


@pytest.mark.parametrize("method", ["esd", "fmn"])
def test_the_goal_of_a_method_that_needs_less_than_a_training_set_is_probed_on_samples(
    method: str, shapes: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples calibrate the detector."""
    monkeypatch.setattr(probe, "MANY", 16)
    monkeypatch.setattr(probe, "OTHERS", 8)
    goal = {"until": "ua>=0.01, retain_drift<=0.9, ra_drop<=1", "steps": 4, "sampling_steps": 4, "forget_latents": 16}
    run, *_ = one_step(shapes, method, **goal)
    assert run.record.more["until"]["steps"] == len(run.history) == 4
    with pytest.raises(ConfigError, match="until does not work with the method leco"):
        one_step(shapes, "leco", **goal)


def test_esd_scope_says_which_layers_train(shapes: Model) -> None:
    few = short_of("esd", steps=1, batch_size=2, eval_images=0)
    run = salun.erase(shapes, "circle", method="esd", scope="xattn", **few)
    assert run.erased and all(".attn2." in name for name in run.erased)


@pytest.mark.parametrize("name", METHODS["diffusion"])
def test_stages_of_the_plan_are_the_steps_that_progress_reports(name: str, shapes: Model) -> None:
    few = short_of(name, steps=2, batch_size=2, eval_images=2)
    steps: dict[str, set[int]] = {}

    def progress(event: salun.Event, /) -> None:
        if event.step and event.total:
            steps.setdefault(event.stage, set()).add(event.total)

    run = salun.erase(shapes, "circle", method=name, progress=progress, **few)
    planned = {cost.stage: cost.steps for cost in erasure_stages(run.plan)}
    measured = {stage: totals for stage, totals in steps.items() if stage in planned}
    if run.history:
        assert measured == {stage: {count} for stage, count in planned.items()}
    else:  # a closed form counts layers, which a plan does not know
        assert set(measured) == set(planned)


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Small random models of other families, whose prompts have two encoders in SDXL."""
    pipeline = {"sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[request.param]
    folder = make(tmp_path_factory.mktemp(request.param), pipeline, "epsilon", torch.float32)
    return salun.load(str(folder), device="cpu")


def test_prompts_as_tokens_encode_as_text_does_with_each_familys_encoders_and_are_hardened(layout: Model) -> None:
    texts = ["a photo of a cat", "two dogs"]
    rows, plain = [layout.tokens(text) for text in texts], layout.encode(texts)
    assert len(layout.token_embeddings) == (2 if "text_embeds" in plain.extra else 1)
    token = rows[0][-1]
    vectors = [matrix[[token]].clone().requires_grad_(True) for matrix in layout.token_embeddings]
    for encoded in (
        layout.encode_tokens(rows),
        layout.encode_tokens([[-1 if each == token else each for each in row] for row in rows], vectors),
    ):
        assert torch.equal(encoded.hidden, plain.hidden)
        assert all(torch.equal(encoded.extra[name], plain.extra[name]) for name in plain.extra)
    loss = encoded.hidden.square().sum() + sum(value.square().sum() for value in encoded.extra.values())
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, vectors))
    few = {"steps": 1, "batch_size": 2, "eval_images": 0, "sampling_steps": 1, "forget_latents": 2, "retain_latents": 2}
    run = salun.erase(layout, salun.Concept("cat", anchor="dog"), harden=2, progress=salun.silent, **few)
    assert run.history[0]["adversarial"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sdxl"], indirect=True)
@pytest.mark.parametrize("name", METHODS["diffusion"])
def test_every_method_erases_two_concepts_of_sdxl_and_is_undone_to_the_same_bits(name: str, layout: Model) -> None:
    few = short_of(name, steps=1, batch_size=2, eval_images=0, sampling_steps=1)
    rate = {"lr": 1e-3} if "lr" in METHODS["diffusion"][name].reads else {}
    concepts = [salun.Concept("cat", anchor="dog"), salun.Concept("red car", anchor="blue car")]
    run = salun.erase(layout, concepts, method=name, **few, **rate)
    base = layout.original()
    erased = {**base, **run.erased}
    undone = {**erased, **run.delta.undo(erased)}
    assert run.delta.changed and len(run.history) == ("steps" in METHODS["diffusion"][name].reads)
    assert all(torch.equal(undone[key].view(torch.int32), base[key].view(torch.int32)) for key in base)


@contextmanager
def diffusers_attention(model: Model) -> Iterator[list[torch.Tensor]]:
    """Context manager: the cross-attention maps of a pass, (n · heads, positions, tokens), by diffusers' own code."""
    from diffusers.models.attention_processor import AttnProcessor

    before, maps = model.unet.attn_processors, []
    model.unet.set_attn_processor(AttnProcessor())
    for name, module in model.unet.named_modules():
        if name.endswith(".attn2"):

            def scores(*args: Any, of: Any = module.get_attention_scores) -> torch.Tensor:
                maps.append(of(*args))
                return maps[-1]

            module.get_attention_scores = scores
    try:
        yield maps
    finally:
        model.unet.set_attn_processor(before)
        for module in model.unet.modules():
            vars(module).pop("get_attention_scores", None)


def noisy(model: Model, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *model.latent_shape, generator=generator), torch.linspace(10, 900, n).long()


def check_maps(model: Model) -> None:
    x_t, t = noisy(model, 2)
    prompts = model.encode(["one circle", "a photo"])
    with torch.no_grad(), diffusers_attention(model) as expected:
        mine = model.attention_maps(x_t, t, prompts)
    assert len(mine) == len(expected) > 1
    for ours, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-4, atol=1e-6)


def test_attention_maps_are_those_that_diffusers_computes(shapes: Model) -> None:
    check_maps(shapes)


def test_attention_maps_of_other_families_are_those_that_diffusers_computes(layout: Model) -> None:
    check_maps(layout)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fmn_takes_the_attention_from_the_tokens_of_the_concept(checkpointing: bool, shapes: Model) -> None:
    """FMN, eq. 3, by the probabilities of diffusers' own attention."""
    few: dict[str, Any] = {"forget_latents": 4, "sampling_steps": 2, "lr": 1e-3, "steps": 3}
    run, generator, *_ = one_step(shapes, "fmn", gradient_checkpointing=checkpointing, **few)
    with shapes.configured(run.plan.options):
        data = build_training_set(shapes, run.plan, needed="forget")
    rows = torch.randint(4, (2,), generator=generator)
    t = shapes.schedule.sample_t(2, generator)
    noise = torch.randn(2, *shapes.latent_shape, generator=generator)
    x_t = shapes.schedule.add_noise(data.forget_latents[rows], noise, t)
    texts = [run.plan.prompts.concepts[0].forget[data.forget_rows[row]].text for row in rows.tolist()]
    (circle,) = shapes.tokens("circle")
    at = [1 + shapes.tokens(text).index(circle) for text in texts]  # after the mark of the beginning
    with torch.no_grad(), diffusers_attention(shapes) as maps:
        shapes.predict(x_t, t, data.forget[rows])
    of_samples = [each.unflatten(0, (2, -1)) for each in maps]
    norms = [of[i, :, :, token].square().sum() for of in of_samples for i, token in enumerate(at)]
    assert run.history[0]["attention"] == pytest.approx(float(sum(norms)) / 2, rel=1e-4)
    assert run.history[-1]["attention"] != run.history[0]["attention"]
    assert any(".attn2.to_q." in name for name in run.erased)


def test_fmn_lowers_the_attention(shapes: Model) -> None:
    few: dict[str, Any] = {"forget_latents": 4, "sampling_steps": 2, "lr": 3e-3, "steps": 8, "batch_size": 8}
    run, *_ = one_step(shapes, "fmn", mask="saliency", density=0.3, **few)
    assert run.history[-1]["attention"] < run.history[0]["attention"] / 2
    assert run.mask.density == pytest.approx(0.3, abs=1e-3) and all(".attn2." in name for name in run.erased)


def test_tokens_of_several_concepts_are_marked_each_in_its_own_prompts(shapes: Model) -> None:
    few = short_of("fmn", forget_latents=3, sampling_steps=2, steps=1, batch_size=2, eval_images=0)
    run = salun.erase(shapes, ["circle", "red"], method="fmn", mask="random", **few)
    with shapes.configured(run.plan.options):
        data = build_training_set(shapes, run.plan, needed="forget")
    marked = concept_tokens(ErasureTask(shapes, run.plan, data, run.mask))
    for i, row in enumerate(marked):
        text = run.plan.prompts.concepts[i // 3].forget[data.forget_rows[i]].text
        (word,) = shapes.tokens(("circle", "red")[i // 3])
        assert row.nonzero().flatten().tolist() == [1 + shapes.tokens(text).index(word)]


def test_tokens_of_a_concept_are_marked_in_long_and_in_repeated_prompts(shapes: Model) -> None:
    """A prompt of one chunk is repeated beside one of two, which halves the attention to each copy of its tokens."""
    word = shapes.tokens("circle")
    long = " ".join(["square"] * 80 + ["circle"])
    positions, length = shapes.positions(long)
    assert length == 2 * 77 and positions[74:76] == [75, 77 + 1] and len(positions) == 81
    assert occurrences(shapes.tokens(long), [word]) == [(80, 81)]
    assert occurrences([5, 1, 2, 1, 2, 3], [[1, 2], [1, 2, 3], []]) == [(1, 3), (3, 6)]
    run, *_ = one_step(shapes, "fmn", forget_latents=2, sampling_steps=2)
    with shapes.configured(run.plan.options):
        data = build_training_set(shapes, run.plan, needed="forget")
    twice = dataclasses.replace(data, forget=Conditioning(data.forget.hidden.repeat(1, 2, 1)))
    once, both = (concept_tokens(ErasureTask(shapes, run.plan, each, run.mask)) for each in (data, twice))
    assert torch.equal(once.sum(1), torch.ones(2)) and torch.equal(both, 2 * once.repeat(1, 2))
    x_t, t = noisy(shapes, 2)
    with torch.no_grad():
        sums = [
            sum(float((each.square().sum((1, 2)) * tokens).sum()) for each in shapes.attention_maps(x_t, t, of.forget))
            for tokens, of in ((once, data), (both, twice))
        ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
