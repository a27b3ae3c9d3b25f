"""The registry of methods, and the first entries against their equations."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import salun
from salun.diffusion.data.latents import sample_until
from salun.diffusion.estimate import preview
from salun.diffusion.methods.esd import GUIDANCE, SAMPLING_STEPS
from salun.diffusion.methods.uce import UceOptions, edit_of
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.errors import ConfigError
from salun.methods import METHODS, Method, load
from salun.randomness import step_generator

from .conftest import SHORT

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


def test_uce_edit_minimizes_its_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, c, g, r = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (4, 3, 3, 8))
    options = UceOptions(uce_erase=2.0, uce_preserve=0.7, uce_lambda=0.3)
    edited = (weight @ edit_of(c, g, r, options)).requires_grad_()
    loss = (
        2.0 * (c @ edited.T - g @ weight.T).square().sum()
        + 0.7 * (r @ edited.T - r @ weight.T).square().sum()
        + 0.3 * (edited - weight).square().sum()
    )
    loss.backward()
    assert edited.grad is not None and edited.grad.abs().max() < 1e-9


def test_uce_edit_of_a_concept_to_itself_changes_nothing() -> None:
    c = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(edit_of(c, c, c, UceOptions()), torch.eye(6, dtype=torch.float64))


def test_uce_edits_keys_and_values_of_cross_attention_alone(shapes: Model) -> None:
    run = salun.erase(shapes, salun.Concept("circle", anchor="square"), method="uce", **SHORT)
    assert run.erased and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in run.erased)
    assert run.history == [] and run.delta.changed > 0
    assert run.metrics["anchor_gap"]["value"] < 0.5, "the forget prompts are answered more like the anchor's"


@pytest.mark.parametrize("scope", ["selfattn", "noxattn"])
def test_uce_without_cross_attention_in_scope_is_rejected(scope: str, shapes: Model) -> None:
    with pytest.raises(ConfigError, match=f"scope is {scope}, which has no cross-attention"):
        salun.erase(shapes, "circle", method="uce", scope=scope, **{**SHORT, "eval_images": 0})


def test_dry_run_describes_what_each_method_does(tmp_path: Path) -> None:
    def steps(method: str) -> str:
        return "\n".join(preview("shapes", "circle", EraseOptions(**SHORT, method=method), [], tmp_path / "r")["steps"])

    assert "4 steps of 4 forget and 4 retain samples" in steps("salun")
    assert "4 steps of 4 samples" in steps("esd") and "retain" not in steps("esd")
    assert "UCE, in closed form" in steps("uce") and "steps of" not in steps("uce")


def test_esd_loss_is_the_distance_to_the_negatively_guided_prediction(shapes: Model) -> None:
    few = {**SHORT, "steps": 1, "batch_size": 2}
    run = salun.erase(shapes, salun.Concept("circle", anchor="square"), method="esd", seed=5, **few)
    generator = step_generator(5, 0)
    prompts = [prompt.text for prompt in run.plan.prompts.concepts[0].forget]
    rows = torch.randint(len(prompts), (2,), generator=generator)
    step = int(torch.randint(SAMPLING_STEPS, (1,), generator=generator))
    c, empty = shapes.encode([prompts[i] for i in rows]), shapes.encode([""]).expand(2)
    x_t, t = sample_until(shapes, c, empty, step, SAMPLING_STEPS, GUIDANCE, generator)
    with torch.no_grad():
        of_c, of_empty = shapes.predict(x_t, t, c), shapes.predict(x_t, t, empty)
    expected = (of_c - (of_empty - 1.0 * (of_c - of_empty))).square().mean()
    assert run.history[0]["erase"] == pytest.approx(float(expected), rel=1e-4)


def test_esd_scope_says_which_layers_train(shapes: Model) -> None:
    few = {**SHORT, "steps": 1, "batch_size": 2, "eval_images": 0}
    run = salun.erase(shapes, "circle", method="esd", scope="xattn", **few)
    assert run.erased and all(".attn2." in name for name in run.erased)


@pytest.mark.parametrize("name", METHODS["diffusion"])
def test_stages_of_the_plan_are_the_steps_that_progress_reports(name: str, shapes: Model) -> None:
    few = {**SHORT, "steps": 2, "batch_size": 2, "eval_images": 2}
    steps: dict[str, set[int]] = {}

    def progress(event: salun.Event, /) -> None:
        if event.step and event.total:
            steps.setdefault(event.stage, set()).add(event.total)

    run = salun.erase(shapes, "circle", method=name, progress=progress, **few)
    planned = {cost.stage: cost.steps for cost in run.plan.stages()}
    measured = {stage: totals for stage, totals in steps.items() if stage in planned}
    if run.history:
        assert measured == {stage: {count} for stage, count in planned.items()}
    else:  # a closed form counts layers, which a plan does not know
        assert set(measured) == set(planned)
