"""`salun erase`, `mask`, `sample` and `eval`: the commands on diffusion models."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.eval_options import GROUPS as EVAL_GROUPS
from salun.diffusion.eval_options import EvalOptions, option_name
from salun.diffusion.options import SAMPLERS, EraseJob, EraseOptions, ModelOptions, Sampling
from salun.errors import ConfigError
from salun.progress import Event, Stage
from salun.user_text import checked, prompt_text, syntax_note

from .app import app
from .erase_lines import erase_lines, preview_lines
from .options import with_options
from .output import (
    Force,
    Json,
    ModelName,
    default_model_named,
    flag,
    model_or_default,
    new_file,
    print_result,
    sentences,
    unquoted_path,
)
from .progress import terminal_progress
from .resuming import note_new_run, recorded, recorded_model, repeatable, resumable, unfinished

TRAINING_ONLY = (
    "until", "steps", "lr", "lr_decay", "retain_weight", "target", "target_guidance", "retain_target",
    "forget_timesteps", "gradient_surgery", "save_every",
)  # fmt: skip

Steps = Annotated[
    int | None,
    typer.Option(help="Sampler steps (default: the model's)", min=1, max=1000),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale (default: the model's)", min=0, max=100),
]


@app.command()
@with_options(EraseJob, parameter="job")
def erase(
    job: EraseJob,
    given: set[str],
    config: Annotated[
        Path | None,
        typer.Option(
            callback=unquoted_path, help="Read options from YAML or a run.json; the command line takes precedence"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the unfinished run in --run-dir, or start one if there is none")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated cost; write nothing")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Erase a concept from a model, and evaluate the result."""
    job, sources = _merge_config(job, given, config, resume, as_json)
    if not job.concept:
        nothing = f"there is no run in {job.run_dir} to resume, and " if resume and job.run_dir else ""
        raise ConfigError(
            f"{nothing}no concept is given", advice="Name what the model should forget, for example {concept} circle"
        )
    from salun.compute.processes import current_processes
    from salun.runs.folder import check_folder, new_run_folder

    who = current_processes()
    from_record = sources["model"] not in ("command line", "default", "recipe") and resume
    moved = recorded_model(job.model if from_record else None)
    folder = who.broadcast(Path(job.run_dir) if job.run_dir else new_run_folder("-".join(job.concept)))
    if not who.rank:
        check_folder(folder, resume)
    note_new_run(folder, resume, as_json or who.rank > 0)
    if dry_run:
        with moved:
            _print_plan(job, sources, folder, force, resume, as_json)
        return
    from salun.diffusion.erase import erase as run_erase

    with (
        terminal_progress(as_json or who.rank > 0, folder) as progress,
        default_model_named(job.model),
        moved,
        resumable("erase", folder, _repeated(job, force)),
    ):
        run = run_erase(
            model_or_default(job.model),
            list(job.concept),
            job.options,
            progress=progress,
            run_dir=folder,
            outputs=job.output,
            force=force,
            resume=resume,
            command=shlex.join(["salun", *sys.argv[1:]]),
        )
    if not who.rank:
        print_result(run.record.as_json(), as_json, erase_lines(run, folder, job))


def _print_plan(job: EraseJob, sources: dict[str, str], folder: Path, force: bool, resume: bool, as_json: bool) -> None:
    """Print what the run would do, and its estimated time, memory and disk space."""
    from salun.diffusion.estimate import preview

    with terminal_progress(as_json) as progress, default_model_named(job.model):
        model, concepts = model_or_default(job.model), list(job.concept)
        plan = preview(model, concepts, job.options, job.output, folder, progress, force, resume)
    print_result({**plan, "sources": sources}, as_json, preview_lines(plan, sources))


def _merge_config(
    job: EraseJob, given: set[str], config: Path | None, resume: bool, as_json: bool
) -> tuple[EraseJob, dict[str, str]]:
    """The job with a config file's values where the command line gives none, and where each value comes from."""
    values = {item.name: getattr(job, item.name) for item in dataclasses.fields(job)}
    read: dict[str, Any] = {}
    if config is not None:
        from salun.config import read_config

        read = read_config(config)
    wanted = {**read, **{name: values[name] for name in given}}
    folder = Path(wanted["run_dir"]) if wanted.get("run_dir") else None
    record = unfinished(folder, resume, EraseJob, wanted, as_json)
    if config is None and record is not None and folder is not None:
        config = folder / "run.json"
        read = recorded(record, folder, EraseJob, given)
    sources = {}
    for name, value in values.items():
        if name in given:
            sources[name] = "command line"
        elif name in read:
            values[name], sources[name] = read[name], str(config)
        else:
            sources[name] = "preset" if name == "anchor" else "recipe" if value is None else "default"
    return EraseJob(**values), sources


def _repeated(job: EraseJob, force: bool) -> list[str]:
    """Arguments that only the command line allows, to repeat when the run is resumed."""
    outputs = [part for path in job.output for part in ("--output", path)]
    return [*outputs, *["--allow-pickle"] * job.allow_pickle, *["--force"] * force]


