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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.options import EraseJob, EraseOptions, ModelOptions
from salun.errors import Cancelled, ConfigError, SalunError
from salun.options import from_mapping
from salun.progress import Event, Progress, Stage, StageCost
from salun.user_text import is_data_set_id

from . import stages
from .messages import label, to_fields

if TYPE_CHECKING:
    from salun.diffusion.model.stable_diffusion import Model
    from salun.diffusion.plan import Plan

EVERY = 0.2  # seconds between two events on the steps of one stage
PASSES = 40  # of a sample, for the progress of an evaluation; detecting in it takes about a tenth
ATTACK_PASSES = 10  # of an attack, relative to the sampling of its images, for its progress
SET_PROMPTS = 10  # of a set that is made from a concept, for the progress of an evaluation
PAIR = ("original.png", "erased.png")  # previews of a job that samples both
PREVIEWS = 3  # forget prompts of a preview; one retain prompt is shown with them
WRITING_COSTS = [StageCost(Stage.CHECKING, 1, forward=2), StageCost(Stage.WRITING, 1, forward=3)]
EXPORT_COSTS = [StageCost(Stage.CHECKING, 1, forward=3), StageCost(Stage.EXPORTING, 1, forward=7)]


class ParentPipe:
    """The connection to the parent: events go out by `send`, its request to stop comes in as `stopping`."""

    def __init__(self, out: TextIO, inlet: TextIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self.stopping = threading.Event()
        threading.Thread(target=self._listen, args=(inlet,), daemon=True).start()

    def _listen(self, inlet: TextIO) -> None:
        inlet.readline()  # a line, or the end: both mean stop
        self.stopping.set()

    def send(self, event: str, **fields: Any) -> None:
        text = json.dumps({"event": event, **fields}, ensure_ascii=True)
        try:
            with self._lock:
                self._out.write(text + "\n")
                self._out.flush()
        except OSError:  # the parent is gone: training is saved, as when it asks to stop
            self.stopping.set()

    def send_error(self, error: SalunError) -> None:
        self.send("error", error=to_fields(error))

    def check(self) -> None:
        """Raises Cancelled once the parent wants to stop."""
        if self.stopping.is_set():
            self.send("stopping")
            raise Cancelled("stopped")


def pipe_progress(
    pipe: ParentPipe, estimator: stages.ProgressEstimator, each: Callable[[Event], None] = lambda event: None
) -> Progress:
    """A progress that reports to the parent. each: called on every event as well, before it is reported."""
    last_stage, last_time = "", 0.0

    def progress(event: Event, /) -> None:
        nonlocal last_stage, last_time
        pipe.check()
        each(event)
        if event.message and not (event.stage == Stage.SAVING and event.total):  # the names of files are in the result
            pipe.send("message", text=event.message)
        fraction, left = estimator.at(event.stage, event.step, event.total)
        now = time.monotonic()
        if event.stage != last_stage or now - last_time >= EVERY or event.step == event.total:
            last_stage, last_time = event.stage, now
            pipe.send(
                "stage",
                stage=event.stage,
                step=event.step,
                total=event.total,
                fraction=round(fraction, 4),
                left=None if left is None else round(left, 1),
                metrics={name: float(value) for name, value in event.metrics.items()},
            )

    return progress


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
    pipe.send("stage", stage=Stage.LOADING, step=0, total=0, fraction=0.0, left=None, metrics={})
    model = _model(job.model, job.options)
    pipe.check()
    plan = make_plan(model.settings, model.name, concepts, job.options)
    estimator = stages.ProgressEstimator(stages.with_saving(plan.stages()), resumed=resume)
    previews = Previews(model, plan, int(request.get("preview_every") or 0), pipe, folder)
    run = run_erase(
        model,
        concepts,
        job.options,
        progress=pipe_progress(pipe, estimator, previews),
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


class Previews:
    """Images of the same prompts and seeds before training and after every n steps of it (n = 0: none)."""

    def __init__(self, model: Model, plan: Plan, every: int, pipe: ParentPipe, folder: Path) -> None:
        from salun.diffusion.evaluation import eval_prompts

        self.model, self.plan, self.every, self.pipe, self.folder = model, plan, every, pipe, folder
        prompts = eval_prompts(plan, PREVIEWS, plan.options.seed)
        self.prompts = [*prompts.forget[:PREVIEWS], *prompts.retain[:1]]
        self.seeds = [*prompts.forget_seeds[:PREVIEWS], *prompts.retain_seeds[:1]]
        self.blur = any(c.sensitive for c in plan.concepts) and not plan.options.show_sensitive
        self.before: Any = None

    def __call__(self, event: Event) -> None:
        if not self.every or not event.total or not self.prompts:
            return
        if self.before is None and event.stage in (Stage.SALIENCY, Stage.FROZEN_TARGETS):  # still the original model
            self.before = self._images()
        due = event.step % self.every == 0 and event.step < event.total
        if event.stage == Stage.TRAINING and due and not event.message and self.before is not None:
            self._send(event.step)

    def _images(self) -> Any:
        import torch

        from salun.diffusion.data.latents import sample_images

        with torch.no_grad():
            return sample_images(self.model, [p.text for p in self.prompts], self.seeds, self._check)

    def _check(self, event: Event, /) -> None:
        self.pipe.check()

    def _send(self, step: int) -> None:
        from salun.files import write_bytes
        from salun.report import image_grid

        after, n = self._images(), len(self.prompts) - 1
        texts = [p.text for p in self.prompts]
        forget = image_grid.grid(self.before[:n], after[:n], texts[:n], blur=self.blur)
        retain = image_grid.grid(self.before[n:], after[n:], texts[n:])
        name = f"preview-{step:06d}.png"
        write_bytes(self.folder / name, image_grid.png_bytes(image_grid.stack(forget, retain)))
        self.pipe.send("preview", file=name, step=step)


def mask(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun mask`."""
    from salun.diffusion.masks import make_mask
    from salun.diffusion.plan import make_plan
    from salun.diffusion.prompts.concepts import Concept

    options: EraseOptions = from_mapping(EraseOptions, request["options"], "")
    concepts = [Concept(name) for name in request["concept"]]
    model = _model(request["model"], options)
    costs = make_plan(model.settings, model.name, concepts, options).stages()
    costs = [cost for cost in costs if cost.stage in (Stage.SAMPLING, Stage.SALIENCY)]
    result = make_mask(model, concepts, options, pipe_progress(pipe, stages.ProgressEstimator(costs)))
    result.mask.save(Path(request["output"]))
    return {**result.summary(), "output": request["output"]}


def stack(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta stack`, also for a single delta."""
    from salun.delta import commands as deltas

    progress = pipe_progress(pipe, stages.ProgressEstimator(WRITING_COSTS))
    return deltas.stack(request["model"], request["deltas"], request["output"], request["strengths"], progress=progress)


def undo(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta undo`."""
    from salun.delta import commands as deltas

    progress = pipe_progress(pipe, stages.ProgressEstimator(WRITING_COSTS))
    return deltas.undo(request["model"], request["delta"], request["output"], progress=progress)


def export(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun delta export`."""
    from salun.delta import commands as deltas

    progress = pipe_progress(pipe, stages.ProgressEstimator(EXPORT_COSTS))
    return deltas.export(
        request["delta"], request["model"], request["output"], rank=request.get("rank"), energy=request.get("energy"),
        progress=progress,
    )  # fmt: skip


def evaluate(request: dict[str, Any], pipe: ParentPipe, folder: Path) -> dict[str, Any]:
    """As `salun eval`; the page goes into the job's folder, and of a run into its folder as well."""
    from salun.diffusion.eval_output import image_metric_rows, set_rows, write_evaluation
    from salun.diffusion.evaluate import evaluate as run_evaluation
    from salun.report.metrics import banner

    options: EvalOptions = from_mapping(EvalOptions, request["options"], "")
    target = Path(request["target"])
    is_run = (target / "run.json").is_file()
    pipe.send("stage", stage=Stage.LOADING, step=0, total=0, fraction=0.0, left=None, metrics={})
    costs = evaluation_costs(options, compared=is_run or options.against is not None)
    progress = stages.continued(pipe_progress(pipe, stages.ProgressEstimator(costs)), costs)
    result = run_evaluation(str(target), options, progress)
    for home in (folder, target) if is_run else (folder,):
        write_evaluation(result, home)
    data, lines = result.as_json(), []
    banners = {name: banner(metrics, label) for name, metrics in result.metrics.items()}
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
    pipe.send("stage", stage=Stage.LOADING, step=0, total=0, fraction=0.0, left=None, metrics={})
    images = options.n * (max(1, len(options.concept)) + 1)
    costs = [StageCost(stage, images, forward=images) for stage in (Stage.IMAGES_BEFORE, Stage.IMAGES_AFTER)]
    made = images * ATTACK_PASSES * len(options.attacks) * (2 if options.control else 1)
    costs.append(StageCost(Stage.ATTACKING, made, forward=made))
    progress = stages.continued(pipe_progress(pipe, stages.ProgressEstimator(costs)), costs[:2])
    report = run_attacks(str(target), options, progress)
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

    pipe.send("stage", stage=Stage.LOADING, step=0, total=0, fraction=0.0, left=None, metrics={})
    progress = pipe_progress(pipe, stages.ProgressEstimator([StageCost(Stage.SAMPLING, 1, forward=1)]))
    images = sample_run(
        Path(request["target"]), request["prompt"], [0.0, request["strength"]], request["seed"],
        model=request["model"], progress=progress, cache=Cache.of_user(),
    )  # fmt: skip
    for name, image in zip(PAIR, images, strict=True):
        write_bytes(folder / name, png_bytes(image))
        pipe.send("preview", file=name, step=0)
    record = read_run(Path(request["target"]))
    blurred = any(concept.get("sensitive") is True for concept in record["concepts"])
    shown = {name: request[name] for name in ("prompt", "strength", "seed")}
    return {**shown, "sensitive": blurred and not record["options"].get("show_sensitive")}


def evaluation_costs(options: EvalOptions, compared: bool) -> list[StageCost]:
    """What an evaluation does, for its progress; roughly, since the model that says how to sample is not loaded yet.

    Args:
        compared: Whether there is an original, which draws the anchor too.
    """
    concepts = max(1, len(options.concept))  # a run's are not known yet
    files = [Path(source) for source in options.prompts if not is_data_set_id(source)]
    further = SET_PROMPTS * concepts * len(options.sets) + sum(map(_lines, files))
    after = options.n * (concepts + 1) + further
    before = after + options.n * concepts if compared else 0
    images = [(Stage.IMAGES_BEFORE, before), (Stage.IMAGES_AFTER, after)]
    costs = [StageCost(stage, count, forward=count * PASSES) for stage, count in images if count]
    detected = (before + after) * max(1, len(options.detector))
    return [*costs, StageCost(Stage.DETECTING, detected, forward=detected * PASSES // 10)]


def _lines(file: Path) -> int:
    with file.open("rb") as content:
        return sum(1 for _ in content)


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
