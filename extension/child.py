"""The child process of a job: `python extension FOLDER` does what FOLDER/request.json asks and tells it as JSON lines.

It runs in whatever interpreter has the packages, so it imports nothing of the host. One JSON object a line on stdout:

    {"event": "stage", "stage", "step", "total", "fraction", "left", "metrics"}
    {"event": "message", "text"}      {"event": "preview", "file"}      {"event": "stopping"}
    {"event": "result", "result"}     {"event": "error", "kind", "text"}

A line on stdin, or its end, asks it to stop at the next step: so no child outlives the program that began it. Exit
codes are those of the command line: 0 done, 1 error, 2 wrong usage, 130 stopped.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from salun.diffusion.options import EraseJob, EraseOptions, ModelOptions
from salun.errors import Cancelled, ConfigError, SalunError
from salun.options import from_mapping
from salun.progress import Event, Progress

from . import stages

if TYPE_CHECKING:
    from salun.diffusion.model.stable_diffusion import Model
    from salun.diffusion.plan import Plan

EVERY = 0.2  # seconds between two lines on the steps of one stage
LACKING = "press Set up where there is one, else install what is missing by pip"
PREVIEWS = 3  # forget prompts of a preview; one retain prompt comes beside them


class Line:
    """The way to the parent: events go out by `say`, its wish to stop comes in as `stopping`."""

    def __init__(self, out: TextIO, inlet: TextIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self.stopping = threading.Event()
        threading.Thread(target=self._listen, args=(inlet,), daemon=True).start()

    def _listen(self, inlet: TextIO) -> None:
        inlet.readline()  # a word, or the end: both mean stop
        self.stopping.set()

    def say(self, event: str, **what: Any) -> None:
        text = json.dumps({"event": event, **what}, ensure_ascii=True)
        try:
            with self._lock:
                self._out.write(text + "\n")
                self._out.flush()
        except OSError:  # the parent is no more: what there is to lose is kept, as when it asks to stop
            self.stopping.set()

    def check(self) -> None:
        """Raises Cancelled once the parent wants to stop."""
        if self.stopping.is_set():
            self.say("stopping")
            raise Cancelled("stopped")


def telling(
    line: Line, clock: stages.ProgressEstimator, each: Callable[[Event], None] = lambda event: None
) -> Progress:
    """A progress that goes to the parent. each: called on every event as well, before it is told."""
    told_stage, told_at = "", 0.0

    def progress(event: Event, /) -> None:
        nonlocal told_stage, told_at
        line.check()
        each(event)
        if event.message:
            line.say("message", text=event.message)
        fraction, left = clock.at(event.stage, event.step, event.total)
        now = time.monotonic()
        if event.stage != told_stage or now - told_at >= EVERY or event.step == event.total:
            told_stage, told_at = event.stage, now
            line.say(
                "stage",
                stage=event.stage,
                step=event.step,
                total=event.total,
                fraction=round(fraction, 4),
                left=None if left is None else round(left, 1),
                metrics={name: float(value) for name, value in event.metrics.items()},
            )

    return progress


def erase(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun erase`: the whole of an erasure, with previews."""
    from salun.checkpoints.locate import aliases
    from salun.diffusion.erase import erase as run_erase
    from salun.diffusion.model.loading import load_with
    from salun.diffusion.plan import make_plan
    from salun.diffusion.prompts.concepts import Concept
    from salun.runs.folder import check_folder

    job: EraseJob = from_mapping(EraseJob, asked["options"], "")
    if not job.concept:
        raise ConfigError("no concept is given: name what the model should forget")
    if job.run_dir is None:
        raise ConfigError("the job has no run folder")
    wanted = [Concept(name) for name in job.concept]
    check_folder(Path(job.run_dir), bool(asked.get("resume")))
    line.say("stage", stage="loading", step=0, total=0, fraction=0.0, left=None, metrics={})
    model = load_with(job.model or str(aliases()["default"]), job.options)
    line.check()
    plan = make_plan(model.settings, model.name, wanted, job.options)
    clock = stages.ProgressEstimator(stages.shares_of_erasure(plan))
    previews = Previews(model, plan, int(asked.get("preview_every") or 0), line, folder)
    run = run_erase(
        model,
        wanted,
        job.options,
        progress=telling(line, clock, previews),
        run_dir=job.run_dir,
        outputs=job.output,
        resume=bool(asked.get("resume")),
        command=f"the tab ({asked.get('host', 'salun ui')})",
    )
    return {"run_dir": job.run_dir, "metrics": run.metrics, "outputs": run.record.data["outputs"]}


