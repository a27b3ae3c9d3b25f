"""`salun doctor`: what is installed, what would fail, and how to fix it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from packaging.requirements import Requirement

from salun.compute.device import pick_device, pick_dtype
from salun.errors import SalunError
from salun.extras import install_command, quoted
from salun.runs.cache import Cache
from salun.version import __version__

GIB = 2**30
Verdict = Literal["ok", "note", "fails"]


@dataclass(frozen=True)
class Finding:
    """One check. verdict: ok; note: something is missing or not ideal; fails: something will not work.

    advice: what to do, where there is something.
    """

    what: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def examine(network: bool = True) -> list[Finding]:
    """Check everything that an erasure needs. network: try to reach the hub too (3 s at most)."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _devices,
        _attention,
        _extras,
        _folders,
        _models,
        lambda: _hub(network),
        _erasing,
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # one failing check must not hide the others
            findings.append(Finding("check", f"{type(error).__name__}: {error}", "fails", "unexpected: report it"))
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("salun", f"{__version__} in {Path(__file__).parents[1]}")
    old = sys.version_info < (3, 10)
    yield Finding(
        "Python",
        f"{platform.python_version()} on {platform.platform()}",
        "fails" if old else "ok",
        "salun needs Python 3.10 or later" if old else "",
    )
    try:
        wanted = metadata.requires("salun") or []
    except metadata.PackageNotFoundError:  # a bare clone, as hosts use it
        wanted = []
        yield Finding("packages", "salun runs from its folder, uninstalled: versions are not checked", "note")
    for line in wanted:
        if "extra ==" in line:
            continue
        requirement = Requirement(line)
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "fails", f"pip install {quoted(line)}")
            continue
        low = not requirement.specifier.contains(version, prereleases=True)
        newer_torch = "a newer torch: see pytorch.org for your GPU's build"
        advice = newer_torch if name == "torch" else f"pip install {quoted(line)}"
        yield Finding(name, version, "fails" if low else "ok", advice if low else "")


def _devices() -> Iterator[Finding]:
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            name, room = torch.cuda.get_device_name(i), f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
            small = total < 8 * GIB
            advice = "for SD 1.5 use low_vram and batch_size 1 or 2" if small else ""
            yield Finding(f"GPU {i}", f"{name}, {room}, computes in {dtype}", "note" if small else "ok", advice)
    elif device.type == "mps":
        yield Finding("GPU", f"Apple's, computes in {dtype}", "note", "untested: if it fails use device cpu")
    else:
        advice = ""
        if shutil.which("nvidia-smi"):
            advice = f"there is an NVIDIA driver, but torch {torch.__version__} does not use it: install its CUDA build"
        yield Finding("GPU", "none that torch can use; the CPU works, but slowly", "note", advice)
    yield _processor()
    memory = _memory()
    if memory is not None:
        low = memory[0] < 13 * GIB
        text = f"{memory[0] / GIB:.1f} of {memory[1] / GIB:.1f} GiB free"
        advice = "SD 1.5 in fp32 on the CPU needs 13 GiB or more, 11 with low_vram in bf16"
        yield Finding("memory", text, "note" if low else "ok", advice if low else "")


def _processor() -> Finding:
    """Cores, threads, and whether other programs keep them busy, as waiting threads then slow torch down much."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores, threads = len(usable), torch.get_num_threads()
    text = f"{cores} cores, torch uses {threads} threads"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if threads == 1 or load < cores / 2:
        return Finding("CPU", text)
    advice = "other programs keep the cores busy: OMP_NUM_THREADS=1 makes a run faster then, by up to ten times"
    return Finding("CPU", f"{text}, load {load:.1f}", "note", advice)


def _memory() -> tuple[int, int] | None:
    if importlib.util.find_spec("psutil") is None:
        return None
    import psutil

    seen = psutil.virtual_memory()
    return int(seen.available), int(seen.total)


def _attention() -> Iterator[Finding]:
    kinds = ["sdpa"]
    if torch.cuda.is_available():
        kernels = {"flash": "flash_sdp_enabled", "memory-efficient": "mem_efficient_sdp_enabled"}
        kinds += [f"{k} kernel" for k, ask in kernels.items() if getattr(torch.backends.cuda, ask)()]
    yield Finding("attention", ", ".join(kinds))


def _extras() -> Iterator[Finding]:
    for name, use in (("xformers", "attention xformers"), ("bitsandbytes", "optimizer adam8bit")):
        try:
            yield Finding(name, f"{metadata.version(name)}, for {use}")
        except metadata.PackageNotFoundError:
            yield Finding(name, f"not installed (only {use} needs it)", "note", install_command(name))


def _folders() -> Iterator[Finding]:
    yield _folder("working folder", Path.cwd())
    try:
        yield _folder("cache", Cache.of_user().folder)
    except SalunError as error:
        yield Finding("cache", str(error), "fails", "correct it, or unset it")


def _folder(what: str, folder: Path) -> Finding:
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{folder}, {free / GIB:.1f} GiB free"
    if not os.access(place, os.W_OK):
        return Finding(what, text, "fails", f"{place} cannot be written: use another folder, or fix its permissions")
    low = free < 10 * GIB
    return Finding(what, text, "note" if low else "ok", "an erasure from SD 1.5 takes about 10 GiB" if low else "")


def _models() -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    from salun.checkpoints.locate import aliases

    for name, entry in aliases()["models"].items():
        if "repo" in entry:
            here = isinstance(try_to_load_from_cache(entry["repo"], "model_index.json"), str)
            yield Finding(f"model {name}", "on this machine" if here else "would be downloaded", "ok")


def _hub(network: bool) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    yield Finding("hub token", "there is one" if get_token() else "none (only gated models need one: hf auth login)")
    if constants.HF_HUB_OFFLINE or not network:
        yield Finding("hub", "offline by choice (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "not tried", "note")
        return
    host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    try:
        socket.create_connection((host, 443), timeout=3).close()
        yield Finding("hub", f"{host} answers")
    except OSError as error:
        advice = "models must be on this machine already, or given as folders; `shapes` always is"
        yield Finding("hub", f"{host} cannot be reached ({error})", "note", advice)


def _erasing() -> Iterator[Finding]:
    """A complete small erasure on the device that would be used."""
    from salun.diffusion.erase import erase
    from salun.diffusion.options import EraseOptions

    small = EraseOptions(steps=2, batch_size=2, forget_latents=2, retain_latents=2, eval_images=0)
    try:
        run = erase("shapes", "circle", small, cache=Cache(Path(), 0))
    except Exception as error:  # any error that a user would meet
        yield Finding("erasing", f"{type(error).__name__}: {error}", "fails", "try device cpu and dtype fp32")
        return
    yield Finding("erasing", f"two steps on the bundled model worked on {run.model.device}")
