"""`salun delta`: make, apply, stack, undo, look at and convert sparse deltas."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from salun.errors import ModelError
from salun.options import EraseOptions, FileOptions

from .options import with_options
from .output import Force, Json, bars, path_given, tell
from .progress import terminal_progress

app: typer.Typer = typer.Typer(
    help="Sparse deltas: what an erasure changed, in a small file that applies at any strength and undoes to the bit. "
    "Who has the delta can undo the erasure: publish the model, not the delta.",
    no_args_is_help=True,
)

Base = Annotated[
    str,
    typer.Argument(callback=path_given, metavar="BASE", help="alias, hub id, diffusers folder or .safetensors file"),
]
Erased = Annotated[
    str, typer.Argument(callback=path_given, metavar="ERASED", help="likewise, of the model with the delta in it")
]
DeltaFile = Annotated[str, typer.Argument(callback=path_given, metavar="DELTA", help="a *.salun.safetensors file")]
ModelOutput = Annotated[
    str,
    typer.Option(
        callback=path_given, help="in the model's own layout: a .safetensors file, or a folder with / at its end"
    ),
]

FineTune = Annotated[
    str | None,
    typer.Option(
        callback=path_given,
        metavar="BASE",
        help="the base that the delta was made from: its differences are added to the other model, such as a fine-tune",
    ),
]

_HELP = {item.name: item.metadata["help"] for item in fields(EraseOptions)}
KeepEma = Annotated[bool, typer.Option("--keep-ema", help=_HELP["keep_ema"])]
FILES = {"Files": ("models_dir", "allow_pickle")}


@app.command()
@with_options(FileOptions, groups=FILES)
def extract(
    options: FileOptions,
    base: Base,
    erased: Erased,
    output: Annotated[str, typer.Option(callback=path_given, help="the delta to write (.salun.safetensors)")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make the delta that leads from one model to another, such as its erased copy."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        found = deltas.extract(base, erased, output, options=options, force=force, progress=progress)
    lines = [
        f"{found['output']}: {found['bytes'] / 1e6:,.1f} MB, delta {found['id']}",
        f"{found['changed']:,} of {found['total']:,} weights ({found['density']:.2%}) differ, "
        f"in {found['tensors']} tensors",
    ]
    tell(found, as_json, lines)


@app.command()
@with_options(FileOptions, groups=FILES)
def apply(
    options: FileOptions,
    base: Base,
    delta: DeltaFile,
    output: ModelOutput,
    strength: Annotated[float, typer.Option(help="0 is the base, 1 the erased model to the bit; −0.5 to 1.5")] = 1.0,
    fine_tune_of_base: FineTune = None,
    keep_ema: KeepEma = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with the delta applied."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        found = deltas.apply(
            base,
            delta,
            output,
            strength,
            fine_tune_of=fine_tune_of_base,
            keep_ema=keep_ema,
            options=options,
            force=force,
            progress=progress,
        )
    tell(found, as_json, _applied_lines(found))


@app.command()
@with_options(FileOptions, groups=FILES)
def stack(
    options: FileOptions,
    base: Base,
    delta: Annotated[
        list[str], typer.Argument(callback=path_given, metavar="DELTA…", help="*.salun.safetensors files of this base")
    ],
    output: ModelOutput,
    strength: Annotated[
        list[float] | None, typer.Option(help="one for each delta, in their order (default: 1 throughout)")
    ] = None,
    fine_tune_of_base: FineTune = None,
    keep_ema: KeepEma = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with several deltas applied; in which order does not matter."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        found = deltas.stack(
            base,
            delta,
            output,
            strength or [],
            fine_tune_of=fine_tune_of_base,
            keep_ema=keep_ema,
            options=options,
            force=force,
            progress=progress,
        )
    tell(found, as_json, _applied_lines(found))


@app.command()
@with_options(FileOptions, groups=FILES)
def undo(
    options: FileOptions,
    erased: Erased,
    delta: DeltaFile,
    output: ModelOutput,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with the delta taken out: its base to the bit."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        found = deltas.undo(erased, delta, output, options=options, force=force, progress=progress)
    left = ", ".join(f"{one['id']} at strength {one['strength']:g}" for one in found["applied"])
    lines = [
        f"{found['output']}: delta {found['id']} is taken out, exact to the bit (hash {found['base_hash'][:12]}…)",
        *([f"still applied: {left}"] if left else []),
    ]
    tell(found, as_json, lines)


@app.command()
@with_options(FileOptions, groups=FILES)
def export(
    options: FileOptions,
    delta: DeltaFile,
    base: Annotated[str, typer.Option(callback=path_given, help="the model that the delta was made from")],
    output: Annotated[
        str,
        typer.Option(callback=path_given, help=".lora.safetensors (low rank) or .diff.safetensors (every difference)"),
    ],
    rank: Annotated[int | None, typer.Option(help="of every layer of a low-rank file", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="share of each layer's squared difference to keep instead (default: 0.9)")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the delta for ComfyUI's, A1111's and Forge's own loaders, telling what a low-rank file loses."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        found = deltas.export(
            delta, base, output, rank=rank, energy=energy, options=options, force=force, progress=progress
        )
    lines = [*found["notes"], f"{found['output']}: {found['bytes'] / 1e6:,.1f} MB, {found['tensors']} tensors"]
    if "kept" in found:
        lines += _kept_lines(found["kept"])
    tell(found, as_json, lines)


@app.command()
def inspect(delta: DeltaFile, as_json: Json = False) -> None:
    """Say what a delta changes: hashes, notes, and the share of each block (`salun inspect` does the same)."""
    from salun.diagnostics.inspect import inspect as look

    found = look(delta)
    if found["kind"] != "delta":
        raise ModelError(f"{delta} is no delta ({found['kind']}): `salun inspect` tells more")
    lines = [f"{key}: {value}" for key, value in found.items() if key not in ("blocks", "layers")]
    tell(found, as_json, [*lines, "", "share of each block:", *bars(found["blocks"])])


def _applied_lines(found: dict[str, Any]) -> list[str]:
    names = ", ".join(f"{one['id']} at strength {one['strength']:g}" for one in found["applied"])
    exact = ", exact to the bit" if found["exact"] else ""
    return [f"{found['output']}: {names}{exact} (hash {found['result_hash'][:12]}…)", *found["notes"]]


def _kept_lines(kept: dict[str, Any]) -> list[str]:
    """The energy that a low-rank file keeps: in all, then of each group of layers."""
    groups = kept["groups"]
    width = max(map(len, groups))
    lines = [f"keeps {kept['kept']:.1%} of the difference's energy (squared norm):"]
    for name, row in groups.items():
        ranks = (
            "not held: low rank has no place for it" if row["ranks"] is None else "ranks {} to {}".format(*row["ranks"])
        )
        lines.append(f"  {name:<{width}}  {row['kept']:6.1%}  {ranks}")
    return lines