class Previews:
    """Pictures of the same prompts and seeds: before training, and after every n steps of it (n = 0: none)."""

    def __init__(self, model: Model, plan: Plan, every: int, line: Line, folder: Path) -> None:
        from salun.diffusion.evaluation import questions

        self.model, self.plan, self.every, self.line, self.folder = model, plan, every, line, folder
        asked = questions(plan, PREVIEWS, plan.options.seed)
        self.prompts = [*asked.forget[:PREVIEWS], *asked.retain[:1]]
        self.seeds = [*asked.forget_seeds[:PREVIEWS], *asked.retain_seeds[:1]]
        self.blur = any(c.sensitive for c in plan.concepts) and not plan.options.show_sensitive
        self.before: Any = None

    def __call__(self, event: Event) -> None:
        if not self.every or not event.total or not self.prompts:
            return
        if self.before is None and event.stage in ("saliency", "frozen targets"):  # the model is still its own
            self.before = self._pictures()
        due = event.step % self.every == 0 and event.step < event.total
        if event.stage == "training" and due and not event.message and self.before is not None:
            self._show(event.step)

    def _pictures(self) -> Any:
        import torch

        from salun.diffusion.data.latents import sample_images

        with torch.no_grad():
            return sample_images(self.model, [p.text for p in self.prompts], self.seeds, self._stop)

    def _stop(self, event: Event, /) -> None:
        self.line.check()

    def _show(self, step: int) -> None:
        from salun.files import write_bytes
        from salun.report import picture

        after, n = self._pictures(), len(self.prompts) - 1
        texts = [p.text for p in self.prompts]
        forget = picture.grid(self.before[:n], after[:n], texts[:n], blur=self.blur)
        kept = picture.grid(self.before[n:], after[n:], texts[n:])
        name = f"preview-{step:06d}.png"
        write_bytes(self.folder / name, picture.png_bytes(picture.stack(forget, kept)))
        self.line.say("preview", file=name, step=step)


def mask(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun mask`."""
    from salun.checkpoints.locate import aliases
    from salun.diffusion.masks import make_mask
    from salun.diffusion.model.loading import load_with
    from salun.diffusion.prompts.concepts import Concept

    options: EraseOptions = from_mapping(EraseOptions, asked["options"], "")
    wanted = [Concept(name) for name in asked["concept"]]
    progress = telling(line, stages.ProgressEstimator({"sampling": 0.8, "saliency": 0.2}))
    found, told = make_mask(load_with(asked["model"] or str(aliases()["default"]), options), wanted, options, progress)
    found.save(Path(asked["output"]))
    return {**told, "selected": found.selected, "total": found.total, "output": asked["output"]}


def stack(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun delta stack`, which `salun delta apply` is for one."""
    from salun.delta import commands as deltas

    progress = telling(line, stages.ProgressEstimator({"checking": 0.4, "writing": 0.6}))
    return deltas.stack(asked["model"], asked["deltas"], asked["output"], asked["strengths"], progress=progress)


def undo(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun delta undo`."""
    from salun.delta import commands as deltas

    progress = telling(line, stages.ProgressEstimator({"checking": 0.4, "writing": 0.6}))
    return deltas.undo(asked["model"], asked["delta"], asked["output"], progress=progress)


def export(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun delta export`."""
    from salun.delta import commands as deltas

    progress = telling(line, stages.ProgressEstimator({"checking": 0.3, "exporting": 0.7}))
    return deltas.export(
        asked["delta"], asked["model"], asked["output"], rank=asked.get("rank"), energy=asked.get("energy"),
        progress=progress,
    )  # fmt: skip


def inspect(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """As `salun inspect`, of one thing or of two masks."""
    from salun.diagnostics.inspect import inspect as look
    from salun.diagnostics.inspect import overlap

    if asked.get("against"):
        return overlap(asked["path"], asked["against"])
    return look(asked["path"], ModelOptions())


def overlaps(asked: dict[str, Any], line: Line, folder: Path) -> dict[str, Any]:
    """Entries that deltas both change, pair by pair."""
    from salun.delta.delta import Delta
    from salun.delta.stacking import overlaps as shared

    loaded = {Delta.load(path).id: path for path in asked["deltas"]}
    found = shared([Delta.load(path) for path in loaded.values()])
    names = {one: Path(path).parent.name for one, path in loaded.items()}
    rows = [{"names": [names[one], names[two]], "entries": n} for (one, two), n in found.items()]
    return {"kind": "overlaps", "overlaps": rows}


KINDS = {
    "erase": erase, "mask": mask, "stack": stack, "undo": undo, "export": export, "inspect": inspect,
    "overlaps": overlaps,
}  # fmt: skip


def work(folder: Path, line: Line) -> int:
    """Do the request in `folder`, and tell how it ended. Returns the exit code."""
    try:
        asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        line.say("result", result=KINDS[asked["kind"]](asked, line, folder))
        return 0
    except (Cancelled, KeyboardInterrupt):
        return 130
    except SalunError as error:
        line.say("error", kind=type(error).__name__, text=str(error))
        return 2 if isinstance(error, ConfigError) else 1
    except ImportError as error:
        line.say("error", kind="ImportError", text=f"this Python lacks a package ({error}): {LACKING}")
        return 1
    except OSError as error:
        line.say("error", kind="OSError", text=f"{error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        from salun.compute.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        line.say("error", kind="MemoryError", text="out of memory: try low VRAM, bf16, a smaller batch or resolution")
        return 1


def main() -> None:
    """Keep stdout for events alone: what libraries print goes to stderr, which the parent keeps as the job's log."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    line = Line(events, sys.stdin)
    try:
        code = work(Path(sys.argv[1]), line)
    except Exception as error:
        import traceback

        traceback.print_exc()
        line.say("error", kind=type(error).__name__, text=f"{type(error).__name__}: {error} (the log tells more)")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the thread that listens on stdin may hold the interpreter up
