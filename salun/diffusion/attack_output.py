"""The files of an attack: `attack.json`, `attack.html`, and `adversarial.safetensors` to replay on other models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun.diffusion.attack import AttackReport
from salun.diffusion.attacks.adversarial import write_adversarial
from salun.diffusion.data.latents import decode_images
from salun.diffusion.model.settings import display_name
from salun.diffusion.result import blurred, pair_of
from salun.errors import fill
from salun.files import check_result_folder, write_bytes
from salun.report.attacks import attack_banner, attack_sections
from salun.report.metrics import calibration_sections
from salun.report.page import GLOSSARY
from salun.report.render import Banner, ImagePair, Report, Section, page

SHOWN = 8  # images of each attack on the page
FILES = ("attack.json", "attack.html", "adversarial.safetensors")


def check_attack_folder(folder: Path) -> None:
    """Check that `write_attack` can write into a folder, before hours of work. Raises ConfigError if it cannot."""
    check_result_folder(folder, FILES)


def write_attack(report: AttackReport, folder: Path) -> list[Path]:
    """Write all files, those of the same names are replaced; returns their paths."""
    data = report.as_json()
    made = [
        (f"{each.chosen.text} {each.concept}", each.result.prompts)
        for each in report.attacked
        if each.side == "erased" and each.result is not None and each.result.prompts is not None
    ]
    texts = (json.dumps(data, indent=1) + "\n", attack_page(report, data).html)
    for name, text in zip(FILES, texts, strict=False):
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    if not made:
        return [folder / name for name in FILES[:2]]
    write_adversarial(folder / FILES[2], made)
    return [folder / name for name in FILES]


def attack_page(report: AttackReport, data: Mapping[str, Any]) -> Report:
    """The page: what came of it, the table, images of each attack, and how to reproduce it."""
    names = ", ".join(f"“{concept['name']}”" for concept in data["concepts"])
    models = " against ".join(of["name"] for of in data["models"].values() if of is not None)
    subtitle = f"{models} · {report.options.n} prompts of each concept · seed {report.options.seed}"
    sections = [*attack_sections(data), *_images(report), *calibration_sections(report.metrics), _files(data), GLOSSARY]
    banner = attack_banner(data)
    spelled = Banner(banner.outcome, fill(banner.text, str), fill(banner.next, str))
    record = report.record.as_json()
    paths = {name: display_name(path) for name in ("target", "against") if (path := record["options"][name])}
    run = {**record, "options": record["options"] | paths}
    return page(f"Does it come back? {names}", subtitle, sections, notes=data["notes"], run=run, banner=spelled)


def _files(data: Mapping[str, Any]) -> Section:
    links = [("attack.json", "attack.json", "everything on this page, as data")]
    how = "prompts and embeddings that attacks made, for other models: --attack prompts:adversarial.safetensors"
    links.append(("adversarial.safetensors", "adversarial.safetensors", how))
    return Section("Files", links=links)


def _images(report: AttackReport) -> list[Section]:
    """The original's images, and below them those of each attack on the same prompts."""
    sections, blurs = [], dict(zip((c.name for c in report.plan.concepts), blurred(report.plan), strict=True))
    original = report.compared.original
    assert original is not None
    for each in report.attacked:
        if each.side != "erased" or each.result is None:
            continue
        order = sorted(range(len(each.result.shown)), key=lambda i: not each.result.shown[i])[:SHOWN]  # type: ignore[union-attr]
        images = decode_images(original, each.result.latents[order])
        texts = _texts(report, each.concept, each.result.prompts.texts if each.result.prompts else (), order)
        pairs: Sequence[ImagePair] = [
            pair_of(text, {"succeeds" if each.result.shown[i] else "fails": image}, blurs[each.concept])
            for text, image, i in zip(texts, images, order, strict=True)
        ]
        sections.append(Section("", f"{each.chosen.title}, “{each.concept}”, successes first:", pairs=pairs))
    if sections:
        sections[0] = Section("Images", sections[0].text, pairs=sections[0].pairs)
    return sections


def _texts(report: AttackReport, concept: str, made: Sequence[str], order: Sequence[int]) -> list[str]:
    """The prompt of each image: what the attack made, else the plain one."""
    number = [each.name for each in report.plan.concepts].index(concept)
    plain = [prompt.text for prompt in report.prompts.forget[report.prompts.rows_of(number)]]
    texts = made or plain
    return [texts[i] if i < len(texts) else "" for i in order]
