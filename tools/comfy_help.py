"""Writes the nodes' help pages, comfy_nodes/web/docs/<NodeId>.md, from the nodes' descriptions, inputs and outputs.

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
MORE = {  # text of a page beyond the node's description
    "SalUnConcept": "To erase several concepts at once, connect one SalUn Concept to the next.",
    "SalUnOptions": "A number just below an option's range (0 or −1, the default) is automatic: the value of the "
    "model's recipe, or the model's own. low_vram is on if ComfyUI was started with --lowvram or --novram.",
    "SalUnTrainingData": "Samples are cached in ComfyUI's user folder (`user/salun/cache`, or SALUN_CACHE; "
    "SALUN_CACHE_SIZE limits it), so that a run with the same model, prompts and seed reuses them.",
    "SalUnErase": "Interrupt stops the training within one step and leaves the graph unchanged; queued again with the "
    "same inputs, the training resumes. The seed has no control after generate, since another seed trains again. "
    "Patches that are not weights (FreeU, attention patches, hooks) have no effect. Previews and images of sensitive "
    "concepts are blurred unless SalUn Options has show_sensitive on. On an out-of-memory error lower batch_size, or "
    "turn low_vram on in SalUn Options.",
    "SalUnSaveErasedCheckpoint": "EMA copies of the weights are not written, since they still contain the concept.",
    "SalUnSaveAsLora": "A low-rank file of a dense erasure loses much of it: check the fraction in the summary, and "
    "try the result. The checkpoint and the delta lose nothing.",
}


def page(identity: str, title: str, node: Any) -> str:
    """A help page as Markdown."""
    lines = [f"# {title}", "", node.DESCRIPTION, ""]
    if identity in MORE:
        lines += [MORE[identity], ""]
    lines += ["## Inputs", "", "| input | type | default | meaning |", "|---|---|---|---|"]
    for name, (what, *rest) in [item for part in node.INPUT_TYPES().values() for item in part.items()]:
        kind = "choice" if isinstance(what, list) else what
        default = rest[0].get("default", "")
        lines.append(f"| `{name}` | {kind} | {default} | {rest[0]['tooltip']} |")
    lines += ["", "## Outputs", "", "| output | type | meaning |", "|---|---|---|"]
    for name, kind, tooltip in zip(node.RETURN_NAMES, node.RETURN_TYPES, node.OUTPUT_TOOLTIPS, strict=True):
        lines.append(f"| `{name}` | {kind} | {tooltip} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Node id → its help page, with empty lists of files."""
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
