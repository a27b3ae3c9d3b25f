"""What `salun erase` prints: the plan of a dry run; at the end metrics, verdict, files, and a line to try."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from salun.checkpoints.outputs import DELTA, DIFF, LORA
from salun.diffusion.options import EraseJob
from salun.display import LABELS
from salun.methods import METHODS
from salun.progress import Stage

from .output import duration, duration_range, flag, model_or_default, sentences

TOTALS = ("total", "least", "most")  # of the seconds of a dry run, next to its stages


def preview_lines(plan: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """What a dry run found out. sources: option → where its value comes from."""
    lines = [f"{c['name']} → {c['anchor'] or 'the empty prompt'}" for c in plan["concepts"]]
    lines += [*sentences(plan["notes"]), "", *(f"  {part}" for part in sentences(plan["steps"])), ""]
    foreign = _of_other_methods(plan["options"]["method"])
    options = {name: v for name, v in plan["options"].items() if v not in (None, []) and name not in foreign}
    width = max(map(len, options))
    for name, value in options.items():
        text = ("yes" if value else "no") if isinstance(value, bool) else value
        text = ", ".join(value) if isinstance(value, list) else text
        lines.append(f"  {flag(name):<{width + 2}}  {text!s:<20}  {sources.get(name, 'recipe')}")
    gib, seconds = 2**30, plan["seconds"]
    lines += [
        "",
        f"time:   {duration_range(seconds['least'], seconds['most'])} on {plan['device']}{_unmeasured(plan)}:",
        *(f"          {LABELS[Stage(stage)].lower()}: {duration(v)}" for stage, v in _stages(seconds)),
        f"memory: about {plan['memory']['needed'] / gib:.2f} GiB, {_gib(plan['memory']['free'])} free",
        f"disk:   about {plan['disk']['needed'] / gib:.2f} GiB, {_gib(plan['disk']['free'])} free",
        f"folder: {Path(plan['run_dir']).absolute()} (not written in a dry run)",
    ]
    return [*lines, *sentences([f"warning: {text}" for text in plan["warnings"]])]


def _stages(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return [(stage, each) for stage, each in seconds.items() if each and stage not in TOTALS]


def _unmeasured(plan: dict[str, Any]) -> str:
    return "" if plan["measured"] else " (computed: the model does not fit into the free memory)"


def _of_other_methods(name: str) -> set[str]:
    """The options that only methods other than this one have."""
    methods = METHODS["diffusion"]
    each = {method.name: {item.name for item in dataclasses.fields(method.options)} for method in methods.values()}
    return set().union(*each.values()) - each[name]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def erase_lines(run: Any, folder: Path, job: EraseJob) -> list[str]:
    """What was measured; then the verdict, where everything is, and a line to try it."""
    from salun.report.metrics import measured_lines, verdict_lines

    rounding, notes = run.record.rounding, list((run.record.mask or {})["warnings"])
    lines = measured_lines(run.metrics)
    if rounding["warning"]:
        notes.insert(0, rounding["warning"])
    elif rounding["lost_to_rounding"]:
        fraction = rounding["lost_to_rounding"] / rounding["changed"]
        lines.append(f"Lost to the file's number format: {fraction:.1%} of the changed weights")
    outputs = [Path(path).expanduser() for path in job.output] or _outputs_in(folder, run.record.outputs)
    files = {_kind(path): path for path in outputs} | {"Report": folder / "report.html", "Run folder": folder}
    files = {title: path for title, path in files.items() if os.path.lexists(path)}
    return [
        *sentences([f"warning: {text}" for text in notes]),
        *sentences(lines),
        "",
        *sentences(verdict_lines(run.metrics, flag)),
        "",
        *(f"{title + ':':<12}{path.absolute()}" for title, path in files.items()),
        *_try_it(files, job, run.prompts.forget[0].text if run.prompts.forget else job.concept[0]),
    ]


def _outputs_in(folder: Path, outputs: list[dict[str, Any]]) -> list[Path]:
    """The model and the delta that a run wrote into its own folder."""
    return [folder / name for name in dict.fromkeys(entry["path"].split("/")[0] for entry in outputs)]


def _kind(path: Path) -> str:
    """What a file of a run is, by its name."""
    names = {DELTA: "Delta", LORA: "LoRA", DIFF: "Difference", "mask.safetensors": "Mask"}
    return next((kind for ending, kind in names.items() if path.name.endswith(ending)), "Model")


def _try_it(files: dict[str, Path], job: EraseJob, prompt: str) -> list[str]:
    """The command that samples the erased model, if there is a file to sample from."""
    if "Model" in files:
        model = ["--model", str(files["Model"].absolute())]
    elif "Delta" in files:
        name = model_or_default(job.model)
        place = Path(name).expanduser()
        model = [
            "--model",
            str(place.absolute()) if place.exists() else name,
            "--delta",
            str(files["Delta"].absolute()),
        ]
        model += [part for each in job.models_dir for part in ("--models-dir", str(Path(each).expanduser().absolute()))]
        model += ["--allow-pickle"] * job.allow_pickle
    else:
        return []
    names = {"prediction_type": "prediction_type", "device": "device", "dtype": "dtype"}
    names |= {"sampling_steps": "steps", "sampling_guidance": "guidance", "sampler": "sampler"}
    given = {option: getattr(job, name) for name, option in names.items()}
    if job.components is not None:
        place = Path(job.components).expanduser()
        given["components"] = place.absolute() if place.exists() else job.components
    options = [
        part for name, value in given.items() if value not in (None, "auto") for part in (flag(name), str(value))
    ]
    return ["", f"Try it: {shlex.join(['salun', 'sample', *model, *options, '--prompt', prompt])}"]
