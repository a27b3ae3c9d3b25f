"""The page about an erasure, and the page about a mask or delta."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from salun.report import charts
from salun.report.density import per_block
from salun.report.metrics import banner, calibration_sections, headline, metric_sections
from salun.report.render import ImagePair, Report, Section, loss_series, page, size

USAGE = {  # kind of an output → how to use it
    "checkpoint": "a complete checkpoint. Copy it to models/checkpoints of ComfyUI or models/Stable-diffusion of a "
    "WebUI, and choose it like any other.",
    "folder": "a diffusers folder: DiffusionPipeline.from_pretrained.",
    "delta": "the sparse difference, which can be applied at any strength and undone: salun delta apply and "
    "undo, the ComfyUI node SalUn Load Delta, or “Erased delta” in a WebUI. Whoever has it can undo the erasure.",
    "lora": "a low-rank approximation for any LoRA loader, at strength 1.",
    "diff": "the full difference for any LoRA loader, at strength 1.",
    "mask": "the trained weights: salun inspect, or --mask of another run.",
}
SELECTED = {  # mode of a mask → what the selected weights have in common
    "saliency": "the concept depends on most",
    "saliency-ratio": "the concept depends on most, compared with what else the model shows",
    "saliency-by-layer": "the concept depends on most, as large a fraction in each layer's tensors",
}
LOSSES = {
    "forget": "MSE to the anchor's prediction",
    "retain": "MSE to the original model's prediction",
}


def run_page(
    run: Mapping[str, Any],
    forget: Sequence[ImagePair],
    retain: Sequence[ImagePair],
    layers: Mapping[str, tuple[int, int]],
    blurred: bool = False,
    inside: Collection[str] = (),
) -> Report:
    """The page of an erasure.

    Args:
        run: As in `run.json`.
        forget, retain: Images before and after.
        layers: Parameter → (selected, total) of the mask.
        blurred: Whether forget images are blurred.
        inside: Paths of outputs that lie in the page's folder.
    """
    concepts, metrics = run["concepts"], run["metrics"]
    names = ", ".join(f"“{concept['name']}”" for concept in concepts)
    seconds = sum(run["timings"].values())
    steps = f"{len(run['losses'])} steps · " if run["losses"] else ""
    subtitle = f"{run['options']['model']} · seed {run['seed']} · {steps}{seconds:.0f} s on {run['device']}"
    sections = [
        *image_sections(forget, retain, blurred),
        *metric_sections(concepts, metrics),
        *calibration_sections(metrics),
        _usage(run, inside),
        _changes(run, layers),
        _training(run),
        *_towards(run),
        _files(run),
        GLOSSARY,
    ]
    lines = headline(concepts, metrics)
    return page(f"Forgetting {names}", subtitle, sections, lines, _notes(run), run, banner(metrics))


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


def image_sections(forget: Sequence[ImagePair], retain: Sequence[ImagePair], blurred: bool) -> list[Section]:
    """The images before and after, of prompts of the concept and of others."""
    if not forget and not retain:
        return [Section("Before and after", "No images were made in this run (eval_images: 0).")]
    footer = (
        "Blurred, because a concept is marked as sensitive. To see the images, set show_sensitive, or sample the model."
    )
    text = "Prompts of the concept that were not used in training, with the same seed before and after:"
    return [
        Section("Before and after", text, pairs=forget, footer=footer if blurred else ""),
        Section("", "Other prompts, which should stay as they are:", pairs=retain),
    ]


def _usage(run: Mapping[str, Any], inside: Collection[str]) -> Section:
    """How to use each output, with a link where it is in its folder."""
    links, folders = [], set()
    for entry in run["outputs"]:
        path, how = str(entry["path"]), USAGE.get(entry["kind"])
        if entry["kind"] == "folder":
            path = path.split("/")[0] + "/"
        if how is None or path in folders:
            continue
        folders.add(path)
        within = entry["path"] in inside
        links.append((path if within else "", path, how))
    if not links:
        return Section("How to use the result", "This run wrote no files: `Run.save` writes them.")
    return Section("How to use the result", links=links)


def _changes(run: Mapping[str, Any], layers: Mapping[str, tuple[int, int]]) -> Section:
    mask, rounding = run["mask"], run["rounding"]
    text = f"{mask['selected']:,} of {mask['total']:,} weights ({mask['selected'] / mask['total']:.1%}) were trained"
    if mask["mode"] in SELECTED:
        text += f": those that {SELECTED[mask['mode']]}"
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


def _towards(run: Mapping[str, Any]) -> list[Section]:
    """The probes of a training towards a goal; none for a fixed number of steps."""
    until = run.get("until")
    if until is None:
        return []
    kept, step = until["strength"], until.get("step", until["steps"])
    decided = [p for p in until["probes"] if p.get("decides", True)]
    looks = [p for p in until["probes"] if (p["step"], p["strength"]) == (step, kept)]
    chosen = looks[-1] if looks else None  # what was found of the weights that are kept
    attacked = any(p.get("asr") is not None for p in until["probes"])
    heads = ("step", "strength", "UA", "anchor", "confidence", "images", "drift of others", "RA drop")
    rows = [(*heads, *["ASR"] * attacked, "")]
    rows += [(*_probe(p, attacked), "kept" if p is chosen else "") for p in until["probes"]]
    curves = [_series(decided, chosen, kept, keys) for keys in (("ua", "anchor", "asr"), ("drift", "ra_drop"))]
    came = "reached" if until["reached"] else "not reached"
    earlier = f", of which those after step {step} are kept" if step < until["steps"] else ""
    guided, retained = until["target_guidance"], until.get("retain_factor", 1)
    rose = [f"η of the target rose by {guided:g}"] if guided else []
    rose += [f"the retain loss's weight rose {retained:g} times"] if retained != 1 else []
    text = (
        f"The goal {until['goal']} was {came} after {until['steps']} of at most {until['budget']} steps{earlier}, at a "
        f"learning rate of {until['lr'] * until['lr_factor']:.2g}{''.join(f', {each}' for each in rose)}. "
        f"{100 * until['strength']:.0f} % of the change are kept. {_failures(until)}"
        "Probes are of held-out prompts. UA: images without the concept. Anchor: images that show it in its place. "
        "Confidence: the probability that both are what the goal wants. Drift: how far images of other prompts moved "
        "at equal seeds; 1 is as far as unrelated images. RA drop: how many fewer of them are as prompted."
    )
    text += " Of several concepts, UA is that of the least erased; in parentheses, each." if _several(until) else ""
    text += " ASR: images with adversarial embeddings that show the concept." if attacked else ""
    shown = [charts.curves(series, "step", "fraction") for series in curves if series]
    return [Section("On the way to the goal", text, rows, shown)]


def _failures(until: Mapping[str, Any]) -> str:
    """What is to be said of steps whose loss or gradient was not finite."""
    steps = until.get("failed_steps", [])
    if not steps:
        return ""
    ended = f", until step {steps[-1]} ended it" if steps[-1] == until["steps"] else ""
    return (
        f"A loss or gradient was not finite at step {', '.join(map(str, steps))}: training began again from the "
        f"original weights{ended}. "
    )


def _several(until: Mapping[str, Any]) -> bool:
    return any(len(p.get("concepts", [])) > 1 for p in until["probes"])


def _probe(p: Mapping[str, Any], attacked: bool) -> tuple[str, ...]:
    """The cells of a probe. attacked: whether one is for attacks."""

    def percent(value: Any) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    each = p.get("concepts", [])
    of_each = f" ({', '.join(f'{100 * value:.1f}' for value in each)})" if len(each) > 1 else ""
    drift = "" if p["drift"] is None else f"{p['drift']:.4f}"
    cells = [f"{p['step']}", f"{p['strength']:g}", percent(p["ua"]) + of_each, percent(p.get("anchor"))]
    cells += [f"{p['confidence']:.2f}", f"{p['n']:.0f}", drift, percent(p.get("ra_drop"))]
    return (*cells, *[percent(p.get("asr"))] * attacked)


def _series(
    decided: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, kept: float, keys: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Curves of probes by step, and the point of the weights that are kept."""
    names = {"ua": "UA", "anchor": "anchor", "drift": "drift", "ra_drop": "RA drop", "asr": "ASR"}
    series = {
        names[key]: [(float(p["step"]), float(p[key])) for p in decided if p.get(key) is not None] for key in keys
    }
    if chosen is not None and chosen.get(keys[0]) is not None:
        series[f"kept, {100 * kept:.0f} %"] = [(float(chosen["step"]), float(chosen[keys[0]]))]
    return {name: points for name, points in series.items() if points}


