"""SalUn Attack: tests an erased model by attacks that try to bring the concept back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from salun.diffusion.attack import attack_compared
from salun.diffusion.attack_output import attack_grid, write_attack
from salun.diffusion.eval_models import Compared
from salun.diffusion.stages import attack_stages
from salun.errors import fill
from salun.report.attacks import attack_banner, attack_lines
from salun.report.metrics import lines_of

from .evaluate import with_given_names
from .execution import computes, graph_and_plan
from .images import to_image
from .inputs import GRAPH_OPTIONS
from .look_inputs import ATTACK, WITHOUT_TOKENS, check_families
from .model import GraphModel
from .paths import output_path, validation
from .progress import ComfyProgress
from .storage import cache
from .types import Concepts, Node, OptionValues


class SalUnAttack(Node):
    """Tests whether the concept comes back."""

    TITLE = "SalUn Attack"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING", "STRING"), ("images", "metrics", "verdict")
    OUTPUT_TOOLTIPS = (
        "Images of each attack, one row each; those that show the concept come first.",
        "Success rate of each attack and other metrics, as JSON.",
        "Whether the concept comes back, and by which attack.",
    )
    DESCRIPTION = (
        "Tests an erased model by attacks that try to bring the concept back: other seeds, completion of the "
        "original's images, relearning, quantization, merging and others. Writes attack.json and attack.html into "
        "output/salun. Detector, sampling and resolution: SalUn Options."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return ATTACK.input_types()

    @classmethod
    def VALIDATE_INPUTS(cls, attack: str | None = None, clip_model: str | None = None) -> bool | str:
        given = {"attack": attack, "clip_model": clip_model}
        return validation(
            None, "", lambda: ATTACK.options({k: v for k, v in given.items() if v is not None})[0].attacks
        )

    @computes
    def run(
        self,
        before: Any,
        after: Any,
        clip: Any,
        vae: Any,
        concept: Concepts,
        options: OptionValues | None = None,
        **values: Any,
    ) -> tuple[Tensor, str, str]:
        check_families(before, after)
        chosen, named = ATTACK.options(values)
        chosen = replace(chosen, attack=chosen.attack or WITHOUT_TOKENS)
        graph, plan = graph_and_plan(before, clip, vae, concept, {}, options)
        erased = GraphModel(after, clip, vae, plan.options.dtype)
        compared = Compared(
            "the MODEL after", graph, graph, plan.concepts, plan.options, erased.original(), erased.base_hash
        )
        bar = ComfyProgress(attack_stages(plan, chosen, graph.settings.recipe.batch_size))
        report = attack_compared(compared.name, compared, chosen, bar, "ComfyUI", cache())
        folder, name = output_path("attack", "salun", "")
        write_attack(report, folder)
        data: Mapping[str, Any] = {**report.as_json(), "folder": f"output/salun/{name}"}
        lines = [fill(line, _spelled) for line in lines_of(attack_banner(data))]
        text = with_given_names(json.dumps(data, indent=1), named)
        return to_image(attack_grid(report)), text, "\n".join([*lines, *attack_lines(data)])


def _spelled(name: str) -> str:
    """An option as a node's text names it; of one that no node has, such as `harden`, where it is."""
    return f"--{name} (on the command line)" if name in GRAPH_OPTIONS else name
