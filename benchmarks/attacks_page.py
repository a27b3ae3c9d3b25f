"""The page of `benchmarks/attacks.py`: tables and the paragraph before them, from stored results."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from salun.diffusion.attack_options import attack_of
from salun.report.attacks import WORKS, is_weak

LEARNED = 64  # the original's images of the concept that attacks learn from
TRAINED, UNRELATED = "relearn", "relearn+data=unrelated"
INVERSIONS = ("inversion", "inversion+steps=400+start=anchor")
ITSELF = "merge"  # of the original with itself, which is the original: the plain rate
ORDINARY, HARDENED = ("SalUn", "UCE"), "SalUn, hardened"
Rows = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""Concept → method → what each seed gave, as in a stored file."""
Controls = Mapping[str, Sequence[Mapping[str, Any]]]
"""Concept → attack → what it did to the original, of each seed."""

HEAD = """Written by `benchmarks/attacks.py` on the bundled model `shapes`, on a CPU: each method erases each concept
with its preset anchor (SalUn and ESD with 120 steps, the hardened SalUn towards its goal), and each attack of the small
budget is made on the result ({n} prompts of each concept, seeds {seeds}). Attacks learn from {learned} of the
original's images of the concept, relearning from 16 of them. Numbers are percentages of prompts of which an image shows
the concept after the attack (ASR), means over the seeds; of relearning, at the look at which most do. UA and “anchor”
are those of the erasure without an attack, on {images} images of the concept's prompts, RA is on {images} of other
prompts; RA drop in percentage points. Original: the same attack on the model before the erasure; one that succeeds
there in less than {works:.0f} %, and less often than the plain prompts, is weak, and says little (merged with itself
the original is as it was: that row is the rate of its plain prompts).
"""
OUTDATED = """**Not on equal terms yet:** these runs were made when attacks trained in batches of the erasure's size:
`inversion` and `relearn` took 4 samples a step in the ESD column, and 16 in the others. They have the original model's
16 now, and the column is to be measured anew."""
ANCHORED = """Two attacks have changed since, towards their authors' code: Ring-A-Bell adds the concept vector to the
concept's prompt, not to the anchor's, and the prompt search steps with Adam, not AdamW, and prompts with the likeliest
tokens, not with drawn ones."""
CAVEAT = """
An image that no attack touched can show the concept by a false alarm of the detector, and an attack with several tries
has several chances of that; `salun attack` prints what chance alone would give. With n = {n}, a rate of 0 % has a 95 %
interval up to {upper:.0f} %, and one of 50 % reaches from 34 to 66 %. An ASR without its budget means nothing: longer
attacks succeed more often.
"""