@app.command()
@with_options(
    EraseOptions,
    skip=(*TRAINING_ONLY, "keep_ema", "as_given"),
)
def mask(
    options: EraseOptions,
    concept: Annotated[list[str], typer.Option(help="Concept to compute the mask for; repeatable", metavar="TEXT")],
    output: Annotated[Path, typer.Option(callback=unquoted_path, help="Mask file to write (.safetensors)")],
    model: ModelName = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compute a saliency mask and write it."""
    from salun.diffusion.prompts.concepts import Concept

    wanted = [Concept(name) for name in concept]
    new_file(output, force, ".safetensors")
    from salun.diffusion.masks import make_mask
    from salun.diffusion.model.loading import load_with
    from salun.diffusion.targets import check_output_paths, other_input_paths

    with terminal_progress(as_json) as progress, default_model_named(model):
        loaded = load_with(model_or_default(model), options)
        check_output_paths(loaded, [str(output)], None, other_input_paths(options))
        result = make_mask(loaded, wanted, options, progress)
        result.mask.save(output)
    mask = result.mask
    lines = [f"{mask.selected:,} of {mask.total:,} weights ({mask.density:.2%}) selected: {output}", *result.warnings]
    print_result({**result.summary(), "path": str(output)}, as_json, lines)


@app.command()
@with_options(ModelOptions)
def sample(
    options: ModelOptions,
    prompt: Annotated[list[str], typer.Option(help="Prompt; repeatable", metavar="TEXT")],
    output: Annotated[
        Path | None,
        typer.Option(
            callback=unquoted_path,
            help="Image to write (.png), with one row per prompt (default: sample.png, or the next free number)",
        ),
    ] = None,
    model: ModelName = None,
    delta: Annotated[Path | None, typer.Option(callback=unquoted_path, help="Delta to apply before sampling")] = None,
    strength: Annotated[
        float, typer.Option(help="Delta strength: 0 is the base, 1 the erased model", min=-0.5, max=1.5)
    ] = 1.0,
    n: Annotated[int, typer.Option("-n", help="Images per prompt", min=1, max=64)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first image", min=0)] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Annotated[str | None, typer.Option(help=f"Sampler ({', '.join(SAMPLERS)}) (default: the model's)")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt (default: the model's)")] = None,
    force: Force = False,
) -> None:
    """Sample images from a model, with or without a delta."""
    output = output or _free(Path("sample.png"))
    new_file(output, force, ".png")
    prompt = [prompt_text(checked(text, "prompt")) for text in prompt]
    from salun.diffusion.data.latents import item_seed, sample_images
    from salun.diffusion.model.few_steps import hint
    from salun.diffusion.model.loading import load_with
    from salun.diffusion.stages import sample_stages
    from salun.files import write_bytes
    from salun.report import image_grid

    with terminal_progress(False) as progress:
        loaded = load_with(model_or_default(model), options)
        wished = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt, "sampler": sampler}
        changes: dict[str, Any] = {name: value for name, value in wished.items() if value is not None}
        chosen: Sampling = dataclasses.replace(loaded.settings.sampling, **changes)
        loaded.settings = dataclasses.replace(loaded.settings, sampling=chosen)
        if delta is not None:
            from salun.delta.delta import Delta

            loaded.load(Delta.load(delta).apply(loaded.original(), strength))
        few_steps = hint(loaded.settings.few_steps, loaded.settings.sampling, steps, guidance, sampler)
        hints = [few_steps.line("", "--{}".format)] if few_steps is not None else []
        for note in [*hints, *syntax_note([*prompt, chosen.negative_prompt])]:
            progress(Event(Stage.SAMPLING, message=note))
        texts = [text for text in prompt for _ in range(n)]
        progress(Event(Stage.PLANNING, stages=sample_stages(chosen, len(texts))))
        seeds = [item_seed(seed, "sample", i) for _ in prompt for i in range(n)]
        images = sample_images(loaded, texts, seeds, progress)
        write_bytes(output, image_grid.png_bytes(image_grid.sheet(images, n, prompt)))
        progress(Event(Stage.SAVING, 1, 1))
    print_result(None, False, [str(output.absolute())])


def _free(path: Path) -> Path:
    """A path that nothing has yet: it, or it with the first free number from 2."""
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not os.path.lexists(each))


@app.command("eval")
@with_options(EvalOptions, groups=EVAL_GROUPS)
def evaluate(
    options: EvalOptions,
    target: Annotated[
        str, typer.Argument(callback=unquoted_path, help="Run folder of `salun erase`, or any model (with --against)")
    ],
    output: Annotated[
        Path | None,
        typer.Option(callback=unquoted_path, help="Folder of the results (default: the run folder, or evals/<time>-…)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate an erasure: a finished run, or any model against its original. Repeat the command to continue it."""
    from salun.diffusion.eval_output import check_output_folder, image_metric_rows, set_rows, write_evaluation
    from salun.diffusion.evaluate import evaluate as run_evaluation
    from salun.report.metrics import metric_lines
    from salun.runs.folder import new_run_folder

    is_run = (Path(target).expanduser() / "run.json").is_file()
    named = Path(target).expanduser() if is_run else new_run_folder("-".join(options.concept), Path("evals"))
    folder = output or named
    check_output_folder(folder, options)
    with terminal_progress(as_json) as progress, repeatable():
        result = run_evaluation(target, options, progress, shlex.join(["salun", *sys.argv[1:]]))
        files = write_evaluation(result, folder, progress)
    data = result.as_json()
    lines = [*result.notes]
    for name, metrics in result.metrics.items():
        lines += [f"{name}:"] * (len(result.metrics) > 1)
        lines += sentences(metric_lines(metrics, lambda option: flag(option_name(option))))
    lines += [" · ".join(filter(None, row)) for row in (*set_rows(data["sets"]), *image_metric_rows(data["sets"]))]
    print_result(data, as_json, [*lines, f"report: {files[-1].absolute()}"])
