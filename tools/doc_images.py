"""Draws the images of the documentation from a real erasure of the bundled model.

    python -m tools.doc_images            erase, if build/doc_images has no run yet, and write the images
    python -m tools.doc_images --again    erase again, with the code of today
    python -m tools.doc_images --page     also erase by clicking in `salun ui` (needs the extra `browser` and Chromium)

docs/strength.png: the same prompts and seeds at delta strengths 0, 0.5 and 1. docs/mask.png: where the selected weights
are. docs/webui-page.png: the page of `salun ui` when the job is done and a prompt was tried. The runs stay in
build/doc_images/, so that only the first call takes minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
RELATIVE = """folder => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent;
    if (text.includes(folder)) walker.currentNode.textContent = text.replaceAll(folder, "");
  }
}"""  # paths in the page, without the folder of this clone
MINUTES = 60  # for the erasure, on a busy machine
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


def page(again: bool) -> bytes:
    """The page of `salun ui` after an erasure and a try by clicking, as PNG of 128 colors.

    again: erase again, though an earlier call has.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    home = RUN.parent / "page"
    if again:
        shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "salun", "ui", "--port", "0"]  # its data folder is home/salun-ui
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=home, env=environment)
    try:
        with sync_playwright() as started:
            assert server.stdout is not None
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            shown = browser.new_page(viewport={"width": 1280, "height": 900})
            shown.set_default_timeout(MINUTES * 60_000)
            shown.goto(server.stdout.readline().split(" ")[0])
            shown.locator(".salun-live > *").first.wait_for()
            _erase_and_try(shown)
            shown.evaluate(RELATIVE, f"{home}{os.sep}")
            shown.evaluate("window.scrollTo(0, 0)")
            image = shown.screenshot(full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    colors = Image.open(io.BytesIO(image)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    colors.save(small := io.BytesIO(), "PNG", optimize=True)
    return small.getvalue()


def _erase_and_try(shown: Any) -> None:
    """Erase by the default recipe and try a prompt, unless both were done. shown: the page in a browser."""
    done = ".salun-job[data-state=done]"
    if not shown.locator(f".salun-live {done}").count():
        shown.locator("#salun_preset input").first.click()
        shown.get_by_role("listbox").get_by_role("option", name=CONCEPT, exact=True).first.click()
        shown.locator("#salun_anchor").locator("input, textarea").first.fill(ANCHOR)
        shown.locator("#salun_erase").click()
        shown.locator(f".salun-live {done}").first.wait_for()
    if not shown.locator(f".salun-tries {done}").count():
        shown.locator(".salun-live").get_by_role("button", name="Try it").click()
        shown.locator(".salun-try").get_by_label("Prompt").fill(PROMPTS[0])
        shown.locator(".salun-try").get_by_role("button", name="Try it").click()
        shown.locator(f".salun-tries {done}").first.wait_for()
    shown.locator(".salun-plot svg").first.wait_for()
    shown.locator(".salun-live img:visible").first.wait_for()
    shown.locator(".salun-pair img:visible").nth(1).wait_for()


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
        write_bytes(DOCS / "webui-page.png", page(arguments.again))
        print(DOCS / "webui-page.png")


if __name__ == "__main__":
    main()
