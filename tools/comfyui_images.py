"""Takes screenshots of the example workflows in a real ComfyUI: docs/comfyui.jpg and example_workflows/*.jpg.

    python -m tools.comfyui_images COMFYUI_DIR [--python COMFYUI_PYTHON] [--only NAME]

Each workflow is loaded into ComfyUI's front end, run there, and drawn by Chromium (extra `browser`). The checkpoint is
the bundled model `shapes` in the shape of SD 1 (tools/shapes/comfyui.py), which draws 64×64 pixels, so the numbers that
fit it are set first; a template without SalUn Options gets such a node, collapsed. `erase_a_concept` runs first: the
others load the delta that it saves. The server's folder is build/comfyui_images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from salun.files import write_bytes
from tools import comfy_workflows
from tools.comfy_workflows import WORKFLOWS, Graph
from tools.shapes.comfyui import make

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "comfyui_images"
CHECKPOINT, DELTA = "shapes-sd1.safetensors", "erased_00001_.salun.safetensors"
PROMPT = "one red circle, plain style"
RETAINED = [
    f"one {color} {shape}, {style} style"
    for color, shape, style in zip(
        ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink") * 2,
        ("square", "triangle", "star", "heart", "cross", "ring", "crescent") * 3,
        ("plain", "sketch", "night", "striped", "dotted") * 4,
        strict=False,
    )
]
OPTIONS = {
    "resolution": "64",
    "sampling_steps": "8",
    "sampling_guidance": "3",
    "forget_latents": "32",
    "retain_latents": "96",
    "guidance": "3",
}
CHANGES: dict[str, dict[str, Any]] = {  # class → inputs
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "SalUnSaveErasedCheckpoint": {"ckpt_name": CHECKPOINT},
    "SalUnLoadDelta": {"file": DELTA},
    "SalUnConcept": {"preset": "custom", "text": "circle", "anchor": "square", "retain_prompts": "\n".join(RETAINED)},
    "SalUnOptions": OPTIONS,
    "SalUnErase": {"steps": "60", "lr": "4e-5", "batch_size": "8", "retain_weight": "3"},
    "SalUnSaliencyMask": {"batch_size": "8"},
    "SalUnEvaluate": {"n": 8},
    "SalUnAttack": {"n": 4, "images": 4},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 8, "cfg": 3.0},
}
SETTINGS = {
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.ShowApiPricing": False,
}
WIDE, SCALE = 1200, 2  # pixels of a screenshot as it is shown, and how many of the file are one of them
MARGIN = 24  # of the graph, in its own units
BOUNDS = """() => {
  const all = f => window.app.graph._nodes.map(f), high = n => n.flags.collapsed ? 0 : n.size[1]
  return [Math.min(...all(n => n.pos[0])), Math.min(...all(n => n.pos[1] - 30)),
          Math.max(...all(n => n.pos[0] + n.size[0])), Math.max(...all(n => n.pos[1] + high(n)))]
}"""
FOLD = """() => {  // newer front ends hide advanced inputs by themselves
  for (const node of window.app.graph._nodes.filter(n => n.type.startsWith("SalUn"))) {
    for (const widget of node.widgets ?? []) widget.advanced ||= widget.options?.advanced
    node.setSize([node.size[0], node.computeSize()[1]])
  }
}"""
SHOW = """([scale, x, y]) => {
  const canvas = window.app.canvas
  canvas.deselectAll?.()
  canvas.ds.scale = scale; canvas.ds.offset[0] = x; canvas.ds.offset[1] = y
  canvas.setDirty(true, true)
}"""
PLACE = "() => { const place = window.app.canvas.canvas.getBoundingClientRect(); return [place.x, place.y] }"


def workflow(name: str) -> dict[str, Any]:
    """An example as the front end saves it, with the checkpoint and the numbers of this script."""
    graph: Graph = dict(WORKFLOWS[name])
    if "options" not in graph:
        graph["options"] = ("SalUnOptions", 0, {})  # below the note
    for node, (kind, column, inputs) in graph.items():
        changed = {**inputs, **CHANGES.get(kind, {})}
        if "options" in comfy_workflows.described(kind)[0] and node != "options":
            changed["options"] = ("@options", 0)
        if kind == "CLIPTextEncode" and node == "prompt":
            changed["text"] = PROMPT
        graph[node] = (kind, column, changed)
    saved = comfy_workflows.saved(graph)
    if "options" not in WORKFLOWS[name]:
        (collapsed,) = (node for node in saved["nodes"] if node["type"] == "SalUnOptions")
        collapsed["flags"] = {"collapsed": True}
    return saved


@contextlib.contextmanager
def server(comfyui: Path, python: str) -> Iterator[str]:
    """The address of a ComfyUI with this repository as its only pack."""
    base = BUILD / "base"
    for folder in ("models/checkpoints", "custom_nodes", "input", "output", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for link, target in ((base / "custom_nodes/salun", ROOT), (base / "models/checkpoints" / CHECKPOINT, checkpoint())):
        link.unlink(missing_ok=True)  # an earlier one may lead to another checkout
        link.symlink_to(target)
    (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
    with (BUILD / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/system_stats", timeout=10).close()
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"ComfyUI did not start: see {BUILD / 'server.log'}")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def checkpoint() -> Path:
    """The checkpoint, made if it is missing."""
    path = BUILD / CHECKPOINT
    return path if path.exists() else make(path)


def run(page: Any, address: str, graph: dict[str, Any]) -> float:
    """Load a workflow into the front end and run it there; returns its seconds. Raises RuntimeError if it fails."""
    page.goto(address, wait_until="commit")
    page.wait_for_function("window.app && window.app.graph && window.app.canvas && window.app.api")
    page.wait_for_timeout(3000)  # the front end opens its own first workflow
    page.keyboard.press("Escape")
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)
    page.evaluate(FOLD)
    began = time.monotonic()
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    while True:
        page.wait_for_timeout(1000)
        queue = _get(address, "/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            break
    seconds = time.monotonic() - began
    history = [*_get(address, "/history").values()]
    if not history or history[-1]["status"]["status_str"] != "success":
        raise RuntimeError(json.dumps(history[-1]["status"] if history else "nothing ran", indent=1)[-3000:])
    page.wait_for_timeout(3000)  # images
    return seconds


def _get(address: str, path: str) -> Any:
    with urllib.request.urlopen(address + path, timeout=60) as answer:
        return json.loads(answer.read())


def screenshot(page: Any) -> Image.Image:
    """The graph that is open, WIDE pixels wide when shown."""
    x0, y0, x1, y1 = page.evaluate(BOUNDS)
    x0, y0, x1, y1 = x0 - MARGIN, y0 - MARGIN, x1 + MARGIN, y1 + MARGIN
    scale, side, top, bottom = WIDE / (x1 - x0), 90, 130, 90  # of the front end's own bars
    high = round((y1 - y0) * scale)
    x, y = page.evaluate(PLACE)  # of the canvas, next to the front end's bars
    page.set_viewport_size({"width": round(x) + WIDE + side + 20, "height": round(y) + high + top + bottom})
    page.wait_for_timeout(500)
    page.evaluate(SHOW, [scale, side / scale - x0, top / scale - y0])
    page.mouse.move(side + WIDE / 2, high + top + bottom / 2)  # where it points at nothing
    page.wait_for_timeout(2000)
    shown = page.screenshot(clip={"x": x + side, "y": y + top, "width": WIDE, "height": high})
    return Image.open(io.BytesIO(shown)).convert("RGB")


def take(comfyui: Path, python: str, names: list[str]) -> None:
    """Run these workflows and write their screenshots."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with server(comfyui, python) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000}, device_scale_factor=SCALE)
        page.set_default_timeout(600_000)
        for name in names:
            seconds = run(page, address, workflow(name))
            print(f"{name}: {seconds:.0f} s", flush=True)
            image = screenshot(page)
            shown = image.resize((WIDE, round(image.height / SCALE)), Image.Resampling.LANCZOS)
            write_bytes(ROOT / "example_workflows" / f"{name}.jpg", _bytes(shown, "JPEG", quality=85, optimize=True))
            if name == "erase_a_concept":
                shutil.copy(ROOT / "example_workflows" / f"{name}.jpg", ROOT / "docs" / "comfyui.jpg")
        browser.close()


def _bytes(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def main() -> None:
    """Read the command line and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--python", default=sys.executable, help="the Python that has ComfyUI's requirements")
    parser.add_argument("--only", choices=WORKFLOWS, help="the screenshot of one workflow; the delta must be there")
    arguments = parser.parse_args()
    host: Any = types.ModuleType("folder_paths")  # nodes list files; here there are none yet
    host.get_filename_list = lambda kind: []
    host.get_output_directory = host.get_input_directory = lambda: str(BUILD / "empty")
    sys.modules["folder_paths"] = host
    (BUILD / "empty").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with the server
    take(arguments.comfyui, arguments.python, [arguments.only] if arguments.only else list(WORKFLOWS))


if __name__ == "__main__":
    main()
