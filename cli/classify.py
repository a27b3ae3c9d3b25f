"""`salun classify-train`, `classify-unlearn`, `classify-compare`, `classify-eval`: unlearning in image classifiers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.classification.options import TrainOptions
from salun.classification.unlearn_options import GROUPS, NOT_COMPARED, CompareOptions, UnlearnOptions

from .app import app
from .options import with_options
from .output import Json, duration, flag, print_result, sentences, unquoted_path
from .progress import terminal_progress
from .resuming import Config, note_new_run, resumable, with_config

RunDir = Annotated[Path | None, typer.Option(callback=unquoted_path, help="Run folder (default: runs/<time>-<name>)")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume the unfinished run in --run-dir, with the models it has trained"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done and the estimated time; write nothing")
]


def _add_command(
    name: str,
    kind: type,
    folder: Callable[[Any], str],
    run: str,
    lines: Callable[[Any], list[str]],
    preview: str,
    preview_lines: Callable[[Mapping[str, Any]], list[str]],
    help: str,
    skip: tuple[str, ...] = (),
) -> None:
    """Add a command that makes a run.

    Args:
        kind: Its option class; the options in `skip` are not on the command line.
        folder: Options → the end of the run folder's default name.
        run, preview: "module:function" of the command, and of --dry-run.
        lines, preview_lines: The result of either function → lines to print.
    """

    @app.command(name, help=help)
    @with_options(kind, skip=skip, groups=GROUPS)
    def classify(
        options: Any,
        given: set[str],
        config: Config = None,
        run_dir: RunDir = None,
        resume: Resume = False,
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from salun.runs.folder import check_folder, new_run_folder

        options = with_config(options, given, config, resume, run_dir, as_json)
        path = run_dir or new_run_folder(folder(options))
        note_new_run(path, resume, as_json)
        if dry_run:
            check_folder(path, resume)
            with terminal_progress(as_json) as progress:
                data = _load(preview)(options, progress=progress, run_dir=path)
            print_result(data, as_json, preview_lines(data))
            return
        line = shlex.join(["salun", *sys.argv[1:]])
        with terminal_progress(as_json, path) as progress, resumable(name, path):
            done = _load(run)(options, progress=progress, run_dir=path, resume=resume, command=line)
        print_result(done.record.as_json(), as_json, lines(done))


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(f"salun.classification.{module}"), name)
    return function


def _training_lines(done: Any) -> list[str]:
    folder = done.record.folder
    folder = folder.absolute()
    files = [f"model: {folder / 'model.safetensors'}", f"report: {folder / 'report.html'}"]
    return [*_accuracy_lines(done.metrics), *files]


def _unlearning_lines(done: Any) -> list[str]:
    from salun.evaluation.retrain_verdict import verdict_on_classifier
    from salun.report.metrics import banner_of, lines_of

    data, folder = done.record.as_json(), done.record.folder
    return [
        *(f"warning: {text}" for text in (data["mask"] or {}).get("warnings", [])),
        *sentences(lines_of(banner_of(verdict_on_classifier(done.metrics), flag))),
        *table_lines(done.metrics),
        f"forget: {data['options']['forget']}",
        f"model: {folder.absolute() / 'model.safetensors'}",
        f"run folder: {folder.absolute()}",
    ]


def _comparison_lines(done: Any) -> list[str]:
    from salun.classification.table import difference_lines
    from salun.classification.table import lines_of as table_lines
    from salun.evaluation.retrain_verdict import verdict_on_comparison
    from salun.report.metrics import banner_of, lines_of

    lines = [*_columns(table_lines(done.metrics)), "", *_columns(difference_lines(done.metrics))]
    notes = [f"warning: {text}" for text in done.record.notes]
    verdict = verdict_on_comparison(done.metrics)
    banner = lines_of(banner_of(verdict, flag)) if verdict is not None else []
    return [*notes, *banner, *lines, f"report: {done.record.folder.absolute() / 'report.html'}"]


@app.command("classify-eval")
def classify_eval(
    run: Annotated[
        Path,
        typer.Argument(callback=unquoted_path, help="Run folder of `salun classify-train` or `classify-unlearn`"),
    ],
    data: Annotated[
        str | None, typer.Option(callback=unquoted_path, help="Path of the run's data (default: the recorded path)")
    ] = None,
    device: Annotated[str, typer.Option(help="Compute device: auto, cpu, cuda, cuda:1, mps")] = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a finished run again, on its own split."""
    from salun.classification.experiment import evaluate

    with terminal_progress(as_json) as progress:
        metrics = evaluate(run, data=data, device=device, progress=progress)
    print_result(metrics, as_json, table_lines(metrics) if "UA" in metrics else _accuracy_lines(metrics))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, each column as wide as its widest cell."""
    if len(rows) < 2:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _preview_lines(preview: Mapping[str, Any]) -> list[str]:
    rows, cached = preview["rows"], preview["cached"]
    lines = [
        f"data: {preview['data']}, {preview['classes']} classes; {rows['train']:,} training images, "
        f"{rows['validation']:,} validation, {rows['test']:,} test",
        f"model: {preview['model']}",
    ]
    if "method" in preview:
        epochs = f", {preview['epochs']} epochs" if preview["epochs"] is not None else ""
        rate = (
            ""
            if preview["lr"] is None
            else f", lr around {preview['lr']:g}"
            if preview["search"]
            else f", lr {preview['lr']:g}"
        )
        lines.append(
            f"forget: {preview['forget']}, {rows['forget']:,} training images, by {preview['method']}{epochs}{rate}"
        )
        lines.append(f"original: {preview['given'] or _there(cached['original'])}")
        lines.append(f"Retrain: {preview['no_retrain'] or _there(cached['retrain'])}")
    else:
        lines.append(
            f"training: {preview['train_epochs']} epochs, lr {preview['train_lr']:g}; {_there(cached['original'])}"
        )
    notes = [f"note: {text}" for text in preview["notes"]]
    return [*notes, *lines, f"time: about {duration(preview['seconds'])} on {preview['device']}"]


def _there(cached: bool) -> str:
    return "in the cache" if cached else "to be trained"


def _comparison_preview_lines(preview: Mapping[str, Any]) -> list[str]:
    jobs = preview["jobs"]
    return [
        *(f"note: {text}" for text in preview["notes"]),
        f"{', '.join(preview['methods'])}; seeds {preview['seeds'][0]} to {preview['seeds'][-1]}",
        f"forget: {preview['forgetting']}, {preview['forget']} of {preview['train']:,} training images"
        " (a random forget set is drawn anew for each seed)",
        *(f"  {kind}: {count['all']} jobs, {count['done']} done" for kind, count in jobs.items() if count["all"]),
        f"time: about {duration(preview['seconds'])} with {preview['workers']} processes on {preview['device']} "
        "(less if originals and Retrain models are in the cache)",
    ]


def _accuracy_lines(metrics: Mapping[str, Any]) -> list[str]:
    parts = {part: metrics[part] for part in ("train", "validation", "test") if metrics[part] is not None}
    return [
        f"accuracy, {part}: {m['value']:.1f} % ({m['low']:.1f} to {m['high']:.1f}, n = {m['n']})"
        for part, m in parts.items()
    ]


def table_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of the original, the unlearned model and Retrain, and the gaps."""
    names = ("UA", "RA", "TA", "MIA")
    rows = {"original": metrics.get("original"), "unlearned": metrics, "Retrain": metrics.get("retrain")}
    lines = [" " * 10 + "".join(f"{name + ' %':>9}" for name in names) + f"{'RTE s':>9}"]
    for title, row in rows.items():
        if row is not None:
            seconds = row.get("RTE", {}).get("value")
            time = "" if seconds is None else f"{seconds:9.2f}"
            lines.append(f"{title:<10}" + "".join(f"{row[name]['value']:9.2f}" for name in names) + time)
    if metrics.get("gap") is not None:
        lines.append(f"{'gap':<10}" + "".join(f"{metrics['gap'][name]:9.2f}" for name in names))
        lines.append(f"mean gap to Retrain: {metrics['gap_mean']:.2f} percentage points; ToW {metrics['ToW']:.4f}")
    elif "reason" in metrics:
        lines.append(f"gap to Retrain: unknown ({metrics['reason']})")
    return lines


_add_command(
    "classify-train", TrainOptions, lambda options: f"train-{options.data}",
    "experiment:train", _training_lines, "preview:preview_training", _preview_lines,
    "Train an image classifier as the original of later unlearning.",
)  # fmt: skip
_add_command(
    "classify-unlearn", UnlearnOptions, lambda options: f"{options.method}-{options.forget or options.data}",
    "experiment:unlearn", _unlearning_lines, "preview:preview_unlearning", _preview_lines,
    "Make an image classifier forget some of its training images, and compare it with one that never saw them.",
)  # fmt: skip
_add_command(
    "classify-compare", CompareOptions,
    lambda options: "-".join(filter(None, ("compare", options.data, options.forget))),
    "compare:compare", _comparison_lines, "preview:preview_comparison", _comparison_preview_lines,
    "Compare unlearning methods over several seeds with retraining: one table, as in the paper.", NOT_COMPARED,
)  # fmt: skip
