"""What attacks would do, and how long that takes, before they begin."""

from __future__ import annotations

from typing import Any

from salun.diffusion.attack import attack_plan, with_defaults
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.estimate import measured_pace, seconds_of
from salun.diffusion.eval_models import compared_models
from salun.diffusion.model.settings import display_name
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.stages import attack_passes, attack_stages
from salun.progress import Event, Progress, Stage, StageCost, silent


def preview_attack(target: str, options: AttackOptions, progress: Progress = silent) -> dict[str, Any]:
    """The attacks that `attack` would make with these arguments, and their time by passes measured here.

    Nothing is written. A search takes less where prompts succeed early, and results in the cache take none.

    Returns:
        "attacks": attack, title, passes, and least and most seconds of each on all concepts and models; "least" and
        "most" seconds of everything, images and the detector included.

    Raises what `attack` would before its first image.
    """
    _ = options.attacks  # checked before a model is loaded
    compared = compared_models(target, options)
    original, plan = attack_plan(target, compared, options)
    options = with_defaults(options, original)
    batch_size, at_once = original.settings.recipe.batch_size, batch_size_of(original)
    times = len(plan.concepts) * (2 if options.control else 1)
    progress(Event(Stage.MEASURING, message=f"measuring this machine for {original.name}"))
    assert isinstance(original, Model)
    with original.temporarily_trainable(), original.configured(plan.options):
        pace = measured_pace(original, plan)
    attacks = []
    for each in options.attacks:
        passes = times * attack_passes(plan, each, options.n, batch_size)
        seconds = seconds_of(at_once, plan, [StageCost(Stage.ATTACKING, 1, forward=passes)], pace)
        ends = {end: seconds[end] for end in ("least", "most")}
        attacks.append({"attack": each.text, "title": each.title, "passes": passes, **ends})
    total = seconds_of(at_once, plan, attack_stages(plan, options, batch_size), pace)
    return {
        "model": compared.name, "original": display_name(original.name), "device": str(original.device),
        "concepts": [{"name": concept.name, "anchor": concept.anchor} for concept in plan.concepts],
        "detector": plan.detector, "n": options.n, "control": options.control, "attacks": attacks,
        "notes": plan.notes, "least": total["least"], "most": total["most"],
    }  # fmt: skip
