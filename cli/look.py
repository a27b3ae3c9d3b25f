"""`salun inspect`, `concepts`, `models`, `doctor` and `cache`: what is installed, and what would fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from salun.diffusion.options import ModelOptions

from .app import app
from .options import with_options
from .output import Force, Json, ModelName, bars, new_file, path_given, tell

BLOCKS = {"blocks": "fraction of each block", "moved": "fraction of each block that changed"}


@app.command()
@with_options(ModelOptions, skip=("device", "dtype"))
def inspect(
    options: ModelOptions,
    path: Annotated[
        str,
        typer.Argument(callback=path_given, help="Model (alias, file, folder, hub id), mask, delta or run folder."),
    ],
    against: Annotated[
        str | None,
        typer.Option(callback=path_given, help="Second mask or run folder, to compare the two masks."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(callback=path_given, help="HTML file for charts of the layers (.html).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what a file or folder is, what it holds, and which layers of the network it covers."""
    if html is not None:
        new_file(html, force, ".html")
    from salun.diagnostics.inspect import inspect as look
    from salun.diagnostics.inspect import overlap

    found = look(path, options) if against is None else overlap(path, against)
    charts = {title: found[key] for key, title in BLOCKS.items() if found.get(key)}
    facts = {key: value for key, value in found.items() if key not in (*BLOCKS, "layers")}
    lines = [f"{key}: {value}" for key, value in facts.items()]
    for title, blocks in charts.items():
        lines += ["", f"{title}:", *bars(blocks)]
    if html is not None:
        from salun.report.page import layers_page

        title = path if against is None else f"{path} and {against}"
        layers_page(title, facts, charts, found.get("layers", {})).save(html)
        lines.append(f"page: {html}")
    tell(found, as_json, lines)


@app.command()
def concepts(model: ModelName = None, as_json: Json = False) -> None:
    """List the preset concepts or, of a model with a vocabulary, the concepts it knows."""
    from salun.diffusion.model.loading import describe
    from salun.diffusion.prompts.concepts import presets

    found: dict[str, Any] = {}
    if model is not None:
        vocabulary = describe(model).settings.vocabulary
        if vocabulary is not None:
            for attribute, values in vocabulary.attributes.items():
                found.update({v: {"kind": attribute, "anchor": vocabulary.anchors.get(v, "")} for v in values})
    if not found:
        found = {
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
        for name, e in found.items()
    ]
    lines.append("Any other text works too, except on a model with a vocabulary: --concept TEXT --anchor TEXT")
    tell(found, as_json, lines)


@app.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Skip the check that the hub can be reached.")] = False,
    as_json: Json = False,
) -> None:
    """Check versions, devices, folders and models; list what would fail and how to fix it."""
    from salun.diagnostics.doctor import examine

    found = examine(network=not offline)
    signs = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}
    lines = []
    for check in found:
        lines.append(f"{signs[check.verdict]}  {check.what}: {check.found}")
        if check.advice:
            lines.append(f"       → {check.advice}")
    tell([dataclasses.asdict(check) for check in found], as_json, lines)
    if any(check.verdict == "fails" for check in found):
        raise typer.Exit(1)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything in it.")] = False,
    as_json: Json = False,
) -> None:
    """Show or clear the cache of sampled latents and converted .ckpt files, which runs share."""
    from salun.runs.cache import Cache

    shared = Cache.of_user()
    if clear:
        removed = shared.clear()
        tell({"folder": str(shared.folder), "removed": removed}, as_json, [f"{removed} entries removed"])
        return
    found, pickles = shared.entries(), shared.converted_files()
    size, converted = sum(taken for _, taken, _ in found), sum(taken for _, taken in pickles)
    facts = {"folder": str(shared.folder), "entries": len(found), "bytes": size, "limit": shared.limit}
    facts |= {"converted": len(pickles), "converted_bytes": converted}
    lines = [
        f"folder:  {shared.folder} (set by SALUN_CACHE)",
        f"entries: {len(found)}, {size / 1e6:.1f} MB of at most {shared.limit / 1e6:.0f} MB (set by SALUN_CACHE_SIZE)",
        f"converted .ckpt files: {len(pickles)}, {converted / 1e6:.1f} MB (removed only by --clear)",
    ]
    tell(facts, as_json, lines)


@app.command()
def models(as_json: Json = False) -> None:
    """List the model aliases."""
    from salun.checkpoints.locate import aliases

    table = aliases()["models"]
    tell(
        table,
        as_json,
        [f"{k:<8} {e.get('repo', 'comes with salun'):<48} {e.get('about', '')}" for k, e in table.items()],
    )
