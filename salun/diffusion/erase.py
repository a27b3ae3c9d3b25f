"""SalUn for diffusion models (Fan et al., ICLR 2024): the story of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from salun.diffusion.context import RunContext, open_run
from salun.diffusion.data.training_set import build_training_set
from salun.diffusion.evaluation import compare, eval_prompts, evaluate_model
from salun.diffusion.losses import ErasureData
from salun.diffusion.mask_files import check_given_mask
from salun.diffusion.masks import mask_of_run
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.output import erased_tensors
from salun.diffusion.plan import ConceptSpec
from salun.diffusion.probe import until_of
from salun.diffusion.result import Run, write_run
from salun.diffusion.task import ErasureTask
from salun.diffusion.until import losses_of
from salun.masking.mask import Mask
from salun.progress import Progress, Stage
from salun.runs.cache import Cache


def erase(
    model: Model | str,
    concept: ConceptSpec,
    options: EraseOptions | None = None,
    *,
    progress: Progress | None = None,
    run_dir: Path | str | None = None,
    outputs: list[str] | None = None,
    force: bool = False,
    resume: bool = False,
    cache: Cache | None = None,
    command: str = "salun.erase",
    **overrides: Any,
) -> Run:
    """Make a model forget a concept, or several at once, and compare it with the original.

    Args:
        model: Loaded, or a name for `load`. It holds its own weights again afterwards.
        concept: A `Concept` or its name, or a list of them.
        overrides: Fields of `EraseOptions`, which take precedence over `options`.
        run_dir: Folder of the run; without outputs it gets the model in its own layout and the sparse delta.
        outputs: Files to write, format by name (see `write_output`). force: Overwrite those that exist.
        resume: Continue the unfinished run of these options in run_dir, to the same bytes; start one if there is none.
        progress: By default a bar on a terminal and in a notebook, lines elsewhere; `salun.silent` for none.
        cache: Of sampled latents; the user's by default.

    Raises:
        SalunError: Of a kind that says what is wrong (ConfigError, ModelError, MaskError, …), or `Cancelled` if
            `progress` raises it.
    """
    options = dataclasses.replace(options or EraseOptions(), **overrides)
    settings: dict[str, Any] = {"run_dir": run_dir, "outputs": outputs, "force": force, "resume": resume}
    with open_run(model, concept, options, **settings, progress=progress, cache=cache, command=command) as context:
        context.announce()
        run = unlearn(context)
        if not context.processes.rank:
            write_run(run, context)
    return run


def unlearn(
    context: RunContext, data: ErasureData | None = None, mask: Mask | None = None, *, grow: bool = True
) -> Run:
    """Sample, find the mask, train, compare. Writes nothing but the state to resume from.

    Args:
        data, mask: Where a host has them already; a mask must fit the model (MaskError) and the method (ConfigError).
        grow: Whether more training data may be sampled where a goal needs them.
    """
    model, plan, record = context.model, context.plan, context.record
    if mask is not None:
        check_given_mask(mask, model, plan)
    context.note(Stage.PLANNING, *plan.notes)
    prompts = eval_prompts(plan, plan.recipe.eval_images, plan.options.seed)

    with context.stage(Stage.SAMPLING):
        needed = plan.samples(masked=mask is not None)
        if data is None and needed is not None:
            data = build_training_set(model, plan, context.progress, needed, context.cache)
        record.notes += data.notes if data is not None else ()
    with context.stage(Stage.EVALUATING):
        before = evaluate_model(model, prompts, context.progress, Stage.IMAGES_BEFORE, context.cache)
    with context.stage(Stage.SALIENCY):
        mask_result = mask_of_run(context, data, mask)
        record.mask = mask_result.summary()
    with context.stage(Stage.TRAINING):
        task = ErasureTask.of(context, data, mask_result.mask)
        task.until = until_of(task, context, grow=grow)
        plan = task.plan  # with fixed steps where no detector can tell the concept
        unlearned = plan.method.call(task, plan.options)
        if task.until is not None:
            record.more["until"] = task.until.as_json(unlearned.history)
            context.note(Stage.TRAINING, task.until.summary(unlearned.history))
        record.mask |= {"selected": unlearned.mask.selected, "density": unlearned.mask.density}
    original = model.original()
    erased, record.rounding = erased_tensors(original, unlearned.mask, unlearned.weights)
    model.load(erased)
    with context.stage(Stage.EVALUATING):
        after = evaluate_model(model, prompts, context.progress, Stage.IMAGES_AFTER)
        model.load({name: original[name] for name in erased})
        metrics = compare(model, plan, prompts, before, after, context.progress)
    return Run(
        model, plan, unlearned.mask, erased, losses_of(unlearned.history), metrics, prompts, before, after, record
    )
