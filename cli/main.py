"""`salun`: the command line. Heavy packages are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from salun import __version__
from salun.errors import Cancelled, ConfigError, SalunError
from salun.options import EraseJob, EraseOptions, ModelOptions, Sampling

from .options import with_options
from .progress import printable, terminal_progress

app = typer.Typer(
    name="salun",
    help="Make a Stable Diffusion model forget a concept: only its salient weights are trained, the rest stays.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ClickException: Any = typer.BadParameter.__mro__[2]  # Typer brings click under its own name or under click's

BLOCKS = {"blocks": "share of each block", "moved": "share of each block that moved"}
TRAINING_ONLY = (
    "steps", "lr", "lr_decay", "retain_weight", "target", "retain_target", "retain_latents", "save_every"
)  # fmt: skip

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="alias (see `salun models`), .safetensors file, diffusers folder, hub id, or a checkpoint's name in "
        "--models-dir (default: the small one that comes along)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else there")]
Steps = Annotated[
    int | None,
    typer.Option(help="sampler steps (default: the model's)", min=1, max=1000),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="guidance scale (default: the model's)", min=0, max=100),
]
Force = Annotated[bool, typer.Option("--force", help="overwrite files that are there already")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and stop")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show a traceback with an error")] = False,
) -> None:
    """Options of every command; `--debug` is read in `main`."""


@app.command()
@with_options(EraseJob, parameter="job")
def erase(
    job: EraseJob,
    given: set[str],
    config: Annotated[
        Path | None, typer.Option(help="options from a YAML file or a run.json; those given here go before")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the unfinished run in --run-dir; begin if there is none")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="tell what would be done, and what it would take; write nothing")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a model forget a concept, and show whether it worked."""
    job, sources = _settled(job, given, config, resume)
    if not job.concept:
        raise ConfigError("no concept is given: name what the model should forget, e.g. --concept circle")
    from salun.diffusion.concepts import Concept
    from salun.processes import current
    from salun.run_record import check_folder, new_run_folder

    wanted = [Concept(name) for name in job.concept]
    who = current()
    folder = who.share(Path(job.run_dir) if job.run_dir else new_run_folder("-".join(job.concept)))
    if not who.rank:
        check_folder(folder, resume)
    from salun.diffusion.erase import erase as run_erase

    if dry_run:
        from salun.diffusion.estimate import preview

        with terminal_progress(as_json) as progress:
            found = preview(_model(job.model), wanted, job.options, job.output, folder, progress, force)
        _tell({**found, "sources": sources}, as_json, _preview_lines(found, sources))
        return
    with terminal_progress(as_json or who.rank > 0) as progress, _resumable(folder):
        run = run_erase(
            _model(job.model),
            wanted,
            job.options,
            progress=progress,
            run_dir=folder,
            outputs=job.output,
            force=force,
            resume=resume,
            command=shlex.join(["salun", *sys.argv[1:]]),
        )
    if not who.rank:
        _tell(run.record.data, as_json, _erase_lines(run, folder, job.output))


