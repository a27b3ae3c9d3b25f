"""Attacks on the bundled model: how often each brings a concept back, by method and concept.

    python -m benchmarks.attacks [--n 32] [--seeds 0] [--concepts circle red night] [--methods ...] [--attacks ...]
    python -m benchmarks.attacks --table         write the page from what is there

Each method erases each concept, each attack of the small budget is made on the result, and on the original as a
control. Prints, and writes to `docs/attacks.md` after each run. Runs are kept in
`benchmarks/results/attacks`, and results of attacks in the user's cache, so an interrupted benchmark continues; a
stored result that lacks one of the attacks gets it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import salun
from benchmarks.attacks_page import LEARNED, Controls, Rows, document, rate
from salun.diffusion.attack import attack
from salun.diffusion.attack_options import AttackOptions
from salun.progress import silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "attacks", ROOT / "docs" / "attacks.md"
METHODS: dict[str, dict[str, Any]] = {  # name → options of `erase`
    "SalUn": {"steps": 120},
    "SalUn, default": {},
    "SalUn, hardened": {"harden": 8},
    "finetune": {"method": "finetune", "steps": 120},
    "ESD": {"method": "esd", "steps": 120, "lr": 3e-4, "batch_size": 4},
    "UCE": {"method": "uce"},
}
ATTACKED = (
    "seeds", "noise", "completion", "inpaint", "concept-vector", "ring-a-bell", "prompt-search", "embedding-search",
    "inversion", "inversion+steps=400+start=anchor", "inversion+steps=1000", "inversion+length=4", "relearn",
    "relearn+data=unrelated", "quantize", "merge",
)  # fmt: skip


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
    made = attack(str(folder), options_of(attacks, n, seed)).as_json()
    metrics = {key: record["metrics"].get(key) or {} for key in ("ua", "ra_before", "ra_after", "anchor")}
    return {
        **{key: of.get("value") for key, of in metrics.items()},
        "n": {key: of.get("n") for key, of in metrics.items()},
        "attacks": {each["attack"]: each for each in made["attacks"]},
    }


def control(concept: str, seed: int, attacks: list[str], n: int, images: int) -> dict[str, Any]:
    """Each attack on the original."""
    made = attack(str(erased(concept, seed, "UCE", images)), options_of(attacks, n, seed, control=True)).as_json()
    return {"attacks": {each["attack"]: each for each in made["attacks"] if each["side"] == "original"}}


def options_of(attacks: list[str], n: int, seed: int, control: bool = False) -> AttackOptions:
    """Of one call; the prompts and seeds that are attacked are others for each seed of the erasure."""
    return AttackOptions(attack=attacks, n=n, images=LEARNED, device="cpu", seed=seed + 1, control=control)


def completed(path: Path, attacks: list[str], measure: Callable[[list[str]], dict[str, Any]] | None) -> dict[str, Any]:
    """What a file holds, with the attacks that it lacks measured and added.

    Args:
        measure: Gives the rest of a row, with these attacks; None to take what is there.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found and "attacks" not in found:  # of a control, as it was first stored
        found = {"attacks": found}
    missing = [each for each in attacks if each not in found.get("attacks", {})]
    if missing and measure is not None:
        made = measure(missing)
        found = {**made, **found, "attacks": {**found.get("attacks", {}), **made["attacks"]}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--images", type=int, default=64, help="behind UA and RA, of each kind")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--concepts", nargs="*", default=["circle", "red", "night"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKED))
    parser.add_argument("--table", action="store_true", help="write the page from what is there")
    given = parser.parse_args()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {c: {m: [] for m in given.methods} for c in given.concepts}
    controls: dict[str, list[dict[str, Any]]] = {concept: [] for concept in given.concepts}
    for seed in given.seeds:
        for concept in given.concepts:
            for name in [*given.methods, "control"]:
                path = RESULTS / f"{concept}-{seed}-{name}-{given.n}.json".replace(" ", "-").replace(",", "")
                measure = partial(_measured, concept, seed, name, given.n, given.images)
                found = completed(path, given.attacks, None if given.table else measure)
                if name == "control":
                    controls[concept].append(found.get("attacks", {}))
                elif found:
                    rows[concept][name].append(found)
                if not given.table:
                    print(concept, seed, name, {k: rate(each) for k, each in found["attacks"].items()}, flush=True)
                    _write(given, rows, controls)
    _write(given, rows, controls)


def _measured(concept: str, seed: int, name: str, n: int, images: int, attacks: list[str]) -> dict[str, Any]:
    if name == "control":
        return control(concept, seed, attacks, n, images)
    return row(concept, seed, name, attacks, n, images)


def _write(given: argparse.Namespace, rows: Rows, controls: Controls) -> None:
    text = document(rows, controls, given.attacks, given.n, given.seeds, given.images)
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
