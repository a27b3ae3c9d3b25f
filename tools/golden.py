"""Golden results: the sha256 of everything that erasures, deltas and classification write, to compare two revisions.

    python tools/golden.py golden.json                  # this working tree's results
    python tools/golden.py golden.json --against main~5 # also another revision's, on this machine; says what differs

Results depend on the processor and on the packages' versions, so both revisions run here, one after the other, each by
its own copy of this script in a worktree of its own. Every file gives two hashes: of all its bytes, and of its tensors
alone (name, dtype, shape, bytes in the order of names), which stays equal where only metadata changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    *("--steps", "6", "--batch-size", "4", "--forget-latents", "16", "--retain-latents", "16", "--eval-images", "0"),
    *("--device", "cpu", "--seed", "3"),
]
ERASURES = {
    "salun": ["--concept", "circle"],
    "salun-soft": ["--concept", "circle", "--method", "salun-soft"],
    "two concepts": ["--concept", "circle", "--concept", "red"],
    "union": ["--concept", "circle", "--concept", "red", "--combine", "union"],
    "low vram": ["--concept", "circle", "--low-vram"],
    "bf16": ["--concept", "circle", "--dtype", "bf16"],
    "shuffled": ["--concept", "circle", "--mask", "shuffled", "--density", "0.1"],
    "cross-attention": ["--concept", "circle", "--scope", "xattn"],
    "paper's targets": ["--concept", "circle", "--target", "online", "--retain-target", "noise"],
}
FAMILIES = ("sd1", "sd2", "sdxl")
METHODS = ("ft", "rl", "ga", "ff", "iu", "be", "bs", "l1-sparse", "salun", "salun-soft", "scrub", "ssd")


def main() -> None:
    """Read the command line, run, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file of this working tree's hashes")
    parser.add_argument("--against", metavar="REVISION", help="a revision to compare with")
    given = parser.parse_args()
    hashes = results()
    given.output.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    if given.against is None:
        print(f"{given.output}: {sum(map(len, hashes.values()))} files of {len(hashes)} cases")
        return
    differences = list(compare(results_of(given.against), hashes))
    print("\n".join(differences) or f"all {sum(map(len, hashes.values()))} files are equal")
    sys.exit(any("TENSORS" in line or "missing" in line for line in differences))


def results_of(revision: str) -> dict[str, dict[str, list[str]]]:
    """The results of another revision, from a temporary worktree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree), revision], cwd=ROOT, check=True)
        try:
            output = Path(folder) / "golden.json"
            command = [sys.executable, str(tree / "tools" / "golden.py"), str(output)]
            subprocess.run(command, cwd=tree, check=True)
            hashes: dict[str, dict[str, list[str]]] = json.loads(output.read_text(encoding="utf-8"))
            return hashes
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def compare(old: dict[str, dict[str, list[str]]], new: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    """A line for each file that differs, and how."""
    for case, files in old.items():
        for name, (file_hash, tensors) in files.items():
            if name not in new.get(case, {}):
                yield f"{case}: {name} is missing"
            elif new[case][name][1] != tensors:
                yield f"{case}: {name}: TENSORS differ"
            elif new[case][name][0] != file_hash:
                yield f"{case}: {name}: equal tensors, other metadata"


def results() -> dict[str, dict[str, list[str]]]:
    """case → file → (sha256 of the file, sha256 of its tensors)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SALUN_CACHE"] = str(folder / "cache")
        cases = {}
        for case, hashes in chain(_erasures(folder), _deltas(folder), _classifications(folder), _node(folder)):
            print(f"{case}: {len(hashes)} files", flush=True)
            cases[case] = hashes
    return cases


def _erasures(folder: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    for case, options in ERASURES.items():
        run = folder / case
        _salun("erase", "--model", "shapes", *options, *SHORT, "--run-dir", str(run))
        yield f"erase, {case}", _hashes(run)
    for family in FAMILIES:  # a complete checkpoint, written in its own layout and as a diffusers folder
        run, source = folder / f"erase {family}", _checkpoint(folder, family, seed=0)
        outputs = ["--output", str(run / "x.safetensors"), "--output", f"{run / 'x'}/"]
        small = ["--concept", "cat", "--anchor", "dog", "--resolution", "64", "--lr", "1e-3"]
        run.mkdir()
        _salun("erase", "--model", str(source), *small, *SHORT, "--run-dir", str(run / "run"), *outputs)
        yield f"erase, {family}", _hashes(run)


def _deltas(folder: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    for family in FAMILIES:
        base, first_erased, second_erased = (_checkpoint(folder, family, seed) for seed in range(3))
        out = folder / f"delta {family}"
        out.mkdir()
        first, second = (str(out / f"{n}.salun.safetensors") for n in ("first", "second"))
        erased = str(out / "erased.safetensors")
        _salun("delta", "extract", str(base), str(first_erased), "--output", first)
        _salun("delta", "extract", str(base), str(second_erased), "--output", second)
        _salun("delta", "apply", str(base), first, "--output", erased)
        _salun("delta", "apply", str(base), first, "--strength", "0.5", "--output", str(out / "half.safetensors"))
        _salun("delta", "undo", erased, first, "--output", str(out / "undone.safetensors"))
        _salun("delta", "stack", str(base), first, second, "--output", str(out / "stacked.safetensors"))
        lora, diff = str(out / "x.lora.safetensors"), str(out / "x.diff.safetensors")
        _salun("delta", "export", first, "--base", str(base), "--output", lora, "--rank", "2")
        _salun("delta", "export", first, "--base", str(base), "--output", diff)
        yield f"delta, {family}", _hashes(out)


def _classifications(folder: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    for method in METHODS:
        run = folder / f"classify {method}"
        quick = ["--train-epochs", "2", "--device", "cpu", "--retrain", "no"]
        if method not in ("ff", "iu", "ssd"):
            quick += ["--epochs", "2"]
        _salun("classify-unlearn", "--data", "digits", "--method", method, *quick, "--run-dir", str(run))
        yield f"classify, {method}", _hashes(run)


def _node(folder: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """The delta of the ComfyUI node, in the tests' stand-in for ComfyUI."""
    out = folder / "node"
    out.mkdir()
    test = "tests/test_comfy_nodes.py::test_golden_delta_of_the_erase_node"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SALUN_GOLDEN": str(out)}, check=True, capture_output=True)
    yield "node", _hashes(out)


def _checkpoint(folder: Path, family: str, seed: int) -> Path:
    """A small single file of a family; the same one at each call."""
    path = folder / f"{family}-{seed}.safetensors"
    if not path.exists():
        tool = str(ROOT / "tools" / "checkpoints.py")
        command = [sys.executable, tool, str(path), "--family", family, "--seed", str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return path


def _salun(*arguments: str) -> None:
    """Run the command line of this very tree."""
    command = [sys.executable, "-m", "salun", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"salun {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")


def _hashes(folder: Path) -> dict[str, list[str]]:
    """Relative path → (sha256 of the file, sha256 of its tensors) of every safetensors file; then the folder goes."""
    hashes = {}
    for path in sorted(folder.rglob("*.safetensors")):
        file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        hashes[path.relative_to(folder).as_posix()] = [file_hash, _tensors(path)]
    shutil.rmtree(folder)
    return hashes


def _tensors(path: Path) -> str:
    """sha256 of a safetensors file's tensors, without its metadata and their order."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name in sorted(header):
        start, end = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
        digest.update(data[8 + size + start : 8 + size + end])
    return digest.hexdigest()


if __name__ == "__main__":
    main()