def _settled(job: EraseJob, given: set[str], config: Path | None, resume: bool) -> tuple[EraseJob, dict[str, str]]:
    """The job with a config file's values where the command line gives none, and where each value comes from."""
    values = {item.name: getattr(job, item.name) for item in dataclasses.fields(job)}
    read: dict[str, Any] = {}
    if config is not None:
        from salun.config import read_config

        read = read_config(config)
    elif resume and job.run_dir and (Path(job.run_dir) / "run.json").is_file():
        from salun.config import read_config
        from salun.run_record import check_folder

        begun = check_folder(Path(job.run_dir), resume) or {}
        read = {**read_config(Path(job.run_dir) / "run.json"), "output": list(begun["options"].get("output", []))}
        config = Path(job.run_dir) / "run.json"
    sources = {}
    for name, value in values.items():
        if name in given:
            sources[name] = "command line"
        elif name in read:
            values[name], sources[name] = read[name], str(config)
        else:
            sources[name] = "preset" if name == "anchor" else "recipe" if value is None else "default"
    return EraseJob(**values), sources


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Within, a run that is stopped says how to go on with it."""
    try:
        yield
    except (Cancelled, KeyboardInterrupt) as stop:
        if (folder / "run.json").exists():
            raise Cancelled(
                f"stopped; go on with: {shlex.join(['salun', 'erase', '--resume', '--run-dir', str(folder)])}"
            ) from stop
        raise


def _preview_lines(found: dict[str, Any], sources: dict[str, str]) -> list[str]:
    lines = [f"{c['name']} → {c['anchor'] or 'the empty prompt'}" for c in found["concepts"]]
    lines += [*found["notes"], "", *(f"  {step}" for step in found["steps"]), ""]
    width = max(len(name) for name in found["options"])
    for name, value in found["options"].items():
        source = sources.get(name, "recipe")
        lines.append(f"  --{name.replace('_', '-'):<{width}}  {value!s:<20}  {source}")
    gib = 2**30
    lines += [
        "",
        f"time:   about {found['seconds']['total'] / 60:.1f} min on {found['device']} "
        + "("
        + ", ".join(f"{k} {v:.0f} s" for k, v in found["seconds"].items() if k != "total")
        + ")",
        f"memory: about {found['memory']['needed'] / gib:.2f} GiB, {_gib(found['memory']['free'])} free",
        f"disk:   about {found['disk']['needed'] / gib:.2f} GiB in {found['run_dir']}, "
        f"{_gib(found['disk']['free'])} free",
    ]
    return [*lines, *(f"warning: {text}" for text in found["warnings"])]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


@app.command()
@with_options(
    EraseOptions,
    skip=(*TRAINING_ONLY, "keep_ema"),
)
def mask(
    options: EraseOptions,
    concept: Annotated[
        list[str], typer.Option(help="the concept whose salient weights are wanted; repeat it for several")
    ],
    output: Annotated[Path, typer.Option(help="the mask file to write (.safetensors)")],
    model: ModelName = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Only compute a saliency mask and write it."""
    from salun.diffusion.concepts import Concept

    wanted = [Concept(name) for name in concept]
    _new_file(output, force, ".safetensors")
    from salun.diffusion.erase import make_mask
    from salun.diffusion.loading import load_with

    with terminal_progress(as_json) as progress:
        found, seen = make_mask(load_with(_model(model), options), wanted, options, progress)
    found.save(output)
    lines = [
        f"{found.selected:,} of {found.total:,} weights ({found.density:.2%}) selected: {output}",
        *seen["warnings"],
    ]
    _tell({**seen, "selected": found.selected, "total": found.total, "path": str(output)}, as_json, lines)


@app.command()
@with_options(ModelOptions)
def sample(
    options: ModelOptions,
    prompt: Annotated[list[str], typer.Option(help="a prompt; repeat it for several")],
    output: Annotated[Path, typer.Option(help="the picture to write (.png): one row per prompt")] = Path("sample.png"),
    model: ModelName = None,
    delta: Annotated[Path | None, typer.Option(help="an erased delta to sample with")] = None,
    strength: Annotated[
        float, typer.Option(help="of the delta: 0 is the base, 1 the erased model", min=-0.5, max=1.5)
    ] = 1.0,
    n: Annotated[int, typer.Option("-n", help="pictures per prompt", min=1, max=64)] = 4,
    seed: Annotated[int, typer.Option(help="of the first picture", min=0)] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what the pictures are guided away from")] = None,
    force: Force = False,
) -> None:
    """Sample pictures from a model, with or without an erased delta."""
    _new_file(output, force, ".png")
    import dataclasses

    from salun.diffusion.latents import item_seed, sample_pictures
    from salun.diffusion.loading import load_with
    from salun.formats.tensorfile import write_bytes
    from salun.report import picture

    with terminal_progress(False) as progress:
        loaded = load_with(_model(model), options)
        wished = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt}
        changes: dict[str, Any] = {name: value for name, value in wished.items() if value is not None}
        chosen: Sampling = dataclasses.replace(loaded.settings.sampling, **changes)
        loaded.settings = dataclasses.replace(loaded.settings, sampling=chosen)
        if delta is not None:
            from salun.formats.delta import Delta

            loaded.load(Delta.load(delta).apply(loaded.original(), strength))
        texts = [text for text in prompt for _ in range(n)]
        seeds = [item_seed(seed, "sample", i) for _ in prompt for i in range(n)]
        pictures = sample_pictures(loaded, texts, seeds, progress)
    write_bytes(output, picture.png_bytes(picture.sheet(pictures, n, prompt)))
    typer.echo(str(output))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder made by `salun erase`")],
    n: Annotated[
        int, typer.Option("-n", help="pictures, each of forget and retain prompts", min=2, max=1_000_000)
    ] = 1000,
    seed: Annotated[int, typer.Option(help="of the pictures", min=0)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    as_json: Json = False,
) -> None:
    """Judge a finished run thoroughly: base against erased on n held-out pictures each."""
    from salun.diffusion.evaluate import evaluate_run

    with terminal_progress(as_json) as progress:
        metrics = evaluate_run(run, n, seed, device, progress)
    _tell(metrics, as_json, _metric_lines(metrics))


