"""The threshold of the mask: radix select against the double argsort of the authors' code.

    python benchmarks/threshold.py [--scores 50_000_000]

Each side runs in a process of its own, so that its peak memory is its own. Prints seconds, extra memory beyond the
scores, and ratios; checks that both choose the same entries but for the order of ties.
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

BASELINE, OURS = "double argsort (reference)", "radix select (salun)"


def scores(n: int) -> dict[str, torch.Tensor]:
    """n scores in ten tensors, magnitudes spread like gradients: log-normal."""
    generator = torch.Generator().manual_seed(0)
    sizes = [n // 10] * 9 + [n - 9 * (n // 10)]
    return {f"w{i}": torch.randn(size, generator=generator).mul_(2).exp_() for i, size in enumerate(sizes)}


def reference(found: dict[str, torch.Tensor], k: int) -> int:
    """As the authors' code: rank everything by two argsorts, keep ranks below k. Returns a checksum of the choice."""
    flat = torch.cat([s.flatten() for s in found.values()])
    order = torch.argsort(-flat)
    ranks = torch.argsort(order)
    mask = torch.zeros_like(ranks)
    mask[ranks < k] = 1
    return int(mask.nonzero().double().sum())


def ours(found: dict[str, torch.Tensor], k: int) -> int:
    """The same choice by salun. Returns the same checksum."""
    from salun.masking.mask import Mask
    from salun.masking.threshold import select_largest

    mask = Mask.from_selection(select_largest(found, k), found)
    total, start = 0.0, 0
    for name, tensor in found.items():
        chosen = mask.dense(name).nonzero().double()
        total += float(chosen.sum()) + start * len(chosen)
        start += tensor.numel()
    return int(total)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def measure(side: str, n: int) -> None:
    """Run one side and print its figures as JSON."""
    found = scores(n)
    held, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if side == OURS:
        from salun.masking.threshold import select_largest

        select_largest(found, n // 2)
    else:
        reference_choice(found, n // 2)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    check = ours(found, n // 2) if side == OURS else reference(found, n // 2)
    print(json.dumps({"seconds": seconds, "extra": peak[0] - held, "check": check}))


def reference_choice(found: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    """The reference up to its mask, for the clock."""
    flat = torch.cat([s.flatten() for s in found.values()])
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
    for side in (BASELINE, OURS):
        command = [sys.executable, __file__, "--scores", str(arguments.scores), "--side", side]
        results[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{arguments.scores:,} scores, half of them chosen, {torch.get_num_threads()} threads")
    for side, found in results.items():
        mask = arguments.scores / 8 if side == OURS else 8 * arguments.scores  # bits, and the reference's integers
        told = f"{found['extra'] / 2**20:8.1f} MiB, of which the mask itself {mask / 2**20:6.1f}"
        print(f"{side:<28} {found['seconds']:8.2f} s   beyond the scores {told}")
    base, mine = results[BASELINE], results[OURS]
    print(
        f"ratio: {base['seconds'] / mine['seconds']:.1f} × faster, {base['extra'] / max(mine['extra'], 1):.0f} × less"
    )
    print("same choice" if base["check"] == mine["check"] else "the choices DIFFER (ties aside, they must not)")


if __name__ == "__main__":
    main()
