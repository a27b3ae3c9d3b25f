"""Writes the nodes' help pages, comfy_nodes/web/docs/<NodeId>.md, from what the nodes say of themselves.

python tools/comfy_help.py
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "comfy_nodes" / "web" / "docs"
MORE = {  # what a page says beyond the node's own words
    "SalUnConcept": "Wire one SalUn Concept into the next to forget several at once.",
    "SalUnOptions": "Numbers just below an option's range (0 or −1, their default) are taken from the model's recipe. "
    "Where ComfyUI was started with --lowvram or --novram, low_vram is on.",
    "SalUnTrainingData": "Sampled latents are kept in ComfyUI's user folder (`user/salun/cache`, or SALUN_CACHE; "
    "SALUN_CACHE_SIZE limits it), so that another run with the same model, prompts and seed samples nothing.",
    "SalUnErase": "Interrupt stops it within a step and leaves the graph as it was; queued again with the same inputs, "
    "it goes on where it stopped. The seed has no control after generate, since another seed trains again. A LoRA "
    "before this node is part of the model that is erased; patches that are no weights (FreeU, attention patches, "
    "hooks) do not count. Previews and pictures of sensitive concepts are blurred unless SalUn Options has "
    "show_sensitive on. On an out of memory error lower batch_size, or switch low_vram on in SalUn Options.",
    "SalUnSaveErasedCheckpoint": "EMA copies of the weights are left out, since they still hold the concept.",
    "SalUnSaveAsLora": "A low-rank file of a dense erasure loses much of it: look at the share that is told, and try "
    "the result. The checkpoint or the delta loses nothing.",
}


def page(identity: str, title: str, node: Any) -> str:
    """A help page as Markdown."""
    lines = [f"# {title}", "", node.DESCRIPTION, ""]
    if identity in MORE:
        lines += [MORE[identity], ""]
    lines += ["## Inputs", "", "| input | type | default | |", "|---|---|---|---|"]
    for name, (what, *rest) in [item for part in node.INPUT_TYPES().values() for item in part.items()]:
        kind = "choice" if isinstance(what, list) else what
        default = rest[0].get("default", "")
        lines.append(f"| `{name}` | {kind} | {default} | {rest[0]['tooltip']} |")
    lines += ["", "## Outputs", "", "| output | type | |", "|---|---|---|"]
    for name, kind, told in zip(node.RETURN_NAMES, node.RETURN_TYPES, node.OUTPUT_TOOLTIPS, strict=True):
        lines.append(f"| `{name}` | {kind} | {told} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Node id → its page. ComfyUI's lists of files are empty here."""
    with tempfile.TemporaryDirectory() as empty:
        host: Any = types.ModuleType("folder_paths")
        host.get_filename_list = lambda kind: []
        host.get_output_directory = host.get_input_directory = lambda: empty
        before = sys.modules.get("folder_paths")
        sys.modules["folder_paths"] = host
        try:
            from comfy_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

            return {
                name: page(name, NODE_DISPLAY_NAME_MAPPINGS[name], node) for name, node in NODE_CLASS_MAPPINGS.items()
            }
        finally:
            if before is None:
                del sys.modules["folder_paths"]
            else:
                sys.modules["folder_paths"] = before


def main() -> None:
    """Write every page."""
    sys.path.insert(0, str(ROOT))
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (TARGET / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
