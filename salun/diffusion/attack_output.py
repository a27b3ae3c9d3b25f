"""The files of an attack: `attack.json`, `attack.html`, and `adversarial.safetensors` to replay on other models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from salun.diffusion.attack import SIDES, AttackReport
from salun.diffusion.attacks.adversarial import LONGEST_NAME, read_adversarial, write_adversarial
from salun.diffusion.attacks.task import AdversarialPrompts, AttackResult
from salun.diffusion.data.latents import decode_images
from salun.diffusion.model.settings import display_name
from salun.diffusion.result import blurred, pair_of
from salun.errors import ConfigError, SalunError, fill
from salun.files import check_result_folder, write_bytes
from salun.report.attacks import attack_banner, attack_sections
from salun.report.image_grid import sheet
from salun.report.metrics import calibration_sections
from salun.report.page import GLOSSARY
from salun.report.render import Banner, ImagePair, Report, Section, page, with_chapter
from salun.untrusted import read_json, read_text

SHOWN = 8  # images of each attack on the page
REPORT, LONGEST = "report.html", 500_000_000  # of a run, which is given a chapter; bytes of it at most
TERMS = ("n", "seed", "concepts", "models", "sampling", "plain")  # on which results of two calls must agree
FILES = ("attack.json", "attack.html", "adversarial.safetensors")


def check_attack_folder(folder: Path) -> None:
    """Check that `write_attack` can write into a folder, before hours of work. Raises ConfigError if it cannot."""
    check_result_folder(folder, FILES)


def write_attack(report: AttackReport, folder: Path) -> list[Path]:
    """Write all files, those of the same names are replaced; returns their paths.

    Results in the folder of other attacks on the same model are kept, without their images. The report of a run in the
    same folder gets the attacks as a chapter, in place of earlier ones.
    """
    data = report.as_json()
    earlier = earlier_attacks(folder / FILES[0], data)
    made = _earlier_prompts(folder / FILES[2], earlier) + [
        (f"{each.chosen.text} {each.concept}", each.result.prompts)
        for each in report.attacked
        if each.side == "erased" and each.result is not None and each.result.prompts is not None
    ]
    data["attacks"] = [*earlier, *data["attacks"]]
    images = _images(report)
    texts = (json.dumps(data, indent=1) + "\n", attack_page(report, data, images, bool(made)).html)
    for name, text in zip(FILES, texts, strict=False):
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    written = list(FILES if made else FILES[:2])
    if made:
        write_adversarial(folder / FILES[2], made)
    if _add_chapter(folder / REPORT, _chapter(data, images)):
        written.append(REPORT)
    return [folder / name for name in written]


def earlier_attacks(path: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results of an earlier call that are on the same terms as those of this one, of attacks that it does not name.

    Args:
        path: An `attack.json`, which is untrusted input; it may be missing, and what cannot be shown is not taken.
        data: As in `attack.json`, of this call.
    """
    named = {each["attack"] for each in data["attacks"]}
    try:
        stored = read_json(path)
        if any(stored[key] != data[key] for key in TERMS) or any(
            stored["options"][key] != data["options"][key] for key in ("detector", "dtype")
        ):
            return []
        return [each for each in stored["attacks"] if _can_be_shown(each, data) and each["attack"] not in named]
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _can_be_shown(each: Any, data: Mapping[str, Any]) -> bool:
    """Whether an entry of an untrusted `attack.json` is one."""
    alone = {**data, "attacks": [each]}
    try:
        attack_sections(alone)
        attack_banner(alone)
        return each["concept"] in data["plain"] and each["side"] in SIDES
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _earlier_prompts(path: Path, earlier: Sequence[Mapping[str, Any]]) -> list[tuple[str, AdversarialPrompts]]:
    """The prompts that go with results of an earlier call; none where the file cannot be read."""
    names = {f"{each['attack']} {each['concept']}"[:LONGEST_NAME] for each in earlier}
    try:
        return [entry for entry in read_adversarial(path) if entry[0] in names]
    except SalunError:
        return []


def _add_chapter(path: Path, chapter: Sequence[Section]) -> bool:
    """Put a chapter into a run's report; whether there is one that can be read and has a place for it."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        changed = with_chapter(read_text(path, LONGEST), chapter)
    except (OSError, ValueError):
        return False
    if changed is not None:
        changed.save(path)
    return changed is not None


def _chapter(data: Mapping[str, Any], images: Sequence[Section]) -> list[Section]:
    """Of a run's report: what came of the attacks, the table and images."""
    banner, table = attack_banner(data), attack_sections(data)[0]
    first = Section(
        "Does it come back?",
        f"{banner.outcome}. {fill(banner.text, str)} {fill(banner.next, str)}",
        table.rows,
        footer=table.text,
        wrap=True,
    )
    more = Section("", links=[(FILES[1], FILES[1], "curves, sources, and how to reproduce it")])
    return [first, *(replace(section, title="") for section in images), more]