def _files(run: Mapping[str, Any]) -> Section:
    files = [(f"original {entry['kind']}", entry) for entry in run["inputs"]]
    files += [(entry["kind"], entry) for entry in run["outputs"]]
    rows = [("kind", "file", "size", "sha256")]
    rows += [(kind, entry["path"], size(entry["bytes"]), f"{entry['sha256'][:16]}…") for kind, entry in files]
    footer = (
        "Anyone with the delta can undo the erasure: publish the model without it where the concept must not return."
    )
    return Section("Files", rows=rows, footer=footer, wrap=True)


GLOSSARY = Section(
    "",
    rows=(
        ("term", "meaning"),
        ("concept, anchor", "what is erased, and what the model shows in its place"),
        ("UA (unlearning accuracy)", "images of the concept's prompts that do not show it"),
        ("RA (retain accuracy)", "images of other prompts that show what was prompted"),
        (
            "detector, calibration",
            "decides whether an image shows the concept; how it does on the original's images",
        ),
        ("95 % interval, n", "where the true value probably lies, given n images"),
        ("AUC", "how well a detector's scores separate two kinds of images: 100 % is perfect, 50 % is chance"),
        ("drift", "how far images or predictions moved at the same prompt and seed"),
        ("diversity", "how much images of other prompts differ from each other, relative to the original's"),
        ("saliency, mask, density", "how much a weight matters for the concept; the weights trained; their fraction"),
        ("delta, strength", "the difference to the original model, and how much of it is applied"),
    ),
    folded="Terms",
    wrap=True,
)


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