def document(rows: Rows, controls: Controls, attacks: Sequence[str], n: int, seeds: Iterable[int], images: int) -> str:
    """The whole page.

    Args:
        attacks: Their names, in order.
        n: Prompts of each concept. images: Of each kind, behind UA and RA.
    """
    known = {concept: of for concept, of in rows.items() if any(of.values())}
    head = HEAD.format(n=n, seeds=", ".join(map(str, seeds)), images=images, learned=LEARNED, works=WORKS)
    tables = [table(concept, of, controls[concept], attacks) for concept, of in known.items()]
    further = [by_point(known, "quantize", "Quantization by format"),
               by_point(known, "merge", "Merge with the original by its fraction")]  # fmt: skip
    parts = [
        "# Attacks on erased models", *map(_filled, (summary(known), head, *_remarks(known))), *tables, *further,
        seconds(known, attacks), _filled(CAVEAT.format(n=n, upper=100 * (3.8415 / (n + 3.8415)))),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def summary(rows: Rows) -> str:
    """What the numbers show, in sentences whose figures come from them."""
    concepts = list(rows)

    def rates(attacks: Iterable[str], methods: Iterable[str], of: Iterable[str] = concepts) -> list[float]:
        made = [rate(row["attacks"].get(a)) for c in of for m in methods for row in rows[c].get(m, []) for a in attacks]
        return [value for value in made if value is not None]

    said = ["**What it shows.** **Erased concepts come back when somebody tries.**"]
    if found := rates([TRAINED], (*ORDINARY, HARDENED)):
        said.append(f"Fine-tuning on 16 images brings them back in {_ends(found)} of prompts after SalUn, hardened or "
                    "not, and UCE.")  # fmt: skip
    said += _unrelated(rows)
    inverted = {method: rates(INVERSIONS, [method]) for method in (*ORDINARY, HARDENED)}
    if inverted["SalUn"] and inverted["UCE"]:
        said.append(f"Learned tokens (concept inversion) succeed in {_ends(inverted['SalUn'])} after SalUn and in "
                    f"{_ends(inverted['UCE'])} after UCE.")  # fmt: skip
    if inverted[HARDENED]:
        said.append(f"`--harden` holds these at {max(inverted[HARDENED]):.0f} % or less, but not fine-tuning.")
        said += [_of_hardened(concept, rows[concept].get(HARDENED, [])) for concept in concepts]
    if drops := [drop for c in concepts for drop in _drops(rows[c].get("ESD", []))]:
        numbers = sorted({f"{drop:.0f}" for drop in drops}, key=float)
        said.append("ESD withstands more of them because it damages the model: accuracy on other prompts falls by "
                    f"{' and '.join(numbers)} percentage points.")  # fmt: skip
    seeds = max(len(of) for by in rows.values() for of in by.values())
    said.append("One seed: small differences mean nothing." if seeds == 1 else f"Means of {seeds} seeds.")
    return " ".join(filter(None, said))


def _unrelated(rows: Rows) -> list[str]:
    """What the first two steps of a fine-tuning on other things do, where that is much."""
    early = {}
    for concept, by in rows.items():
        of = {m: 100 * max(_early(row) for row in by[m]) for m in ORDINARY if by.get(m)}
        if of and min(of.values()) >= 50:
            early[concept] = of
    if not early:
        return []
    parts = [f"*{concept}* in {' and '.join(f'{value:.0f} % ({method})' for method, value in of.items())} of prompts"
             for concept, of in early.items()]  # fmt: skip
    said = f"One or two steps of fine-tuning on **unrelated** images suffice to bring back {', '.join(parts)}"
    return [f"{said}; more of them erase it again."]


def _early(row: Mapping[str, Any]) -> float:
    """The highest fraction within two steps on unrelated images; 0 where that was not measured."""
    made = row["attacks"].get(UNRELATED)
    return max((float(y) for x, y in made["curve"] if x <= 2), default=0.0) if made else 0.0


def _of_hardened(concept: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What else brings a concept back after hardening, and what that costs."""
    names = {"prompt-search": "the prompt search", "merge": "a merge with the original", "ring-a-bell": "Ring-A-Bell"}
    means = {name: _mean_of(row["attacks"].get(attack) for row in rows) for attack, name in names.items()}
    much = [f"{name} ({value:.0f} %)" for name, value in means.items() if value is not None and value >= 15]
    anchor = [row["anchor"] for row in rows if row["anchor"] is not None]
    if not much:
        return ""
    costs = f", and only {np.mean(anchor):.0f} % of its images show the anchor" if anchor else ""
    return f"Hardened *{concept}* also comes back under {', '.join(much)}{costs}."


def _drops(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(row["ra_before"]) - float(row["ra_after"]) for row in rows]


def _ends(values: Sequence[float]) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{high} %" if low == high else f"{low} to {high} %"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _remarks(rows: Rows) -> list[str]:
    """What differs between stored results and those that the program would make now."""
    of_esd = [row["attacks"].get(TRAINED) for by in rows.values() for row in by.get("ESD", [])]
    trained = [each for each in of_esd if each is not None]
    old = any("batch_size" not in each["facts"] for each in trained)
    return [OUTDATED, ANCHORED] if old else []


def rate(made: Mapping[str, Any] | None) -> float | None:
    """Percentage of prompts that succeed; of relearning at the look at which most do. None where it is not known."""
    if made is None or made["asr"] is None:
        return None
    if made["attack"].startswith(TRAINED) and made["curve"]:
        return 100 * max(float(y) for _, y in made["curve"])
    return float(made["asr"]["value"])


def table(
    concept: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], originals: Sequence[Any], attacks: Sequence[str]
) -> str:
    """The table of a concept: an attack a row, a method a column."""
    names = [name for name in rows if rows[name]]
    lines = [f"## {concept}\n", f"| | {' | '.join(names)} | original |", "|---" * (len(names) + 2) + "|"]
    for title, shown in (
        ("UA", lambda r: r["ua"]),
        ("RA drop", lambda r: r["ra_before"] - r["ra_after"]),
        ("anchor shown", lambda r: r["anchor"]),
    ):
        cells = [_number([shown(r) for r in rows[name]], 1) for name in names]
        lines.append(f"| *{title}* | {' | '.join(cells)} | |")
    made = {each for name in names for row in rows[name] for each in row["attacks"]}
    for each in (each for each in attacks if each in made):
        cells = [_number([rate(r["attacks"].get(each)) for r in rows[name]]) for name in names]
        lines.append(f"| {attack_of(each).title} | {' | '.join(cells)} | {_control(each, originals)} |")
        if each.startswith(TRAINED):
            cells = [_steps([r["attacks"].get(each) for r in rows[name]]) for name in names]
            lines.append(f"| *steps to half as often as the original* | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _control(attack: str, originals: Sequence[Any]) -> str:
    mean, plain = (_mean_of(of.get(name) for of in originals) for name in (attack, ITSELF))
    return "–" if mean is None else f"{mean:.0f}" + (" (weak)" if is_weak(mean, plain) else "")


def _mean_of(made: Iterable[Mapping[str, Any] | None]) -> float | None:
    known = [value for value in map(rate, made) if value is not None]
    return float(np.mean(known)) if known else None


def _number(values: Iterable[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else "–"


def _steps(made: Sequence[Mapping[str, Any] | None]) -> str:
    """The first look at which a concept shows half as often as in the original, of each seed."""
    known = [each for each in made if each is not None]
    return ", ".join(str(each["facts"]["steps_to_half"] or f"> {each['options']['steps']}") for each in known) or "–"


def by_point(rows: Rows, attack: str, title: str) -> str:
    """A table of an attack's curve: a point a column, means over the seeds."""
    known = [(concept, name, [row["attacks"][attack] for row in of if attack in row["attacks"]])
             for concept, by in rows.items() for name, of in by.items()]  # fmt: skip
    known = [each for each in known if each[2]]
    if not known:
        return ""
    points = [x for x, _ in known[0][2][0]["curve"]]
    heads = [f"{100 * x:.0f} %" if isinstance(x, float) else str(x) for x in points]
    lines = [f"## {title}\n", f"| concept | method | {' | '.join(heads)} |", "|---" * (len(points) + 2) + "|"]
    for concept, name, made in known:
        curves = [dict(map(tuple, each["curve"])) for each in made]
        cells = [_number([100 * of[x] if x in of else None for of in curves]) for x in points]
        lines.append(f"| {concept} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds(rows: Rows, attacks: Sequence[str]) -> str:
    """A table of the time of each attack: on the model of a method, the median over concepts and seeds."""
    methods = list(dict.fromkeys(name for by in rows.values() for name, of in by.items() if of))
    remark = "On one core, some of them next to other work; the median over concepts and seeds.\n"
    lines = ["## Seconds for each model\n", remark, f"| | {' | '.join(methods)} |"]
    lines.append("|---" * (len(methods) + 1) + "|")
    known = {each for by in rows.values() for of in by.values() for row in of for each in row["attacks"]}
    for each in (each for each in attacks if each in known):
        cells = []
        for name in methods:
            made = [row["attacks"].get(each) for by in rows.values() for row in by.get(name, [])]
            times = [of["seconds"] for of in made if of is not None]
            cells.append(f"{np.median(times):.0f}" if times else "–")
        lines.append(f"| {attack_of(each).title} | {' | '.join(cells)} |")
    totals = {name: [sum(each["seconds"] for each in row["attacks"].values()) for by in rows.values()
                     for row in by.get(name, [])] for name in methods}  # fmt: skip
    lines.append(f"| *all of them* | {' | '.join(f'{np.median(totals[name]):.0f}' for name in methods)} |")
    return "\n".join(lines)