@app.command()
@with_options(ModelOptions, skip=("device", "dtype"))
def inspect(
    options: ModelOptions,
    path: Annotated[str, typer.Argument(help="a model (alias, file, folder, hub id), mask, delta, or run folder")],
    against: Annotated[
        str | None, typer.Option(help="a second mask or run folder: tell how far the two masks agree")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write the picture of the layers to a page (.html)")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say what a file or folder is, what is in it, and which layers of the network it touches."""
    if html is not None:
        _new_file(html, force, ".html")
    from salun.inspection import inspect as look
    from salun.inspection import overlap

    found = look(path, options) if against is None else overlap(path, against)
    charts = {title: found[key] for key, title in BLOCKS.items() if found.get(key)}
    facts = {key: value for key, value in found.items() if key not in (*BLOCKS, "layers")}
    lines = [f"{key}: {value}" for key, value in facts.items()]
    for title, blocks in charts.items():
        lines += ["", f"{title}:", *_bars(blocks)]
    if html is not None:
        from salun.report.page import layers_page

        title = path if against is None else f"{path} and {against}"
        layers_page(title, facts, charts, found.get("layers", {})).save(html)
        lines.append(f"page: {html}")
    _tell(found, as_json, lines)


def _bars(blocks: dict[str, list[int]], width: int = 40) -> list[str]:
    """A line of text with a bar for each block."""
    widest = max(map(len, blocks))
    lines = []
    for block, (some, total) in blocks.items():
        share = some / total if total else 0.0
        bar = "█" * round(share * width)
        lines.append(f"  {block:<{widest}}  {bar:<{width}}  {share:6.1%} of {total:,}")
    return lines


@app.command()
def concepts(model: ModelName = None, as_json: Json = False) -> None:
    """List the presets and, for a model that carries a vocabulary, the words it knows."""
    from salun.diffusion.concepts import presets
    from salun.diffusion.loading import describe

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
    lines.append(
        "Any other text works too, except on a model with a vocabulary of its own: --concept TEXT --anchor TEXT"
    )
    _tell(found, as_json, lines)


@app.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="do not try to reach the hub")] = False,
    as_json: Json = False,
) -> None:
    """Look at versions, devices, folders and models; say what would fail and how to mend it."""
    from salun.doctor import examine

    found = examine(network=not offline)
    signs = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}
    lines = []
    for one in found:
        lines.append(f"{signs[one.verdict]}  {one.what}: {one.found}")
        if one.advice:
            lines.append(f"       → {one.advice}")
    _tell([dataclasses.asdict(one) for one in found], as_json, lines)
    if any(one.verdict == "fails" for one in found):
        raise typer.Exit(1)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="remove everything in it")] = False,
    as_json: Json = False,
) -> None:
    """Show the cache of sampled latents and converted .ckpt files, which runs share, or empty it."""
    from salun.cache import Cache

    kept = Cache.of_user()
    if clear:
        removed = kept.clear()
        _tell({"folder": str(kept.folder), "removed": removed}, as_json, [f"{removed} entries removed"])
        return
    found, pickles = kept.entries(), kept.converted_files()
    size, converted = sum(taken for _, taken, _ in found), sum(taken for _, taken in pickles)
    facts = {"folder": str(kept.folder), "entries": len(found), "bytes": size, "limit": kept.limit}
    facts |= {"converted": len(pickles), "converted_bytes": converted}
    lines = [
        f"folder:  {kept.folder} (SALUN_CACHE names another)",
        f"entries: {len(found)}, {size / 1e6:.1f} MB of at most {kept.limit / 1e6:.0f} MB (SALUN_CACHE_SIZE)",
        f"converted .ckpt files: {len(pickles)}, {converted / 1e6:.1f} MB (kept until --clear)",
    ]
    _tell(facts, as_json, lines)


