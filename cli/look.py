"""`salun inspect`, `concepts`, `models`, `doctor` and `cache`: commands that describe files and the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.options import ModelOptions
from salun.errors import DataError

from .app import app
from .classify import table_lines
from .options import with_options
from .output import (
    Force,
    Json,
    ModelName,
    bars,
    fact_lines,
    flag,
    new_file,
    print_result,
    sentences,
    unquoted_path,
)
from .resuming import resume_line

CHANGED = "fraction of each block that changed"
BLOCKS = {"blocks": "fraction of each block in the mask", "moved": CHANGED}


@app.command()
@with_options(ModelOptions, skip=("device", "dtype"))
def inspect(
    options: ModelOptions,
    path: Annotated[
        str,
        typer.Argument(
            callback=unquoted_path, help="A model (alias, file, folder, hub id), a mask, a delta or a run folder"
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(callback=unquoted_path, help="A second mask or run folder to compare with"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(callback=unquoted_path, help="Write a chart of the layers to an HTML page (.html)")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Describe a file or folder: what it is, what it contains, and which layers it changes."""
    if html is not None:
        new_file(html, force, ".html")
    from salun.diagnostics.inspect import inspect as look
    from salun.diagnostics.inspect import overlap

    data = look(path, options) if against is None else overlap(path, against)
    titles = {**BLOCKS, "blocks": CHANGED} if data["kind"] == "delta" else BLOCKS
    charts = {title: data[key] for key, title in titles.items() if data.get(key)}
    facts = {key: value for key, value in data.items() if key not in (*BLOCKS, "layers", "metrics")}
    lines = fact_lines(facts)
    for title, blocks in charts.items():
        lines += ["", f"{title[0].upper()}{title[1:]}:", *bars(blocks)]
    if data.get("metrics"):
        lines += ["", *_result_lines(data["metrics"], path)]
    elif data["kind"] == "run" and data["status"] != "done":
        lines += ["", f"Resume it: {resume_line(Path(path))}"]
    if html is not None:
        from salun.report.page import layers_page

        title = path if against is None else f"{path} and {against}"
        layers_page(title, facts, charts, data.get("layers", {})).save(html)
        lines.append(f"page: {html.absolute()}")
    print_result(data, as_json, lines)


def _result_lines(metrics: Mapping[str, Any], path: str) -> list[str]:
    """The metrics of a run, and then its verdict. Raises DataError for metrics that no run has written."""
    from salun.evaluation.retrain_verdict import verdict_on_classifier
    from salun.report.metrics import banner_of, lines_of, measured_lines, verdict_lines

    try:
        if "UA" in metrics:
            return [*table_lines(metrics), "", *sentences(lines_of(banner_of(verdict_on_classifier(metrics), flag)))]
        if "ua" not in metrics:
            return []
        return [*sentences(measured_lines(metrics)), "", *sentences(verdict_lines(metrics, flag))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the metrics in run.json are invalid ({type(error).__name__})") from error


@app.command()
def concepts(model: ModelName = None, as_json: Json = False) -> None:
    """List the presets, or the vocabulary of a model that has one."""
    from salun.diffusion.model.loading import describe
    from salun.diffusion.prompts.concepts import presets

    listed: dict[str, Any] = {}
    vocabulary = describe(model).settings.vocabulary if model is not None else None
    if vocabulary is not None:
        for attribute, values in vocabulary.attributes.items():
            listed.update({v: {"kind": attribute, "anchor": vocabulary.anchors.get(v, "")} for v in values})
    if not listed:
        listed = {
            name: {
                "kind": e["kind"],
                "anchor": e["anchors"][0],
                "about": e["about"],
                "sensitive": bool(e.get("sensitive")),
            }
            for name, e in presets().items()
        }
    lines = [
        f"{name:<18} {e['kind']:<8} → {e['anchor'] or 'the empty prompt'}"
        + ("  (sensitive)" if e.get("sensitive") else "")
        for name, e in listed.items()
    ]
    if vocabulary is None:
        lines.append("Any other text works too: --concept TEXT --anchor TEXT")
    print_result(listed, as_json, lines)


@app.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the hub")] = False,
    as_json: Json = False,
) -> None:
    """Check versions, devices, folders and models; report what would fail and how to fix it."""
    from salun.diagnostics.doctor import examine

    checks = examine(network=not offline)
    signs = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}
    lines = []
    for check in checks:
        lines.append(f"{signs[check.verdict]}  {check.what}: {check.found}")
        if check.advice:
            lines.append(f"       → {check.advice}")
    print_result([dataclasses.asdict(check) for check in checks], as_json, lines)
    if any(check.verdict == "fails" for check in checks):
        raise typer.Exit(1)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries")] = False,
    as_json: Json = False,
) -> None:
    """Show or clear the cache of sampled latents and converted .ckpt files."""
    from salun.runs.cache import Cache

    shared = Cache.of_user()
    if clear:
        removed = shared.clear()
        print_result(
            {"folder": str(shared.folder), "removed": removed},
            as_json,
            [f"{removed} {'entry' if removed == 1 else 'entries'} removed"],
        )
        return
    entries, pickles = shared.entries(), shared.converted_files()
    size, converted = sum(length for _, length, _ in entries), sum(length for _, length in pickles)
    facts = {"folder": str(shared.folder), "entries": len(entries), "bytes": size, "limit": shared.limit}
    facts |= {"converted": len(pickles), "converted_bytes": converted}
    lines = [
        f"folder:  {shared.folder} (change it by SALUN_CACHE)",
        f"entries: {len(entries)}, {size / 1e6:.1f} MB of at most {shared.limit / 1e6:.0f} MB (SALUN_CACHE_SIZE)",
        f"converted .ckpt files: {len(pickles)}, {converted / 1e6:.1f} MB (removed by --clear only)",
    ]
    print_result(facts, as_json, lines)


@app.command()
def models(as_json: Json = False) -> None:
    """List the model aliases."""
    from salun.checkpoints.locate import aliases

    table = aliases()["models"]
    lines = []
    for name, entry in table.items():
        lines += [f"{name:<8} {entry.get('repo', 'bundled')}", f"         {entry.get('about', '')}"]
    lines += ["", "A checkpoint of your own: --model FILE.safetensors, or its name with --models-dir FOLDER"]
    print_result(table, as_json, lines)
