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
SHOWN = "Hidden at first: *Show advanced inputs* on the node, or *Show Advanced* in its menu."
MORE = {  # text of a page beyond the node's description
    "SalUnOptions": "auto: the value depends on the model and on the other options, as its row says; a number in its "
    "place is used as it is. low_vram is on if ComfyUI was started with --lowvram or --novram.",
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
    from comfy_nodes.types import inputs_of

    lines = [f"# {title}", "", node.DESCRIPTION, ""]
    if identity in MORE:
        lines += [MORE[identity], ""]
    inputs = inputs_of(node)
    hidden = [name for name, (_, settings) in inputs.items() if settings.get("advanced")]
    lines += ["## Inputs", "", *table(inputs, [name for name in inputs if name not in hidden])]
    if hidden:
        lines += ["", "## Advanced inputs", "", SHOWN, ""]
        for title, names in grouped(hidden).items():
            lines += [*([f"### {title}", ""] if len(grouped(hidden)) > 2 else []), *table(inputs, names), ""]
        lines.pop()
    lines += ["", "## Outputs", "", "| output | type | meaning |", "|---|---|---|"]
    for name, kind, tooltip in zip(node.RETURN_NAMES, node.RETURN_TYPES, node.OUTPUT_TOOLTIPS, strict=True):
        lines.append(f"| `{name}` | {kind} | {tooltip} |")
    return "\n".join(lines) + "\n"


def table(inputs: dict[str, Any], names: list[str]) -> list[str]:
    """The rows of these inputs."""
    rows = ["| input | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        what, settings = inputs[name]
        kind = "choice" if isinstance(what, list) else what
        default = str(settings.get("default", "")).replace("|", "\\|")
        rows.append(f"| `{name}` | {kind} | {default} | {settings['tooltip']} |")
    return rows


def grouped(names: list[str]) -> dict[str, list[str]]:
    """Title → inputs, in the groups of the core's options; "Others" for those of no group."""
    from salun.diffusion.options import GROUPS

    titled = {title: [name for name in names if name in group] for title, group in GROUPS.items()}
    titled["Others"] = [name for name in names if not any(name in group for group in GROUPS.values())]
    return {title: each for title, each in titled.items() if each}


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