@app.command()
def models(as_json: Json = False) -> None:
    """List the model aliases."""
    from salun.diffusion.finding import aliases

    table = aliases()["models"]
    _tell(
        table,
        as_json,
        [f"{k:<8} {e.get('repo', 'comes with salun'):<48} {e.get('about', '')}" for k, e in table.items()],
    )


def _model(name: str | None) -> str:
    if name is not None:
        return name
    from salun.diffusion.finding import aliases

    return str(aliases()["default"])


def _new_file(path: Path, force: bool, ending: str) -> None:
    if path.suffix != ending:
        raise ConfigError(f"--output {path}: end it in {ending}")
    if path.exists() and not force:
        raise ConfigError(f"--output {path} is there already: choose another name, or add --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def _tell(data: Any, as_json: bool, lines: list[str]) -> None:
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False))
    else:
        for line in lines:
            typer.echo(printable(line))


def _erase_lines(run: Any, folder: Path, outputs: list[str]) -> list[str]:
    lines = [f"warning: {text}" for text in run.record.data["mask"]["warnings"]]
    lines += _metric_lines(run.metrics)
    rounding = run.record.data["rounding"]
    if rounding["warning"]:
        lines.insert(0, f"warning: {rounding['warning']}")
    elif rounding["rounded_away"]:
        share = rounding["rounded_away"] / rounding["moved"]
        lines.append(f"{share:.1%} of the weights that moved did so by less than the file's number format can hold")
    told = {Path(place).name: place for place in outputs}  # run.json has no path of this machine, people need it
    lines += [f"{entry['kind']}: {told.get(entry['path'], entry['path'])}" for entry in run.record.data["outputs"]]
    return [*lines, f"run folder: {folder}", f"report: {folder / 'report.html'}"]


def _metric_lines(metrics: dict[str, Any]) -> list[str]:
    if metrics.get("ua") is None:
        return [f"forgotten: not known ({metrics['reason']})"]
    share = "{value:.1f} % ({low:.1f} to {high:.1f}, n = {n})".format
    lines = [f"forgotten (UA):  {share(**metrics['ua'])}, before {metrics['ua_before']['value']:.1f} %"]
    if metrics["anchor"] is not None:
        lines.append(f"anchor shown:    {share(**metrics['anchor'])}")
    if "all" in metrics["kept"]:
        lines.append(
            f"the rest kept:   {share(**metrics['kept']['all'])}, before {metrics['kept_before']['all']['value']:.1f} %"
        )
    lines.append(f"other concepts (RA): {share(**metrics['ra_after'])}, before {metrics['ra_before']['value']:.1f} %")
    if len(metrics["per_concept"]) > 1:
        for name, figures in metrics["per_concept"].items():
            anchor = f", anchor {figures['anchor']['value']:.1f} %" if figures["anchor"] is not None else ""
            lines.append(
                f"  {name}: UA {figures['ua']['value']:.1f} %{anchor}, no picture {figures['none']['value']:.1f} %"
            )
    return lines


from .delta import app as _delta  # noqa: E402  (it uses what stands above)

app.add_typer(_delta, name="delta")

from . import classify as _classify  # noqa: E402, F401  (its commands join the app)
from . import ui as _ui  # noqa: E402, F401


def main() -> None:
    """Run the CLI. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted. Errors are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows is not UTF-8 by itself
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name="salun")
    except typer.Exit as stop:
        code = stop.exit_code
    except (Cancelled, KeyboardInterrupt, typer.Abort) as stop:
        known = isinstance(stop, Cancelled) and "--resume" in str(stop)
        _complain(str(stop) if known else "stopped; no half-written file is left. Give the command again to start over")
        code = 130
    except SalunError as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(str(error))
        code = 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError) as error:
        from salun.device import is_out_of_memory

        if "--debug" in sys.argv[1:] or not is_out_of_memory(error):
            raise
        _complain("out of memory: free some, or try --dtype bf16, --low-vram, a smaller --resolution or --batch-size")
        code = 1
    except OSError as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
        code = 1
    except ClickException as error:
        text = error.format_message()
        if text:  # empty where the help was printed instead
            _complain(f"{text} (see `salun --help`)")
        code = 2
    sys.exit(code or 0)


def _complain(text: str) -> None:
    typer.echo("salun: " + printable(" ".join(text.split())), err=True)


if __name__ == "__main__":
    main()