def attack_page(report: AttackReport, data: Mapping[str, Any], images: Sequence[Section], replayed: bool) -> Report:
    """The page: what came of it, the table, images of each attack, and how to reproduce it.

    Args:
        replayed: Whether a file of prompts is written with it.
    """
    names = ", ".join(f"“{concept['name']}”" for concept in data["concepts"])
    models = " against ".join(of["name"] for of in data["models"].values() if of is not None)
    subtitle = f"{models} · {report.options.n} prompts of each concept · seed {report.options.seed}"
    sections = [*attack_sections(data), *images, *calibration_sections(report.metrics), _files(replayed), GLOSSARY]
    banner = attack_banner(data)
    spelled = Banner(banner.outcome, fill(banner.text, str), fill(banner.next, str))
    record = report.record.as_json()
    paths = {name: display_name(path) for name in ("target", "against") if (path := record["options"][name])}
    run = {**record, "options": record["options"] | paths}
    return page(f"Does it come back? {names}", subtitle, sections, notes=data["notes"], run=run, banner=spelled)


def attack_grid(report: AttackReport, columns: int = SHOWN) -> np.ndarray:
    """A row for each attack on the erased model, images that show the concept first, uint8 (H, W, 3)."""
    blurs = dict(zip((c.name for c in report.plan.concepts), blurred(report.plan), strict=True))
    original, rows, captions, hidden = report.compared.original, [], [], []
    assert original is not None
    for each in report.attacked:
        if each.side == "erased" and each.result is not None:
            order = _successes_first(each.result)[:columns]
            images = decode_images(original, each.result.latents[order])
            missing = [(0, columns - len(images)), *[(0, 0)] * 3]
            rows.append(np.pad(images, missing, constant_values=255))
            hidden.append(blurs[each.concept])
            captions.append(f"{each.chosen.title}: {100 * each.result.shown.mean():.0f} % “{each.concept}”")
    if not rows:
        why = next((each.error for each in report.attacked if each.error), "")
        raise ConfigError(f"could not be made: {why}", option="attack")
    return sheet(np.concatenate(rows), columns, captions, hidden)


def _files(replayed: bool) -> Section:
    links = [(FILES[0], FILES[0], "everything on this page, as data")]
    if replayed:
        how = "prompts and embeddings that attacks made, for other models: --attack prompts:adversarial.safetensors"
        links.append((FILES[2], FILES[2], how))
    return Section("Files", links=links)


def _successes_first(result: AttackResult) -> list[int]:
    """The numbers of its prompts, those whose image shows the concept first."""
    return sorted(range(len(result.shown)), key=lambda i: not result.shown[i])


def _images(report: AttackReport) -> list[Section]:
    """The original's images, and below them those of each attack on the same prompts."""
    sections, blurs = [], dict(zip((c.name for c in report.plan.concepts), blurred(report.plan), strict=True))
    original = report.compared.original
    assert original is not None
    for each in report.attacked:
        if each.side != "erased" or each.result is None:
            continue
        order = _successes_first(each.result)[:SHOWN]
        images = decode_images(original, each.result.latents[order])
        texts = _texts(report, each.concept, each.result, order)
        pairs: Sequence[ImagePair] = [
            pair_of(text, {"succeeds" if each.result.shown[i] else "fails": image}, blurs[each.concept])
            for text, image, i in zip(texts, images, order, strict=True)
        ]
        sections.append(Section("", f"{each.chosen.title}, “{each.concept}”, successes first:", pairs=pairs))
    if sections:
        sections[0] = Section("Images", sections[0].text, pairs=sections[0].pairs)
    return sections


def _texts(report: AttackReport, concept: str, result: AttackResult, order: Sequence[int]) -> list[str]:
    """The prompt of each image: what the attack made or says, else the plain one."""
    number = [each.name for each in report.plan.concepts].index(concept)
    plain = [prompt.text for prompt in report.prompts.forget[report.prompts.rows_of(number)]]
    texts = result.texts or (result.prompts.texts if result.prompts is not None else ()) or plain
    return [texts[i] if i < len(texts) else "" for i in order]
