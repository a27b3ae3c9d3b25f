"""Draws the images of the documentation from a real erasure of the bundled model.

    python -m tools.doc_images            erase, if build/doc_images has no run yet, and write the images
    python -m tools.doc_images --again    erase again, with the code of today
    python -m tools.doc_images --page     also erase by clicking in `salun ui` (needs the extra `browser` and Chromium)

docs/strength.png: the same prompts and seeds at delta strengths 0, 0.5 and 1. docs/mask.png: where the selected weights
are. docs/webui-page.png: the page of `salun ui` when the job is done. The run folder stays in build/doc_images/run, so
that only the first call takes minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import salun
from salun.diffusion.data.latents import item_seed, sample_images
from salun.files import write_bytes
from salun.report.image_grid import densities, png_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCS, RUN = ROOT / "docs", ROOT / "build" / "doc_images" / "run"
CONCEPT, ANCHOR = "circle", "square"
STRENGTHS = (0.0, 0.5, 1.0)
PROMPTS = (
    "one red circle, plain style",
    "one blue circle, dotted style",
    "one green circle, night style",
    "one red star, plain style",
    "one yellow ring, dotted style",
    "one pink heart, night style",
)
ERASED = 3  # the first prompts, which ask for the concept
TILE, GAP, LEFT, TOP, BOTTOM = 120, 8, 92, 30, 40
PAPER, INK, FAINT = (255, 255, 255), (31, 35, 40), (89, 99, 110)


def run_folder(again: bool) -> Path:
    """The folder of an erasure by the default recipe at seed 0, made if it is missing."""
    if again and RUN.exists():
        shutil.rmtree(RUN)
    if not (RUN / "delta.salun.safetensors").exists():
        salun.erase("shapes", salun.Concept(CONCEPT, anchor=ANCHOR), seed=0, run_dir=RUN)
    return RUN


def strengths(folder: Path) -> np.ndarray:
    """A row for each strength, a column for each prompt, every column from one seed."""
    model = salun.load("shapes", device="cpu")
    delta = salun.Delta.load(folder / "delta.salun.safetensors")
    seeds = [item_seed(0, "sample", i) for i in range(len(PROMPTS))]
    rows = []
    for strength in STRENGTHS:
        model.load(delta.apply(model.original(), strength))
        rows.append(sample_images(model, PROMPTS, seeds))
    return _sheet(np.stack(rows))


def _sheet(images: np.ndarray) -> np.ndarray:
    """images: uint8 (strengths, prompts, h, w, 3)."""
    rows, columns = images.shape[:2]
    split = 2 * GAP  # between prompts of the concept and others

    def x(column: int) -> int:
        return LEFT + column * (TILE + GAP) + (split if column >= ERASED else 0)

    page = Image.new("RGB", (x(columns) + GAP, TOP + rows * (TILE + GAP) + BOTTOM), PAPER)
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    draw.text((x(0), 6), f"prompts with “{CONCEPT}”, erased towards “{ANCHOR}”", INK, font)
    draw.text((x(ERASED), 6), "other prompts", INK, font)
    for r, strength in enumerate(STRENGTHS):
        top = TOP + r * (TILE + GAP)
        draw.text((GAP, top + TILE // 2 - 18), "strength", FAINT, small)
        draw.text((GAP, top + TILE // 2 - 3), f"{strength:g}", INK, ImageFont.load_default(size=22))
        for c in range(columns):
            tile = Image.fromarray(images[r, c]).resize((TILE, TILE), Image.Resampling.BICUBIC)
            page.paste(tile, (x(c), top))
    for c, prompt in enumerate(PROMPTS):
        for k, line in enumerate(prompt.split(", ")):
            draw.text((x(c), TOP + rows * (TILE + GAP) + 15 * k), line, FAINT, small)
    return np.asarray(page)


def mask_density(folder: Path) -> np.ndarray:
    """The fraction of selected weights of each block and kind of layer."""
    mask = salun.Mask.load(folder / "mask.safetensors")
    counts = mask.counts()
    return densities({name: (counts[name], int(np.prod(shape))) for name, shape in mask.shapes.items()})


def page() -> bytes:
    """The page of `salun ui` after an erasure by clicking, as PNG; its data folder is new each time."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    data = RUN.parent / "ui"
    shutil.rmtree(data, ignore_errors=True)
    command = [sys.executable, "-m", "salun", "ui", "--port", "0", "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server, sync_playwright() as started:
        assert server.stdout is not None
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1200, "height": 900})
        shown.goto(server.stdout.readline().split(" ")[0])
        shown.locator("#salun_preset input").first.click()
        shown.get_by_role("listbox").get_by_role("option", name=CONCEPT, exact=True).first.click()
        shown.locator("#salun_anchor").locator("input, textarea").first.fill(ANCHOR)
        shown.locator("#salun_erase").click()
        shown.locator(".salun-job[data-state=done]").first.wait_for(timeout=30 * 60_000)
        shown.wait_for_timeout(3000)  # images and charts
        shown.evaluate("window.scrollTo(0, 0)")
        image = shown.screenshot()
        browser.close()
        server.terminate()
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="erase again, though there is a run already")
    parser.add_argument("--page", action="store_true", help="also draw the page of `salun ui`")
    arguments = parser.parse_args()
    folder = run_folder(arguments.again)
    for name, image in (("strength", strengths(folder)), ("mask", mask_density(folder))):
        write_bytes(DOCS / f"{name}.png", png_bytes(image))
        print(DOCS / f"{name}.png")
    if arguments.page:
        write_bytes(DOCS / "webui-page.png", page())


if __name__ == "__main__":
    main()
