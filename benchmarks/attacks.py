"""Attacks on the bundled model: how often each brings a concept back, by method and concept.

    python -m benchmarks.attacks [--n 32] [--seeds 0] [--concepts circle red night] [--methods ...] [--attacks ...]

Each method erases each concept, each attack of the small budget is made on the result, and on the original as a
control. Prints, and writes to `docs/attacks.md` after each run. Runs are kept in
`benchmarks/results/attacks`, and results of attacks in the user's cache, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import salun
from benchmarks.stored import stored
from salun.diffusion.attack import attack
from salun.diffusion.attack_options import AttackOptions, attack_of
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "attacks", ROOT / "docs" / "attacks.md"
METHODS: dict[str, dict[str, Any]] = {  # name → options of `erase`
    "SalUn": {"steps": 120},
    "SalUn, hardened": {"harden": 8},
    "ESD": {"method": "esd", "steps": 120, "lr": 3e-4, "batch_size": 4},
    "UCE": {"method": "uce"},
}
ATTACKED = (
    "seeds", "completion", "concept-vector", "ring-a-bell", "prompt-search", "embedding-search", "inversion",
    "inversion+steps=400+start=anchor", "relearn", "relearn+data=unrelated", "quantize", "merge",
)  # fmt: skip
HEAD = """# Attacks on erased models

**What it shows.** **Erased concepts come back when somebody tries.** Fine-tuning on 16 images brings them back after
SalUn, hardened or not, and UCE in 75 to 100 % of prompts. Learned tokens (concept inversion) succeed in 66 to 97 %
after SalUn and in 94 to 100 % after UCE. `--harden` holds these at 16 % or less, but not fine-tuning, and for *red*
neither the prompt search (47 %) nor a merge with the original (84 %); it costs quality: after the hardened *red* 55 %
of the images show the anchor. ESD withstands more because it damages the model: accuracy on other prompts falls by 36
and 41 percentage points. One seed and 32 prompts: small differences mean nothing.

Written by `benchmarks/attacks.py` on the bundled model `shapes`, on a CPU: each method erases each concept with its
preset anchor (SalUn and ESD with 120 steps, the hardened SalUn towards its goal), and each attack of the
small budget is made on the result ({n} prompts of each concept, seeds {seeds}).
Numbers are percentages of prompts of which an image shows the concept after the attack (ASR), means over the seeds. UA,
RA and “anchor” are those of the erasure without an attack, on {images} images of each kind; RA drop in percentage
points. Original: the same attack on the model before the erasure; one that does not succeed there says little.

"""
CAVEAT = """
An image that no attack touched can show the concept by a false alarm of the detector, and an attack with several tries
has several chances of that; `salun attack` prints what chance alone would give. With n = {n}, a rate of 0 % has a 95 %
interval up to {upper:.0f} %, and one of 50 % reaches from 34 to 66 %. An ASR without its budget means nothing: longer
attacks succeed more often.
"""


def erased(concept: str, seed: int, name: str, images: int) -> Path:
    """The run folder of an erasure, made unless it is there."""
    folder = RESULTS / "runs" / f"{concept}-{seed}-{name}".replace(" ", "-").replace(",", "")
    if not (folder / "run.json").is_file() or json.loads((folder / "run.json").read_text())["status"] != "done":
        options = {"seed": seed, "eval_images": images, **METHODS[name]}
        salun.erase("shapes", concept, run_dir=folder, progress=silent, resume=True, command="benchmark", **options)
    return folder


def row(concept: str, seed: int, name: str, attacks: list[str], n: int, images: int) -> dict[str, Any]:
    """What an erasure and each attack on it achieve."""
    folder = erased(concept, seed, name, images)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    made = attack(str(folder), AttackOptions(attack=attacks, n=n, images=64, device="cpu")).as_json()
    value = {key: (record["metrics"].get(key) or {}).get("value") for key in ("ua", "ra_before", "ra_after", "anchor")}
    return {
        **value,
        "attacks": {each["attack"]: each for each in made["attacks"]},
    }


def control(concept: str, seed: int, attacks: list[str], n: int) -> dict[str, Any]:
    """Each attack on the original."""
    options = AttackOptions(attack=attacks, n=n, images=64, device="cpu", control=True)
    made = attack(str(erased(concept, seed, "UCE", 32)), options).as_json()
    return {each["attack"]: each for each in made["attacks"] if each["side"] == "original"}


def table(
    concept: str, rows: dict[str, list[dict[str, Any]]], of_original: list[dict[str, Any]], attacks: list[str]
) -> str:
    """The table of a concept: an attack a row, a method a column."""
    names = [name for name in rows if rows[name]]
    lines = [f"## {concept}\n", f"| | {' | '.join(names)} | original |", "|---" * (len(names) + 2) + "|"]
    for title, shown in (
        ("UA", lambda r: f"{r['ua']:.1f}"),
        ("RA drop", lambda r: f"{r['ra_before'] - r['ra_after']:+.1f}"),
        ("anchor shown", lambda r: "–" if r["anchor"] is None else f"{r['anchor']:.1f}"),
    ):
        lines.append(f"| *{title}* | {' | '.join(_mean([shown(r) for r in rows[name]]) for name in names)} | |")
    for each in attacks:
        cells = [_asr([r["attacks"].get(each) for r in rows[name]]) for name in names]
        lines.append(
            f"| {attack_of(each).title} | {' | '.join(cells)} | {_asr([of.get(each) for of in of_original])} |"
        )
    return "\n".join(lines) + "\n"


def _mean(values: list[str]) -> str:
    numbers = [float(value) for value in values if value != "–"]
    return f"{np.mean(numbers):.1f}" if numbers else "–"


def _asr(made: list[dict[str, Any] | None]) -> str:
    known = [each["asr"]["value"] for each in made if each is not None and each["asr"] is not None]
    return f"{np.mean(known):.0f}" if known else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--concepts", nargs="*", default=["circle", "red", "night"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKED))
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {c: {m: [] for m in given.methods} for c in given.concepts}
    controls: dict[str, list[dict[str, Any]]] = {concept: [] for concept in given.concepts}
    for seed in given.seeds:
        for concept in given.concepts:
            for name in given.methods:
                path = RESULTS / f"{concept}-{seed}-{name}-{given.n}.json".replace(" ", "-").replace(",", "")
                of = (concept, seed, name, given.attacks, given.n, given.images)
                found[concept][name].append(stored(path, lambda of=of: row(*of)))
                rates = {
                    k: v["asr"] and round(v["asr"]["value"]) for k, v in found[concept][name][-1]["attacks"].items()
                }
                print(concept, seed, name, rates, flush=True)
                _write(given, found, controls)
            path = RESULTS / f"{concept}-{seed}-control-{given.n}.json"
            controls[concept].append(stored(path, lambda of=(concept, seed): control(*of, given.attacks, given.n)))
            _write(given, found, controls)


def _write(given: argparse.Namespace, found: dict[str, Any], controls: dict[str, Any]) -> None:
    head = HEAD.format(n=given.n, seeds=", ".join(map(str, given.seeds)), images=given.images)
    tables = [table(c, rows, controls[c], given.attacks) for c, rows in found.items() if any(rows.values())]
    upper = 100 * (3.8415 / (given.n + 3.8415))
    TABLE.write_text(head + "\n".join(tables) + CAVEAT.format(n=given.n, upper=upper), encoding="utf-8")


if __name__ == "__main__":
    main()
