"""The files of an evaluation: `eval.json`, `eval.csv` with a row for each image, `eval.html`, and the images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salun.diffusion.evaluate import EvalResult
from salun.diffusion.model.settings import display_name
from salun.diffusion.result import blurred, image_pairs, pair_of
from salun.evaluation.detector import Detection, Samples
from salun.evaluation.estimate import from_json
from salun.files import write_bytes
from salun.report import image_grid
from salun.report.metrics import banner, calibration_sections, headline, metric_sections, verdict_lines
from salun.report.page import image_sections
from salun.report.render import Report, Section, page

SHOWN = 8  # images of each set on the page
FILES = ("eval.json", "eval.csv", "eval.html")

Part = tuple[str, str, Samples, Sequence[int], Mapping[str, Detection]]
"""(set, "before" or "after", its samples, their seeds, what each detector sees)."""


def write_evaluation(result: EvalResult, folder: Path) -> list[Path]:
    """Write all files, those of the same names are replaced; returns their paths."""
    data = result.as_json()
    texts = (json.dumps(data, indent=1) + "\n", _csv(result), report(result, data).html)
    for name, text in zip(FILES, texts, strict=True):
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    if result.options.keep_images:
        for name, side, samples, _, _ in _parts(result):
            safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
            for i, image in enumerate(samples.images):
                write_bytes(folder / "images" / safe / f"{i + 1:05}-{side}.png", image_grid.png_bytes(image))
    return [folder / name for name in FILES]


def _parts(result: EvalResult) -> Iterator[Part]:
    prompts, before, after = result.prompts, result.before, result.after
    for side, of in (("before", before), ("after", after)):
        seen = {name: getattr(pair, side) for name, pair in result.pairs.items()}
        yield "concept", side, of.forget, prompts.forget_seeds, {name: each.forget for name, each in seen.items()}
        yield "other prompts", side, of.retain, prompts.retain_seeds, {n: each.retain for n, each in seen.items()}
        if of.anchor is not None:
            yield "anchor", side, of.anchor, prompts.anchors[1], {n: each.anchor for n, each in seen.items()}
    for each in result.sets:
        seeds = [row.seed if row.seed is not None else -1 for row in each.prompts.rows]
        for i, (side, samples) in enumerate((("before", each.before), ("after", each.after))):
            yield each.prompts.name, side, samples, seeds, {name: pair[i] for name, pair in each.seen.items()}


def _csv(result: EvalResult) -> str:
    """A row for each image: set, model, number, prompt, seed, and each detector's score of each of its labels."""
    columns = [
        (name, attribute, k, f"{name} {attribute}: {label}")
        for name, detector in result.detectors.items()
        for attribute, labels in detector.labels.items()
        for k, label in enumerate(labels)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "model", "image", "prompt", "seed", *(column[-1] for column in columns)])
    for name, side, samples, seeds, seen in _parts(result):
        for i in range(len(samples)):
            scores = [seen[of].scores[attribute][i, k] for of, attribute, k, _ in columns]
            known = [f"{score:.6g}" if np.isfinite(score) else "" for score in scores]
            seed = seeds[i] if seeds[i] >= 0 else ""
            writer.writerow([name, side, i + 1, samples.prompts[i], seed, *known])
    return text.getvalue()


def report(result: EvalResult, data: Mapping[str, Any]) -> Report:
    """The page: verdict, images, metrics of each detector, and what became of each set."""
    concepts = data["concepts"]
    compared = result.compared
    title = "Is it forgotten? " + ", ".join(f"“{concept['name']}”" for concept in concepts)
    names = [display_name(model.name) for model in dict.fromkeys((compared.erased, compared.original))]
    subtitle = f"{' against '.join(names)} · {result.options.n} images of each set · seed {result.options.seed}"
    sections = _images(result)
    for name, metrics in result.metrics.items():
        lines = " ".join(verdict_lines(metrics)) if len(result.metrics) > 1 else ""
        sections.append(Section(f"By the detector {name}" if len(result.metrics) > 1 else "", lines))
        sections += [*metric_sections(concepts, metrics), *calibration_sections(metrics)]
    if result.sets:
        rows = [("set", "n", "detector", "", "before", "after"), *set_rows(data["sets"])]
        sections.append(Section("Sets of prompts", "Images in which the concept is detected, in %:", rows, wrap=True))
    return page(title, subtitle, sections, headline(concepts, data), data["notes"], banner=banner(data))


def set_rows(sets: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(set, n, detector, what, before, after) of every rate, and the drift of images that must stay."""
    rows = []
    for name, of in sets.items():
        for detector, rates in of["detected"].items():
            for what, sides in rates.items():
                values = [from_json(sides[side]).text() for side in ("before", "after")]
                rows.append((name, str(of["n"]), detector, what, *values))
        if of["preserve"] and of["image_drift"] is not None:
            rows.append((name, str(of["n"]), "", "drift of images", "", from_json(of["image_drift"]).text("", 3)))
    return rows


def _images(result: EvalResult) -> list[Section]:
    blur = any(blurred(result.plan))
    shown = image_pairs(result.plan, result.prompts, result.before, result.after)
    sections = image_sections(*shown, blur)
    for each in result.sets:
        count = min(SHOWN, len(each.prompts.rows))
        of_set = [pair_of(each.before, each.after, row, blur) for row in range(count)]
        sections.append(Section("", f"{each.prompts.name}:", pairs=of_set))
    return sections
