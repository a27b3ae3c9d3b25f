"""`salun delta`: extract, apply, stack, undo, inspect and export sparse deltas."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from salun.diffusion.options import EraseOptions
from salun.errors import ModelError
from salun.options import FileOptions

from .options import with_options
from .output import Force, Json, bars, fact_lines, print_result, unquoted_path
from .progress import terminal_progress

app: typer.Typer = typer.Typer(
    help="Sparse deltas: what an erasure changed, in a small file that applies at any strength and undoes bit-exactly. "
    "Anyone with the delta can undo the erasure: publish the model, not the delta.",
    no_args_is_help=True,
)

Base = Annotated[
    str,
    typer.Argument(
        callback=unquoted_path, metavar="BASE", help="Base model: alias, hub id, diffusers folder or .safetensors file."
    ),
]
Erased = Annotated[
    str, typer.Argument(callback=unquoted_path, metavar="ERASED", help="Erased model: file, folder, alias or hub id.")
]
DeltaFile = Annotated[
    str, typer.Argument(callback=unquoted_path, metavar="DELTA", help="Delta file (.salun.safetensors).")
]
ModelOutput = Annotated[
    str,
    typer.Option(
        callback=unquoted_path, help="Output in the model's layout: a .safetensors file, or a folder with / at its end."
    ),
]

FineTune = Annotated[
    str | None,
    typer.Option(
        callback=unquoted_path,
        metavar="BASE",
        help="The delta's original base, if BASE is another model, such as a fine-tune: differences are added.",
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
    output: Annotated[str, typer.Option(callback=unquoted_path, help="Delta file to write (.salun.safetensors).")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the delta from one model to another, such as its erased copy."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        result = deltas.extract(base, erased, output, options=options, force=force, progress=progress)
    lines = [
        f"{result['output']}: {result['bytes'] / 1e6:,.1f} MB, delta {result['id']}",
        f"{result['changed']:,} of {result['total']:,} weights ({result['density']:.2%}) differ, "
        f"in {result['tensors']} tensors",
    ]
    print_result(result, as_json, lines)


@app.command()
@with_options(FileOptions, groups=FILES)
def apply(
    options: FileOptions,
    base: Base,
    delta: DeltaFile,
    output: ModelOutput,
    strength: Annotated[
        float, typer.Option(help="Delta strength from −0.5 to 1.5: 0 is the base, 1 the erased model, byte-identical.")
    ] = 1.0,
    fine_tune_of_base: FineTune = None,
    keep_ema: KeepEma = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with the delta applied."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        result = deltas.apply(
            base,
            delta,
            output,
            strength,
            fine_tune_of_base=fine_tune_of_base,
            keep_ema=keep_ema,
            options=options,
            force=force,
            progress=progress,
        )
    print_result(result, as_json, _applied_lines(result))


@app.command()
@with_options(FileOptions, groups=FILES)
def stack(
    options: FileOptions,
    base: Base,
    delta: Annotated[
        list[str],
        typer.Argument(callback=unquoted_path, metavar="DELTA…", help="Delta files (.salun.safetensors) of this base."),
    ],
    output: ModelOutput,
    strength: Annotated[list[float] | None, typer.Option(help="One strength per delta, in order (default: 1).")] = None,
    fine_tune_of_base: FineTune = None,
    keep_ema: KeepEma = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with several deltas applied. The order does not matter."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        result = deltas.stack(
            base,
            delta,
            output,
            strength or [],
            fine_tune_of_base=fine_tune_of_base,
            keep_ema=keep_ema,
            options=options,
            force=force,
            progress=progress,
        )
    print_result(result, as_json, _applied_lines(result))


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
    """Write a copy of a model with the delta undone: its base, bit-exact."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        result = deltas.undo(erased, delta, output, options=options, force=force, progress=progress)
    left = ", ".join(f"{entry['id']} at strength {entry['strength']:g}" for entry in result["applied"])
    lines = [
        f"{result['output']}: delta {result['id']} is undone, bit-exact (hash {result['base_hash'][:12]}…)",
        *([f"still applied: {left}"] if left else []),
    ]
    print_result(result, as_json, lines)


@app.command()
@with_options(FileOptions, groups=FILES)
def export(
    options: FileOptions,
    delta: DeltaFile,
    base: Annotated[str, typer.Option(callback=unquoted_path, help="Base model that the delta was made from.")],
    output: Annotated[
        str,
        typer.Option(
            callback=unquoted_path,
            help="File to write: .lora.safetensors (low rank) or .diff.safetensors (full difference).",
        ),
    ],
    rank: Annotated[int | None, typer.Option(help="LoRA rank of every layer.", min=1)] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Choose each layer's rank to keep this fraction of its squared norm (default: 0.9)."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the delta as a LoRA file for ComfyUI, A1111 and Forge, and report what a low-rank file loses."""
    from salun.delta import commands as deltas

    with terminal_progress(as_json) as progress:
        result = deltas.export(
            delta, base, output, rank=rank, energy=energy, options=options, force=force, progress=progress
        )
    lines = [*result["notes"], f"{result['output']}: {result['bytes'] / 1e6:,.1f} MB, {result['tensors']} tensors"]
    if "kept" in result:
        lines += _energy_lines(result["kept"])
    print_result(result, as_json, lines)


@app.command()
def inspect(delta: DeltaFile, as_json: Json = False) -> None:
    """Show what a delta changes: hashes, notes and the fraction of each block (as `salun inspect` does)."""
    from salun.diagnostics.inspect import inspect as look

    facts = look(delta)
    if facts["kind"] != "delta":
        raise ModelError(f"{delta} is not a delta but a {facts['kind']}", advice="See `salun inspect`")
    lines = fact_lines({key: value for key, value in facts.items() if key not in ("blocks", "layers")})
    print_result(facts, as_json, [*lines, "", "Fraction of each block that changed:", *bars(facts["blocks"])])


def _applied_lines(result: dict[str, Any]) -> list[str]:
    names = ", ".join(f"{entry['id']} at strength {entry['strength']:g}" for entry in result["applied"])
    exact = ", bit-exact" if result["exact"] else ""
    return [f"{result['output']}: {names}{exact} (hash {result['result_hash'][:12]}…)", *result["notes"]]


def _energy_lines(energy: dict[str, Any]) -> list[str]:
    """The energy that a low-rank file keeps: in all, then of each group of layers."""
    groups = energy["groups"]
    width = max(map(len, groups))
    lines = [f"keeps {energy['kept']:.1%} of the difference's energy (squared norm):"]
    for name, row in groups.items():
        ranks = "not saved: no low-rank form" if row["ranks"] is None else "ranks {} to {}".format(*row["ranks"])
        lines.append(f"  {name:<{width}}  {row['kept']:6.1%}  {ranks}")
    return lines
