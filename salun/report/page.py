"""The page about an erasure, and the page about a mask or delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salun.report import charts
from salun.report.density import per_block
from salun.report.metrics import headline, metric_sections
from salun.report.render import Report, Section, loss_series, page, size

LOSSES = {
    "forget": "MSE to the anchor's prediction",
    "retain": "MSE to the original model's prediction",
}


def run_page(
    run: Mapping[str, Any],
    forget_image: bytes | None,
    retain_image: bytes | None,
    layers: Mapping[str, tuple[int, int]],
    blurred: bool = False,
) -> Report:
    """The page of an erasure.

    Args:
        run: As in `run.json`.
        forget_image, retain_image: Images before and after, PNG.
        layers: Parameter → (selected, total) of the mask.
        blurred: Whether forget images are blurred.
    """
    concepts, metrics = run["concepts"], run["metrics"]
    names = ", ".join(f"“{concept['name']}”" for concept in concepts)
    seconds = sum(run["timings"].values())
    subtitle = (
        f"{run['options']['model']} · seed {run['seed']} · {run['options']['steps']} steps · "
        f"{seconds:.0f} s on {run['device']}"
    )
    sections = [
        *_images(forget_image, retain_image, blurred),
        *metric_sections(concepts, metrics),
        _changes(run, layers),
        _training(run),
        _files(run),
    ]
    return page(f"Forgetting {names}", subtitle, sections, headline(concepts, metrics), _notes(run), run)


def _notes(run: Mapping[str, Any]) -> list[str]:
    mask, rounding = run["mask"], run["rounding"] or {}
    notes = [rounding["warning"]] if rounding.get("warning") else []
    notes += [*run["notes"], *mask["warnings"]]
    if mask["mode"] in ("shuffled", "random", "full"):
        notes.append(
            f"This run used the control mask “{mask['mode']}” instead of a saliency mask. It is for comparison; do not "
            "publish its result as an erasure."
        )
    return notes


def _images(forget: bytes | None, retain: bytes | None, blurred: bool) -> list[Section]:
    if forget is None or retain is None:
        return [Section("Before and after", "No images were made in this run (eval_images: 0).")]
    footer = (
        "Blurred, because a concept is marked as sensitive. To see the images, set show_sensitive, or sample the model."
    )
    text = "Prompts of the concept, with the same seeds before and after:"
    return [
        Section(
            "Before and after",
            text,
            images={"forget images before and after": forget},
            footer=footer if blurred else "",
        ),
        Section("", "Other prompts:", images={"retain images before and after": retain}),
    ]


def _changes(run: Mapping[str, Any], layers: Mapping[str, tuple[int, int]]) -> Section:
    mask, rounding = run["mask"], run["rounding"]
    text = f"{mask['selected']:,} of {mask['total']:,} weights ({mask['selected'] / mask['total']:.1%}) were trained"
    if mask["mode"] == "saliency":
        text += ": those that the concept depends on most"
    text += ". Every other weight is bit-exactly unchanged."
    if rounding:
        text += (
            f" Training changed {rounding['changed']:,} weights; the changes of {rounding['lost_to_rounding']:,} were "
            "lost to rounding in the file's dtype."
        )
    return Section("What was changed", f"{text} By block:", charts=[charts.bars(per_block(layers))])


def _training(run: Mapping[str, Any]) -> Section:
    series = loss_series(run["losses"])
    known = [f"{name}: {LOSSES[name]}." for name in series if name in LOSSES]
    text = " ".join(["Losses by step (faint) and their running mean.", *known])
    return Section("Training", text, charts=[charts.curves(series, "step", "loss", log=True)])


def _files(run: Mapping[str, Any]) -> Section:
    files = [(f"original {entry['kind']}", entry) for entry in run["inputs"]]
    files += [(entry["kind"], entry) for entry in run["outputs"]]
    rows = [("kind", "file", "size", "sha256")]
    rows += [(kind, entry["path"], size(entry["bytes"]), f"{entry['sha256'][:16]}…") for kind, entry in files]
    footer = (
        "Anyone with the delta can undo the erasure: publish the model without it where the concept must not return."
    )
    return Section("Files", rows=rows, footer=footer, wrap=True)


def layers_page(
    title: str,
    facts: Mapping[str, Any],
    blocks: Mapping[str, Mapping[str, Sequence[int]]],
    layers: Mapping[str, Sequence[int]],
) -> Report:
    """A page on a mask, delta or pair of masks.

    Args:
        blocks: Title of a chart → block → (selected, total).
        layers: Parameter → (selected, total).
    """
    rows = [("", ""), *((str(key), str(value)) for key, value in facts.items())]
    sections = [Section("", rows=rows, wrap=True)]
    sections += [Section(name, charts=[charts.bars(of)]) for name, of in blocks.items()]
    if layers:
        sections.append(Section("", charts=[charts.bars(layers)], folded="Every layer"))
    return page(title, "", sections)
