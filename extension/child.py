"""The child process of a job: `python extension FOLDER` runs FOLDER/request.json and reports events as JSON lines.

It runs in whatever interpreter has the packages, so it imports nothing of the host. `job_events` lists the events, one
JSON object a line on stdout. A line on stdin, or its end, asks the process to stop at the next step, so that no child
outlives the program that started it. Exit codes are those of the command line: 0 done, 1 error, 2 wrong usage, 130
stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import EvalOptions, option_name
from salun.diffusion.options import EraseJob, EraseOptions, ModelOptions
from salun.errors import Cancelled, ConfigError, SalunError
from salun.options import from_mapping

from .messages import label
from .parent_pipe import ParentPipe, pipe_progress
from .previews import Previews

if TYPE_CHECKING:
    from salun.diffusion.model.stable_diffusion import Model

PAIR = ("original.png", "erased.png")  # previews of a job that samples both


def erase(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun erase`, with previews."""
    from salun.diffusion.erase import erase as run_erase
    from salun.diffusion.plan import make_plan
    from salun.diffusion.prompts.concepts import Concept
    from salun.report.metrics import banner
    from salun.runs.folder import check_folder

    job: EraseJob = from_mapping(EraseJob, request["options"], "")
    if not job.concept:
        raise ConfigError("names no concept to erase", option="concept")
    if job.run_dir is None:
        raise ConfigError("is missing", option="run_dir")
    concepts = [Concept(name) for name in job.concept]
    resume = bool(request.get("resume"))
    check_folder(Path(job.run_dir), resume)
    pipe.send_loading()
    model = _model(job.model, job.options)
    pipe.check()
    plan = make_plan(model.settings, model.name, concepts, job.options)
    previews = Previews(model, plan, int(request.get("preview_every") or 0), pipe, folder)
    run = run_erase(
        model,
        concepts,
        job.options,
        progress=pipe_progress(pipe, previews),
        run_dir=job.run_dir,
        outputs=job.output,
        resume=resume,
        command=f"the tab ({request.get('host', 'salun ui')})",
    )
    shown = dataclasses.asdict(banner(run.metrics, label))  # the first thing that the page shows of the job
    return {"run_dir": job.run_dir, "metrics": run.metrics, "outputs": run.record.outputs, "banner": shown}


def _model(name: str | None, options: EraseOptions) -> Model:
    from salun.checkpoints.locate import aliases
    from salun.diffusion.model.loading import load_with

    return load_with(name or str(aliases()["default"]), options)


