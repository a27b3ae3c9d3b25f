"""The files of an evaluation: `eval.json`, `eval.csv` with a row for each image, `eval.html`, and the images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salun.diffusion.eval_options import EvalOptions, option_name
from salun.diffusion.eval_sets import SetResult, SetSamples, folder_name, sampled_as
from salun.diffusion.evaluate import EvalResult
from salun.diffusion.model.settings import display_name
from salun.diffusion.result import blurred, pair_of
from salun.evaluation.detector import Target
from salun.evaluation.estimate import from_json
from salun.evaluation.further_sets import ANCHOR, CONCEPT, OTHERS
from salun.evaluation.result_names import result_names
from salun.files import check_result_folder, write_bytes
from salun.image_metrics import IMAGE_METRICS
from salun.progress import Event, Progress, Stage, silent
from salun.report import image_grid
from salun.report.metrics import ARROWS, banner, calibration_sections, headline, metric_sections, verdict_lines
from salun.report.page import GLOSSARY, image_sections
from salun.report.render import ImagePair, Report, Section, page

SHOWN = 8  # images of each set on the page
SIDES = ("before", "after")
FILES = ("eval.json", "eval.csv", "eval.html")
IMAGES = "images"
CSV = ("set", "model", "image", "id", "row", "prompt", "seed", "guidance", "width", "height")
UNCALIBRATED = "not calibrated"
RATES = (
    "Images in which the concept is detected, in %. Corrected: relative to the original's images of the concept's own "
    "prompts (100 %) and of other prompts (0 %), and so for the detector's misses and false alarms there; where it "
    "cannot tell the two apart, the rate is unknown. Raw: as it sees them; without an original nothing says what that "
    "is worth."
)


def check_output_folder(folder: Path, options: EvalOptions) -> None:
    """Check that `write_evaluation` can write into a folder, before hours of sampling.

    Raises:
        ConfigError: It cannot.
    """
    check_result_folder(folder, (*FILES, *([f"{IMAGES}/x.png"] if options.keep_images else [])))


def write_evaluation(result: EvalResult, folder: Path, progress: Progress = silent) -> list[Path]:
    """Write all files, those of the same names are replaced; returns their paths. Images are written one by one."""
    data = result.as_json()
    texts = (json.dumps(data, indent=1) + "\n", _csv(result), report(result, data).html)
    for name, text in zip(FILES, texts, strict=True):
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    if result.options.keep_images:
        done, total = 0, sum(len(samples) for _, _, samples in _parts(result))
        for of, side, samples in _parts(result):
            place = folder / IMAGES / folder_name(of.prompts.name)
            for i, image in enumerate(samples.images, 1):
                write_bytes(place / f"{i:05}-{side}.png", image_grid.png_bytes(image))
                progress(Event(Stage.SAVING, done + i, total))
            done += len(samples)
    return [folder / name for name in FILES]


def _parts(result: EvalResult) -> Iterator[tuple[SetResult, str, SetSamples]]:
    """(set, "before" or "after", images) of each set and model."""
    for of in result.sets:
        for side, samples in of.images.items():
            yield of, side, samples


def _csv(result: EvalResult) -> str:
    """A row for each image: what was asked for (`CSV`), what each detector detects, and its score of each label."""
    decisions = _decisions(result)
    columns = [
        (name, attribute, k, f"{name} {attribute}: {label}")
        for name, detector in result.detectors.items()
        for attribute, labels in detector.labels.items()
        for k, label in enumerate(labels)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    detected = (f"{name} detects: {concept}" for name, concept, *_ in decisions)
    writer.writerow([*CSV, *detected, *(column[-1] for column in columns)])
    for each, side, samples in _parts(result):
        seen = {name: sides[side] for name, sides in each.seen.items()}
        hits = [
            seen[of].scores[target.attribute][:, target.label] >= (seen[of].threshold if least is None else least)
            for of, _, target, least in decisions
        ]
        for i, (prompt, row) in enumerate(zip(samples.prompts, each.prompts.rows, strict=True)):
            scores = [seen[of].scores[attribute][i, k] for of, attribute, k, _ in columns]
            known = [f"{score:.6g}" if np.isfinite(score) else "" for score in scores]
            guidance, (height, width) = sampled_as(row, result.plan.sampling)
            drawn = [each.seeds[i], f"{guidance:g}", width, height]
            made = [*drawn, *(int(shown[i]) for shown in hits), *known]
            writer.writerow([each.prompts.name, side, i + 1, row.id, row.row or "", prompt, *made])
    return text.getvalue()


def _decisions(result: EvalResult) -> list[tuple[str, str, Target, float | None]]:
    """(detector, concept, where its scores show it, its calibrated threshold or None) of all that rates are of."""
    calibrated = {
        (name, concept.name): pair.calibration(concept).threshold
        for name, pair in result.pairs.items()
        for concept in pair.concepts
    }
    return [
        (name, subject.name, target, calibrated.get((name, subject.name)))
        for name, detector in result.detectors.items()
        for subject in result.plan.subjects
        if (target := detector.target(subject)) is not None
    ]


def report(result: EvalResult, data: Mapping[str, Any]) -> Report:
    """The page: verdict, images, metrics of each detector, what became of each set, and how to reproduce it."""
    concepts = data["concepts"]
    title = "Did it work? " + ", ".join(f"“{concept['name']}”" for concept in concepts)
    names = [of["name"] for of in data["models"].values() if of is not None]
    subtitle = (
        f"{' against '.join(names)} · {result.options.n} images of each held-out set · seed {result.options.seed}"
    )
    sections = _images(result)
    for name, metrics in result.metrics.items():
        lines = " ".join(verdict_lines(metrics, option_name)) if len(result.metrics) > 1 else ""
        sections.append(Section(f"By the detector {name}" if len(result.metrics) > 1 else "", lines))
        sections += [*metric_sections(concepts, metrics), *calibration_sections(metrics)]
    rows = [("set", "n", "detector", "", *SIDES), *set_rows(data["sets"])]
    sections.append(Section("Sets of prompts", RATES, rows, wrap=True))
    rows = [("set", "metric", *SIDES, "between", "by"), *image_metric_rows(data["sets"])]
    if len(rows) > 1:
        text = "Of all images of a set. Between: of the model's images from the original's."
        sections.append(Section("Metrics of images", text, rows, wrap=True))
    sections += [_files(result), *_inputs(data["inputs"]), GLOSSARY]
    verdict = banner(data, option_name)
    return page(title, subtitle, sections, headline(concepts, data), data["notes"], _reproduction(result), verdict)


def _files(result: EvalResult) -> Section:
    """Links to the files in the folder of the page."""
    links = [
        ("eval.json", "eval.json", "everything on this page and more, as data"),
        ("eval.csv", "eval.csv", "a row for each image, with each detector's decisions and scores"),
    ]
    if result.options.keep_images:
        links.append((f"{IMAGES}/", f"{IMAGES}/", "every image, by set"))
    return Section("Files", links=links)


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The lists of prompts, and by what their content is known."""
    rows = [
        (of["path"], f"revision {of['revision']}" if "revision" in of else f"sha256 {of['sha256']}") for of in inputs
    ]
    return [Section("", "Lists of prompts:", [("file or data set", "content"), *rows], wrap=True)] if rows else []


