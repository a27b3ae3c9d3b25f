"""The threshold of the mask: radix select against the double argsort of the authors' code.

    python benchmarks/threshold.py [--scores 50_000_000]

Each side runs in its own process, which gives its peak memory. Prints seconds, extra memory beyond the
scores, and ratios; checks that both select the same entries, except for the order of ties.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

BASELINE, SALUN = "double argsort (reference)", "radix select (salun)"


def scores(n: int) -> dict[str, torch.Tensor]:
    """n scores in ten tensors, magnitudes spread like gradients: log-normal."""
    generator = torch.Generator().manual_seed(0)
    sizes = [n // 10] * 9 + [n - 9 * (n // 10)]
    return {f"w{i}": torch.randn(size, generator=generator).mul_(2).exp_() for i, size in enumerate(sizes)}


def reference(scored: dict[str, torch.Tensor], k: int) -> int:
    """The selection of the authors' code: ranks by two argsorts, of which those below k. Returns its checksum."""
    flat = torch.cat([s.flatten() for s in scored.values()])
    order = torch.argsort(-flat)
    ranks = torch.argsort(order)
    mask = torch.zeros_like(ranks)
    mask[ranks < k] = 1
    return int(mask.nonzero().double().sum())


def salun_selection(scored: dict[str, torch.Tensor], k: int) -> int:
    """The same selection by salun. Returns the same checksum."""
    from salun.masking.mask import Mask
    from salun.masking.threshold import select_largest

    mask = Mask.from_selection(select_largest(scored, k), scored)
    total, start = 0.0, 0
    for name, tensor in scored.items():
        chosen = mask.dense(name).nonzero().double()
        total += float(chosen.sum()) + start * len(chosen)
        start += tensor.numel()
    return int(total)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def measure(side: str, n: int) -> None:
    """Run one side and print its time and memory as JSON."""
    scored = scores(n)
    held, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if side == SALUN:
        from salun.masking.threshold import select_largest

        select_largest(scored, n // 2)
    else:
        reference_choice(scored, n // 2)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    check = salun_selection(scored, n // 2) if side == SALUN else reference(scored, n // 2)
    print(json.dumps({"seconds": seconds, "extra": peak[0] - held, "check": check}))


def reference_choice(scored: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    """The reference up to its mask, to be timed."""
    flat = torch.cat([s.flatten() for s in scored.values()])
    ranks = torch.argsort(torch.argsort(-flat))
    mask = torch.zeros_like(ranks)
    mask[ranks < k] = 1
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=lambda text: int(text.replace("_", "")), default=50_000_000)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side, arguments.scores)
        return
    results = {}
    for side in (BASELINE, SALUN):
        command = [sys.executable, __file__, "--scores", str(arguments.scores), "--side", side]
        results[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{arguments.scores:,} scores, half of them chosen, {torch.get_num_threads()} threads")
    for side, result in results.items():
        mask = arguments.scores / 8 if side == SALUN else 8 * arguments.scores  # bits, and the reference's integers
        memory = f"{result['extra'] / 2**20:8.1f} MiB, of which the mask itself {mask / 2**20:6.1f}"
        print(f"{side:<28} {result['seconds']:8.2f} s   beyond the scores {memory}")
    base, radix = results[BASELINE], results[SALUN]
    print(
        f"ratio: {base['seconds'] / radix['seconds']:.1f} × faster, {base['extra'] / max(radix['extra'], 1):.0f} × less"
    )
    print("same choice" if base["check"] == radix["check"] else "the choices DIFFER (ties aside, they must not)")


if __name__ == "__main__":
    main()