def mask(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun mask`."""
    from salun.diffusion.masks import make_mask
    from salun.diffusion.prompts.concepts import Concept

    options: EraseOptions = from_mapping(EraseOptions, request["options"], "")
    concepts = [Concept(name) for name in request["concept"]]
    model = _model(request["model"], options)
    result = make_mask(model, concepts, options, pipe_progress(pipe))
    result.mask.save(Path(request["output"]))
    return {**result.summary(), "output": request["output"]}


def stack(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta stack`, also for a single delta."""
    from salun.delta import commands as deltas

    paths, strengths = request["deltas"], request["strengths"]
    return deltas.stack(request["model"], paths, request["output"], strengths, progress=pipe_progress(pipe))


def undo(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta undo`."""
    from salun.delta import commands as deltas

    return deltas.undo(request["model"], request["delta"], request["output"], progress=pipe_progress(pipe))


def export(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta export`."""
    from salun.delta import commands as deltas

    return deltas.export(
        request["delta"], request["model"], request["output"], rank=request.get("rank"), energy=request.get("energy"),
        progress=pipe_progress(pipe),
    )  # fmt: skip


def evaluate(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun eval`; the page goes into the job's folder, and of a run into its folder as well."""
    from salun.diffusion.eval_output import image_metric_rows, set_rows, write_evaluation
    from salun.diffusion.evaluate import evaluate as run_evaluation
    from salun.report.metrics import banner

    options: EvalOptions = from_mapping(EvalOptions, request["options"], "")
    target = Path(request["target"])
    is_run = (target / "run.json").is_file()
    pipe.send_loading()
    result = run_evaluation(str(target), options, pipe_progress(pipe))
    for home in (folder, target) if is_run else (folder,):
        write_evaluation(result, home)
    data, lines = result.as_json(), []
    banners = {
        name: banner(metrics, lambda option: label(option_name(option))) for name, metrics in result.metrics.items()
    }
    if len(banners) > 1:
        lines += [f"{name}: {shown.outcome}: {shown.text}" for name, shown in banners.items()]
    rows = [*set_rows(data["sets"]), *image_metric_rows(data["sets"])]
    lines += [" · ".join(filter(None, row)) for row in rows]
    first = next(iter(banners.values()), None)
    shown = dataclasses.asdict(first) if first is not None else None
    return {"notes": [*result.notes, *lines], "verdict": data["verdict"], "banner": shown}


def attack(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun attack`; the files go into the job's folder, and of a run into its folder as well."""
    from salun.diffusion.attack import attack as run_attacks
    from salun.diffusion.attack_output import write_attack
    from salun.errors import fill
    from salun.report.attacks import attack_banner, attack_lines

    options: AttackOptions = from_mapping(AttackOptions, request["options"], "")
    target = Path(request["target"])
    pipe.send_loading()
    report = run_attacks(str(target), options, pipe_progress(pipe))
    for home in (folder, target) if (target / "run.json").is_file() else (folder,):
        write_attack(report, home)
    data = report.as_json()
    shown = {part: fill(text, label) for part, text in dataclasses.asdict(attack_banner(data)).items()}
    return {"notes": [*report.record.notes, *attack_lines(data)], "banner": shown}


def sample(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """A prompt with the original of a run and with its erasure at a strength, as previews of the job."""
    from salun.diffusion.strengths import sample_run
    from salun.files import write_bytes
    from salun.report.image_grid import png_bytes
    from salun.runs.cache import Cache
    from salun.runs.reading import read_run

    pipe.send_loading()
    images = sample_run(
        Path(request["target"]), request["prompt"], [0.0, request["strength"]], request["seed"],
        model=request["model"], progress=pipe_progress(pipe), cache=Cache.of_user(),
    )  # fmt: skip
    for name, image in zip(PAIR, images, strict=True):
        write_bytes(folder / name, png_bytes(image))
        pipe.send("preview", file=name, step=0)
    record = read_run(Path(request["target"]))
    blurred = any(concept.get("sensitive") is True for concept in record["concepts"])
    shown = {name: request[name] for name in ("prompt", "strength", "seed")}
    return {**shown, "sensitive": blurred and not record["options"].get("show_sensitive")}


def inspect(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun inspect`, of a file or folder, or of two masks."""
    from salun.diagnostics.inspect import inspect as describe
    from salun.diagnostics.inspect import overlap

    if request.get("against"):
        return overlap(request["path"], request["against"])
    return describe(request["path"], ModelOptions())


def overlaps(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """Weights that deltas both change, pair by pair."""
    from salun.delta.delta import Delta
    from salun.delta.stacking import overlaps as shared

    paths = {Delta.load(path).id: path for path in request["deltas"]}
    counts = shared([Delta.load(path) for path in paths.values()])
    names = {delta: Path(path).parent.name for delta, path in paths.items()}
    rows = [{"names": [names[first], names[second]], "entries": n} for (first, second), n in counts.items()]
    return {"kind": "overlaps", "overlaps": rows}


KINDS = {
    "erase": erase, "mask": mask, "stack": stack, "undo": undo, "export": export, "inspect": inspect,
    "overlaps": overlaps, "evaluate": evaluate, "attack": attack, "sample": sample,
}  # fmt: skip


def work(folder: Path, pipe: ParentPipe) -> int:
    """Run the request in `folder`, and report how it ended. Returns the exit code."""
    try:
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        pipe.send("result", result=KINDS[request["kind"]](request, pipe, folder))
        return 0
    except (Cancelled, KeyboardInterrupt):
        return 130
    except Exception as error:
        reported = _as_salun_error(error)
        if reported is None:
            raise
        pipe.send_error(reported)
        return 2 if isinstance(error, ConfigError) else 1


def _as_salun_error(error: Exception) -> SalunError | None:
    """The error to report for an exception that has a known cause; None for a bug."""
    if isinstance(error, SalunError):
        return error
    if isinstance(error, ImportError):
        missing = f"a Python package is missing ({error})"
        return SalunError(missing, advice="Press Set up if the tab has it; otherwise install the package with pip")
    if isinstance(error, OSError):
        return SalunError(f"{error.filename or 'a file'}: {error.strerror or error}")
    from salun.compute.device import is_out_of_memory  # which needs torch

    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        advice = "Try {low_vram}, bf16 as {dtype}, or a smaller {batch_size} or {resolution}"
        return SalunError("out of memory", advice=advice, code="out-of-memory")
    return None


def main() -> None:
    """Run the job. stdout carries only events; output of libraries goes to stderr, which the parent writes to the job's
    log.
    """
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    pipe = ParentPipe(events, sys.stdin)
    try:
        code = work(Path(sys.argv[1]), pipe)
    except Exception as error:
        import traceback

        traceback.print_exc()
        pipe.send_error(SalunError(f"{type(error).__name__}: {error}", advice="See the log"))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the thread that listens on stdin may hold the interpreter up