def _reproduction(result: EvalResult) -> dict[str, Any]:
    """The record as the page shows it: of a path in an option only the last part, but the hashes of both models."""
    record = result.record.as_json()
    given, models = record["options"], ("target", "against", "clip", "components")
    named: dict[str, Any] = {name: display_name(path) for name in models if (path := given[name])}
    named |= {name: result_names(given[name]) for name in ("detector", "metric")}
    named["prompts"] = [display_name(path) for path in given["prompts"]]
    facts = {side: of for side, of in result.compared.facts.items() if of is not None}
    parts = {"weights": "weights", "parts": "other parts"}
    hashes = {f"{what} of the {side}": of[part] for side, of in facts.items() for part, what in parts.items()}
    return {**record, "options": given | named, "facts": record["facts"] | hashes}


def set_rows(sets: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(set, n, detector, what, before, after) of every rate, and the drift of images that must stay."""
    rows: list[tuple[str, ...]] = []
    for name, of in sets.items():
        for detector, rates in of["detected"].items():
            for what, rate in rates.items():
                rows += [(name, str(of["n"]), detector, *cells) for cells in _rate_cells(what, rate)]
        if of["image_drift"] is not None:
            rows.append((name, str(of["n"]), "", "drift of images", "", from_json(of["image_drift"]).text("", 3)))
    return rows


def _rate_cells(what: str, rate: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) of a rate: corrected and raw, raw alone without a calibration, or why it is unknown."""
    if rate["reason"] is not None:
        return [(what, "unknown", rate["reason"])]

    def cells(sides: Mapping[str, Any]) -> tuple[str, str]:
        before, after = (from_json(sides[side]).text() if side in sides else "" for side in SIDES)
        return before, after

    if not rate["calibrated"]:
        return [(f"{what} (raw, {UNCALIBRATED})", *cells(rate))]
    return [(f"{what} (corrected)", *cells(rate["corrected"])), (f"{what} (raw)", *cells(rate))]


def image_metric_rows(sets: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(set, metric, before, after, between, by what) of every metric of images; why, where a value is unknown."""
    rows = []
    for name, of in sets.items():
        for metric, values in of["image_metrics"].items():
            key, _, against = metric.partition(":")
            entry = IMAGE_METRICS[key]
            cells = {
                side: from_json(value["value"]).text("", entry.digits)
                if value["value"] is not None
                else value["reason"]
                for side, value in values.items()
            }
            first = next(iter(values.values()))
            by = " ".join(filter(None, (first["implementation"], first["weights"])))
            title = f"{entry.title} {ARROWS[entry.better]}" + (f" (from {against})" if against else "")
            rows.append((name, title, *(cells.get(side, "") for side in (*SIDES, "between")), by))
    return rows


def _images(result: EvalResult) -> list[Section]:
    """The first images of each set: of the concepts, of others, and then of further sets."""
    blurs = blurred(result.plan)
    blurred_parts = {CONCEPT: blurs, OTHERS: [False]}
    pairs = {of.prompts.name: _shown(of, blurred_parts.get(of.prompts.name, [any(blurs)])) for of in result.sets}
    sections = image_sections(pairs.pop(CONCEPT), pairs.pop(OTHERS), any(blurs))
    return sections + [Section("", f"{name}:", pairs=of) for name, of in pairs.items() if name != ANCHOR]


def _shown(of: SetResult, blurs: Sequence[bool]) -> list[ImagePair]:
    """The first images of each equal part of a set. blurs: of each part, whether it is blurred."""
    images, each = {side: samples.images for side, samples in of.images.items()}, len(of.prompts.rows) // len(blurs)
    return [
        pair_of(of.prompts.rows[row].text, {side: listed[row] for side, listed in images.items()}, blur)
        for i, blur in enumerate(blurs)
        for row in range(i * each, i * each + min(SHOWN, each))
    ]
