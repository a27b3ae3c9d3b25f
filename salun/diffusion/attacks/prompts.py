"""Prompts of a file: those that an attack made on this or another model, or any list of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun.options import NoOptions

if TYPE_CHECKING:
    import numpy as np

    from salun.diffusion.attacks.task import AttackResult, AttackTask
    from salun.diffusion.model.protocol import Conditioning


def prompts(task: AttackTask, options: NoOptions) -> AttackResult:
    """Sample each prompt of the file once, with its own seed if it has one.

    `facts` has the rate of each attack whose prompts these are, an estimate of percent.
    """
    from salun.diffusion.attacks.task import AttackResult

    path = Path(task.argument).expanduser()
    if path.suffix.lower() == ".safetensors":
        conditioning, seeds, labels, texts = _made(task, path)
    else:
        conditioning, seeds, labels, texts = _listed(task, path)
    latents, shown = task.attempt(conditioning, seeds)
    task.report(1, 1)
    facts = {"asr_by_attack": _rates(labels, shown)} if any(labels) else {}
    return AttackResult(shown, latents, 1, task.passes, facts=facts, texts=texts)


def _made(task: AttackTask, path: Path) -> tuple[Conditioning, list[int], list[str], list[str]]:
    """(conditionings, seeds, the attack that made each, texts) of a file that `salun attack` wrote.

    Without those that were made for another concept of the plan.
    """
    from salun.diffusion.attacks.adversarial import encoded, made_for, read_adversarial
    from salun.diffusion.model.protocol import Conditioning
    from salun.errors import DataError

    parts, seeds, labels, texts = [], list[int](), list[str](), list[str]()
    concept, concepts = task.plan.concepts[task.concept].name, [each.name for each in task.plan.concepts]
    mine = [entry for entry in read_adversarial(path) if made_for(entry[0], concepts) in (concept, None)]
    if not mine:
        raise DataError(f"{path.name} holds no prompts that were made for “{concept}”")
    for name, made in mine:
        parts.append(encoded(task, made, path))
        seeds += made.seeds
        labels += [name] * len(made.seeds)
        texts += made.texts if len(made.texts) == len(made.seeds) else [""] * len(made.seeds)
    return Conditioning.cat(parts), seeds, labels, texts


def _listed(task: AttackTask, path: Path) -> tuple[Conditioning, list[int], list[str], list[str]]:
    """Likewise of a list of prompts."""
    from salun.diffusion.data.latents import item_seed
    from salun.diffusion.prompts.prompt_file import read_prompts

    rows = read_prompts(path).rows
    seeds = [item_seed(task.seed, "attack", i) if row.seed is None else row.seed for i, row in enumerate(rows)]
    texts = [row.text for row in rows]
    return task.encode(texts), seeds, [""] * len(rows), texts


def _rates(labels: list[str], shown: np.ndarray) -> dict[str, Any]:
    """Attack → percentage of its prompts that brought the concept back."""
    import numpy as np

    from salun.evaluation.estimate import Estimate

    made_by = np.array(labels)
    return {name: Estimate.percentage(shown[made_by == name]).as_json() for name in dict.fromkeys(labels)}
