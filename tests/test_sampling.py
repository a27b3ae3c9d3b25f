"""How training samples and images are made: sampler, steps and guidance are options; few-step models are recognized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from typer.testing import CliRunner

import salun
from salun.checkpoints.locate import ASSETS
from salun.diffusion.data.latents import sample_latents
from salun.diffusion.estimate import preview
from salun.diffusion.model.few_steps import find_few_steps
from salun.diffusion.model.loading import describe
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import SAMPLERS, EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept
from salun.diffusion.stages import erasure_stages
from salun.errors import ConfigError
from salun.progress import Stage
from salun.runs.cache import Cache

from . import conftest

PROMPTS, SEEDS = ["one red circle, plain style", "one blue star, night style"], [1, 2]
SHORT = {name: value for name, value in conftest.SHORT.items() if name != "sampling_steps"}
FEW = {"sampling_steps": 2, "sampling_guidance": 1.0, "sampler": "lcm"}


def sampled(model: Model, **options: Any) -> Tensor:
    with model.configured(EraseOptions(**options)):
        return sample_latents(model, PROMPTS, SEEDS)


@pytest.fixture
def rows(shapes: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass through the UNet, as they happen."""
    seen: list[int] = []
    predict = shapes.predict

    def counted(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(len(x_t))
        return predict(x_t, t, conditioning)

    monkeypatch.setattr(shapes, "predict", counted)
    return seen


@torch.no_grad()
def test_default_sampler_is_the_models_own_with_guidance(shapes: Model) -> None:
    """The loop as it was before there was a choice: the same bytes."""
    scheduler = DPMSolverMultistepScheduler.from_config(shapes.scheduler_config)
    scheduler.set_timesteps(shapes.settings.sampling.steps)
    noise = [torch.randn(shapes.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    x, both = torch.stack(noise), shapes.encode([*PROMPTS, "", ""])
    for t in scheduler.timesteps:
        asked, unasked = shapes.predict(torch.cat([x, x]), t.expand(4), both).chunk(2)
        x = scheduler.step(unasked + shapes.settings.sampling.guidance * (asked - unasked), t, x).prev_sample
    assert torch.equal(sampled(shapes), x)
    assert torch.equal(sampled(shapes, sampler="dpm++2m"), x)  # on this model's schedule they are one


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_gives_each_seed_its_own_latent(shapes: Model, sampler: str) -> None:
    """Also where noise is added at each step: a sample depends neither on the batch nor on what ran before."""
    latents = sampled(shapes, sampler=sampler, sampling_steps=4)
    assert torch.isfinite(latents).all() and 0.5 < float(latents.std()) < 2
    assert torch.equal(sampled(shapes, sampler=sampler, sampling_steps=4), latents)
    with shapes.configured(EraseOptions(sampler=sampler, sampling_steps=4)):
        alone = sample_latents(shapes, PROMPTS[1:], SEEDS[1:])
    torch.testing.assert_close(latents[1:], alone, atol=1e-3, rtol=1e-3)


def test_samplers_converge_or_differ_as_they_should(shapes: Model) -> None:
    """DDIM and Euler solve the same equation; what adds noise ends elsewhere."""
    made = {name: sampled(shapes, sampler=name, sampling_steps=20) for name in SAMPLERS}
    apart = {name: float((made[name] - made["dpm++2m"]).abs().mean()) for name in SAMPLERS}
    assert max(apart["ddim"], apart["euler"]) < 0.05 < min(apart["euler_a"], apart["lcm"])


@pytest.mark.parametrize("steps", [1, 7, 49, 1000])
def test_lcm_takes_any_number_of_steps(shapes: Model, steps: int, rows: list[int]) -> None:
    class Enough(Exception):
        pass

    def stop(event: object) -> None:
        if len(rows) >= 10:
            raise Enough

    with shapes.configured(EraseOptions(sampler="lcm", sampling_steps=steps)):
        if steps < 10:
            assert torch.isfinite(sample_latents(shapes, PROMPTS, SEEDS)).all()
            assert len(rows) == steps
        else:
            with pytest.raises(Enough):
                sample_latents(shapes, PROMPTS, SEEDS, stop)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_of_one_or_less_needs_one_pass(shapes: Model, rows: list[int], guidance: float) -> None:
    without = sampled(shapes, sampling_guidance=guidance, sampling_steps=3)
    assert rows == [2, 2, 2]
    assert torch.equal(sampled(shapes, sampling_guidance=1.0, sampling_steps=3, negative_prompt="a circle"), without)
    rows.clear()
    guided = sampled(shapes, sampling_guidance=1.001, sampling_steps=3)
    assert rows == [4, 4, 4]
    torch.testing.assert_close(guided, without, atol=0.05, rtol=0.05)  # guidance near 1 has next to nothing to add


def test_cache_keeps_each_way_of_sampling_apart(shapes: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    ways: list[dict[str, Any]] = [{}, {"sampling_steps": 3}, {"sampling_steps": 3, "sampling_guidance": 2.0}]
    ways += [{"sampling_steps": 3, "sampler": name} for name in SAMPLERS[1:]]
    for way in ways:
        with shapes.configured(EraseOptions(**way)):
            kept = sample_latents(shapes, PROMPTS, SEEDS, cache=cache)
            assert torch.equal(kept, sample_latents(shapes, PROMPTS, SEEDS)), way
    assert len(cache.entries()) == len(ways)


def test_erase_samples_as_it_is_reported_and_repeats_it(shapes: Model, tmp_path: Path, rows: list[int]) -> None:
    """Training samples, and images before and after: 2 steps each, without guidance."""
    few = {"steps": 1, "batch_size": 2, "forget_latents": 2, "retain_latents": 3, "eval_images": 5, **FEW}
    first = salun.erase(shapes, "circle", run_dir=tmp_path / "a", cache=Cache(tmp_path / "c", 0), **few)
    # forget, anchor and retain samples, images before with those of the anchor, and after
    assert rows[:8] == [2, 2, 2, 2, 3, 3, 15, 15] and rows.count(10) == 2
    record = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert {name: record["options"][name] for name in FEW} == FEW
    again = salun.erase(shapes, "circle", **{name: record["options"][name] for name in few})
    assert again.delta.result_hash == first.delta.result_hash


def test_plan_resolves_steps_and_guidance(shapes: Model) -> None:
    options = make_plan(shapes.settings, "shapes", "circle", EraseOptions()).options
    own = shapes.settings.sampling
    assert (options.sampling_steps, options.sampling_guidance, options.sampler) == (own.steps, own.guidance, None)


def test_dry_run_counts_the_chosen_steps(shapes: Model, tmp_path: Path) -> None:
    def previewed(**options: Any) -> dict[str, Any]:
        return preview("shapes", "circle", EraseOptions(**{**SHORT, **options}), [], tmp_path / "run")

    few, many = previewed(sampling_steps=1, sampling_guidance=1.0), previewed(sampling_steps=1000)
    assert many["seconds"]["sampling"] > 100 * few["seconds"]["sampling"]  # 1,000 steps of twice the rows
    assert many["seconds"]["images before"] > 100 * few["seconds"]["images before"]
    assert any("1 steps" in line and "no guidance" in line for line in few["steps"])


def test_progress_counts_the_chosen_passes(shapes: Model) -> None:
    def share(**options: Any) -> float:
        plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions(**{**SHORT, **options}))
        costs = {cost.stage: cost for cost in erasure_stages(plan)}
        return costs[Stage.SAMPLING].forward / costs[Stage.TRAINING].backward

    assert share(sampling_steps=6) == pytest.approx(share() / 2)
    assert share(sampling_guidance=1.0) == pytest.approx(share() / 2)


def test_negative_prompt_without_guidance_is_reported(shapes: Model) -> None:
    def notes(**options: Any) -> list[str]:
        plan = make_plan(
            shapes.settings, "shapes", Concept("circle"), EraseOptions(negative_prompt="blurry", **options)
        )
        return plan.notes

    assert any("negative_prompt has no effect" in note for note in notes(sampling_guidance=1.0))
    assert not notes()


@pytest.mark.parametrize("wrong", [{"sampler": "plms"}, {"sampling_steps": 0}, {"sampling_guidance": -1.0}])
def test_sampling_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sampl"):
        EraseOptions(**wrong)


def test_sample_command_takes_a_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.main import app

    monkeypatch.chdir(tmp_path)
    arguments = ["sample", "--prompt", "one red circle", "-n", "1", "--steps", "2", "--force"]
    for sampler in ([], ["--sampler", "dpm++2m"], ["--sampler", "euler_a"]):
        done = CliRunner().invoke(app, [*arguments, *sampler, "--output", f"{len(sampler) and sampler[1]}.png"])
        assert done.exit_code == 0, done.output
    made = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert made["0"] == made["dpm++2m"] != made["euler_a"]
    wrong = CliRunner().invoke(app, [*arguments, "--sampler", "nope"])
    assert "sampler is 'nope'" in str(wrong.exception)


# -- few-step models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "steps", "sampler"),
    [
        ("DreamShaperXL_Turbo_v2.safetensors", "Turbo", 4, "euler_a"),
        ("sdxlturbo.safetensors", "Turbo", 4, "euler_a"),
        ("realvisxlV50_v50LightningBakedvae.safetensors", "Lightning", 4, "euler"),
        ("sdxl_lightning_8step.safetensors", "Lightning", 8, "euler"),
        ("LCM_Dreamshaper_v7.safetensors", "LCM", 4, "lcm"),
        ("ponyRealism_v21Hyper.safetensors", "Hyper", 8, "ddim"),
        ("Hyper-SDXL-1step.safetensors", "Hyper", 1, "ddim"),
        ("wai_v140_dmd2.safetensors", "DMD2", 4, "lcm"),
        ("mine-tcd.safetensors", "TCD", 8, "ddim"),
        ("hypersdxl_v2.safetensors", "Hyper", 8, "ddim"),
        ("mine-6-steps.safetensors", "few steps", 6, "euler"),
    ],
)
def test_few_step_models_are_known_by_name(name: str, kind: str, steps: int, sampler: str) -> None:
    found = find_few_steps({"the file name": name}, {}, {})
    assert found is not None
    assert (found.kind, found.sampling_steps, found.sampling_guidance, found.sampler) == (kind, steps, 1.0, sampler)
    assert f"sampling_steps {steps} sampling_guidance 1 sampler {sampler}" in found.text


@pytest.mark.parametrize(
    "name",
    ["v1-5-pruned-emaonly.safetensors", "sd_xl_base_1.0", "hyperRealism_v3", "hyper_realistic", "footsteps",
     "model-30steps", "film", "epoch3_step10"],
)  # fmt: skip
def test_other_names_give_no_hint(name: str) -> None:
    assert find_few_steps({"the file name": name}, {"modelspec.title": name}, {}) is None


def test_metadata_and_scheduler_give_the_hint_too() -> None:
    recipe = json.dumps({"primary_model_name": "base", "secondary_model_name": "JuggernautXL_lightning"})
    merged = find_few_steps({"the file name": "mine"}, {"sd_merge_recipe": recipe, "x": "turbo"}, {})
    assert merged is not None and (merged.kind, merged.source) == ("Lightning", "the metadata sd_merge_recipe")
    lcm = find_few_steps({}, {}, {"_class_name": "LCMScheduler"})
    assert lcm is not None and lcm.sampler == "lcm"
    trailing = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert find_few_steps({}, {}, trailing) is not None
    zero_snr = {**trailing, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert find_few_steps({}, {}, zero_snr) is None


@pytest.fixture
def lightning(tmp_path: Path) -> Iterator[str]:
    """The bundled model under the name of a few-step model."""
    yield str(shutil.copytree(ASSETS / "shapes", tmp_path / "shapes_lightning_4step"))


def test_hint_is_data_in_dry_run_and_record(lightning: str, tmp_path: Path) -> None:
    short = {**SHORT, "steps": 1, "eval_images": 0}
    shown = preview(lightning, "circle", EraseOptions(**short), [], tmp_path / "run")
    (hint,) = shown["hints"]
    assert (hint["kind"], hint["sampling_steps"], hint["sampler"]) == ("Lightning", 4, "euler")
    assert hint["text"] in shown["notes"]
    run = salun.erase(lightning, "circle", run_dir=tmp_path / "run", **short)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["hints"] == [hint] and hint["text"] in record["notes"]
    assert run.record.options["sampler"] is None  # a hint, and nothing is changed


@pytest.mark.parametrize("chosen", [{"sampling_steps": 4}, {"sampling_guidance": 1.0}, {"sampler": "euler"}])
def test_no_hint_where_sampling_is_chosen(lightning: str, chosen: dict[str, Any]) -> None:
    plan = make_plan(describe(lightning).settings, lightning, "circle", EraseOptions(**chosen))
    assert plan.few_steps is None and not plan.notes


def test_sample_and_inspect_give_the_hint_too(lightning: str, tmp_path: Path) -> None:
    from cli.main import app

    def printed(*more: str) -> str:
        arguments = ["--model", lightning, "--prompt", "one red circle", "-n", "1", "--output", str(tmp_path / "x.png")]
        done = CliRunner().invoke(app, ["sample", *arguments, "--force", *more])
        assert done.exit_code == 0, done.output
        return done.output

    assert "--steps 4 --guidance 1 --sampler euler" in printed()
    assert "says 'lightning'" not in printed("--guidance", "1") + printed("--steps", "2", "--sampler", "euler")
    assert "sampling_steps 4" in CliRunner().invoke(app, ["inspect", lightning]).output
