"""Writes example_workflows/*.json, in the form that ComfyUI's front end saves, from the graphs below.

    python tools/comfy_workflows.py

Widgets' values follow the nodes' INPUT_TYPES, so a changed input needs no editing by hand. Nodes stand in the columns
of two rows; the numbers in the notes are those of docs/performance.md.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "example_workflows"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
# stock nodes: (inputs by wire, widgets in order, outputs)
STOCK: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "CheckpointLoaderSimple": ({}, ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["text"], ["CONDITIONING"]),
    "EmptyLatentImage": ({}, ["width", "height", "batch_size"], ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["seed", "control", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, [], ["IMAGE"]),
    "PreviewImage": ({"images": "IMAGE"}, [], []),
    "PreviewAny": ({"source": "*"}, [], []),
    "MarkdownNote": ({}, ["text"], []),
}
Graph = dict[str, tuple[str, int, dict[str, Any]]]
"""name → (class, column, inputs): an input is a value, or ("@name", output) for a wire. A stock node shows its name.
Columns from SECOND_ROW on stand below the others, except for the note's."""
SECOND_ROW = 10
WIDTHS = {"MarkdownNote": 400, "PreviewAny": 360, "PreviewImage": 360, "KSampler": 320, "CLIPTextEncode": 320}
HEIGHTS = {"MarkdownNote": 520, "PreviewAny": 190, "PreviewImage": 320, "CLIPTextEncode": 120}
WIDTH, TITLE, SLOT, WIDGET, TEXT, GAP = 320, 30, 20, 24, 70, 60  # pixels

SAMPLER = {
    "seed": 1,
    "control": "fixed",
    "steps": 20,
    "cfg": 7.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
    "denoise": 1.0,
}
PROMPT = "a village street, Van Gogh"


SD15, SDXL = "SD 1.5, 512²", "SDXL, 1024²"  # rows of docs/performance.md


def measured() -> str:
    """Time and memory of a training step, as docs/performance.md has them."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

    def row(label: str) -> tuple[str, str]:
        match = re.search(rf"^\| {re.escape(label)} \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"docs/performance.md has no row {label!r}")
        return match[1], match[2]

    def simulated(model: str, options: str, column: int) -> str:
        match = re.search(rf"^\| {re.escape(model)} \| {options} \|((?: [\d.]+ \([^|]*\|)+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"docs/performance.md simulates no {model!r}")
        return match[1].split("|")[column].split()[0]

    def of(model: str, column: int) -> str:
        low, least = (simulated(model, "`--low-vram`", each) for each in (column, 0))
        plain = simulated(model, "plain", column)
        return f"{low} GiB of VRAM; {least} with `batch_size` 1 too; {plain} with `low_vram` off"

    (slow, much), (fast, less) = row("salun, fp32"), row("salun, bf16, `--low-vram`")
    return (
        "### Time and VRAM\n\n"
        "*SalUn Options* has `low_vram` on: the fp32 copies and Adam's moments of the selected weights are in CPU "
        "memory, 5 GB for SD 1.5 and 15 GB for SDXL. Turn it off on a large GPU. Simulated, for the command line in "
        "bf16, to which libraries add about 1 GiB:\n\n"
        f"- SD 1.5 at 512², batch size 8: {of(SD15, 2)}.\n"
        f"- SDXL at 1024², batch size 4: {of(SDXL, 1)}.\n\n"
        f"Measured on two CPU cores, at 64×64 pixels and batch size 1: a step of SD 1.5 takes {slow} s and {much} GiB "
        f"in fp32, {fast} s and {less} GiB with `low_vram` in bf16; whole runs need more (docs/checkpoints.md in the "
        "folder of salun). **Not measured**: time and VRAM on a GPU."
    )


def note(title: str, *steps: str, cost: str | None = None) -> tuple[str, int, dict[str, Any]]:
    """The note of a template. cost: its time and VRAM; None for that of training."""
    lines = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    end = measured() if cost is None else f"### Time and VRAM\n\n{cost}"
    return "MarkdownNote", 0, {"text": f"## {title}\n\n{lines}\n\n{end}"}


def sampled(models: dict[str, tuple[str, int]], column: int) -> Graph:
    """One prompt in several models, with the same noise, each in a column of its own after that of the prompt.

    models: name → the wire it comes by.
    """
    graph: Graph = {
        "prompt": ("CLIPTextEncode", column, {"clip": ("@load", 1), "text": PROMPT}),
        "negative prompt": ("CLIPTextEncode", column, {"clip": ("@load", 1), "text": ""}),
        "latent": ("EmptyLatentImage", column, {"width": 512, "height": 512, "batch_size": 1}),
    }
    for at, (name, wire) in enumerate(models.items(), column + 1):
        wires = {
            "model": wire,
            "positive": ("@prompt", 0),
            "negative": ("@negative prompt", 0),
            "latent_image": ("@latent", 0),
        }
        decode = {"samples": (f"@sample {name}", 0), "vae": ("@load", 2)}
        graph[f"sample {name}"] = ("KSampler", at, {**wires, **SAMPLER})
        graph[f"decode {name}"] = ("VAEDecode", at, decode)
        graph[name] = ("PreviewImage", at, {"images": (f"@decode {name}", 0)})
    return graph


LOADER: Graph = {"load": ("CheckpointLoaderSimple", 1, {"ckpt_name": CHECKPOINT})}
CONCEPT: Graph = {"concept": ("SalUnConcept", 1, {"preset": "van gogh"})}
PARTS = {"model": ("@load", 0), "clip": ("@load", 1)}
BOTH = {"before": ("@load", 0), "clip": ("@load", 1), "vae": ("@load", 2)}
WHAT = {"concept": ("@concept", 0), "options": ("@options", 0)}
DELTA: Graph = {"delta": ("SalUnLoadDelta", 2, {"file": "erased_00001_.salun.safetensors"})}
WORKFLOWS: dict[str, Graph] = {
    "erase_a_concept": {
        "note": note(
            "Erase a concept",
            "Choose the checkpoint (SD 1.x, SD 2.x or SDXL) in *Load Checkpoint*.",
            "Choose a preset in *SalUn Concept*, or `custom` and a text.",
            "For SDXL set both sides of the latent to 1024, for SD 2.1 at 768 pixels to 768.",
            "Run. The verdict says whether the concept is erased and the rest intact. The images of a prompt of your "
            "own, before and after, are at the bottom.",
            "The erased checkpoint is in `output/checkpoints`, the delta, which undoes the erasure bit-exactly, in "
            "`output/salun`.",
        ),
        **LOADER,
        **CONCEPT,
        "options": ("SalUnOptions", 0, {"low_vram": True}),
        "erase": ("SalUnErase", 2, {**PARTS, **WHAT, "vae": ("@load", 2)}),
        "verdict": ("PreviewAny", 3, {"source": ("@erase", 4)}),
        "before and after": ("PreviewImage", 3, {"images": ("@erase", 2)}),
        "save delta": ("SalUnSaveDelta", 4, {"delta": ("@erase", 1), "filename_prefix": "erased"}),
        "save checkpoint": ("SalUnSaveErasedCheckpoint", 4, {"delta": ("@erase", 1), "ckpt_name": "auto"}),
        "saved": ("PreviewAny", 4, {"source": ("@save checkpoint", 1)}),
        **sampled({"before": ("@load", 0), "after": ("@erase", 0)}, 11),
    },
    "mask_and_data": {
        "note": note(
            "Mask and training set",
            "Choose the checkpoint in *Load Checkpoint* and the concept in *SalUn Concept*.",
            "*SalUn Options* is connected to every node, so that they agree.",
            "*SalUn Training Data* samples the training set from the model; connect images to it to use your own.",
            "*SalUn Saliency Mask* selects the weights that matter most to the concept; the heatmap shows in which "
            "layers they are.",
            "*SalUn Evaluate* compares the models on more images than *SalUn Erase* does.",
            "A low-rank LoRA loses a part of the erasure; its summary says how much is left.",
        ),
        **LOADER,
        **CONCEPT,
        "options": ("SalUnOptions", 2, {"low_vram": True}),
        "data": ("SalUnTrainingData", 3, {**PARTS, **WHAT}),
        "mask": ("SalUnSaliencyMask", 3, {**PARTS, **WHAT, "data": ("@data", 0)}),
        "save mask": ("SalUnSaveMask", 11, {"mask": ("@mask", 0), "filename_prefix": "mask"}),
        "heatmap": ("SalUnMaskHeatmap", 11, {"mask": ("@mask", 0)}),
        "erase": (
            "SalUnErase",
            4,
            {**PARTS, **WHAT, "vae": ("@load", 2), "mask": ("@mask", 0), "data": ("@data", 0), "eval_images": 0},
        ),
        "mask summary": ("PreviewAny", 11, {"source": ("@mask", 1)}),
        "mask heatmap": ("PreviewImage", 12, {"images": ("@heatmap", 0)}),
        "evaluate": ("SalUnEvaluate", 13, {**BOTH, **WHAT, "after": ("@erase", 0), "n": 16}),
        "save lora": ("SalUnSaveAsLora", 12, {"model": ("@load", 0), "delta": ("@erase", 1)}),
        "verdict": ("PreviewAny", 14, {"source": ("@evaluate", 2)}),
        "before and after": ("PreviewImage", 14, {"images": ("@evaluate", 0)}),
        "lora summary": ("PreviewAny", 14, {"source": ("@save lora", 1)}),
    },
    "apply_a_delta": {
        "note": note(
            "Apply a delta",
            "Choose the checkpoint that the delta was made from in *Load Checkpoint*, and the delta in *SalUn Load "
            "Delta*.",
            "Strength 0 is the original, 1 the erased model; below 0 the concept becomes stronger.",
            "Several *SalUn Apply Delta* can follow each other, in any order; so can LoRAs.",
            "There is no verdict here, since three images of one prompt are too few for one. *Evaluate and attack* "
            "gives that of a delta.",
            cost="Three images are sampled: as much VRAM as your own sampling takes, and three times its time.",
        ),
        **LOADER,
        **DELTA,
        **{
            f"apply {strength}": (
                "SalUnApplyDelta",
                column,
                {"model": ("@load", 0), "delta": ("@delta", 0), "strength": strength},
            )
            for column, strength in ((3, 0.5), (4, 1.0))
        },
        **sampled({"original": ("@load", 0), "strength 0.5": ("@apply 0.5", 0), "strength 1": ("@apply 1.0", 0)}, 11),
    },
    "evaluate_and_attack": {
        "note": note(
            "Evaluate and attack",
            "Choose the checkpoint that the delta was made from, the delta, and the concept that it erases.",
            "*SalUn Evaluate* compares both models on held-out prompts at equal seeds.",
            "*SalUn Attack* tries to bring the concept back, by the attacks that are named in it, one per line; `auto` "
            "makes all of them, of which relearn trains. Its page is in `output/salun`.",
            cost="Somewhat more VRAM than your own sampling: several images are sampled at once. The attack *relearn* "
            "trains all weights, which takes more than an erasure: connect *SalUn Options* with `low_vram` for it. "
            "*SalUn Evaluate* samples `n` images of the concept's prompts and `n` of others, with both models; "
            "*SalUn Attack* samples more for each attack. The nodes' bars count the steps.",
        ),
        **LOADER,
        **DELTA,
        **CONCEPT,
        "apply": ("SalUnApplyDelta", 2, {"model": ("@load", 0), "delta": ("@delta", 0), "strength": 1.0}),
        "evaluate": ("SalUnEvaluate", 3, {**BOTH, "concept": ("@concept", 0), "after": ("@apply", 0)}),
        "attack": (
            "SalUnAttack",
            13,
            {
                **{**BOTH, "concept": ("@concept", 0), "after": ("@apply", 0)},
                "attack": "seeds\nnoise\ncompletion\nquantize",
            },
        ),
        "verdict": ("PreviewAny", 4, {"source": ("@evaluate", 2)}),
        "before and after": ("PreviewImage", 4, {"images": ("@evaluate", 0)}),
        "verdict of attacks": ("PreviewAny", 14, {"source": ("@attack", 2)}),
        "images of attacks": ("PreviewImage", 14, {"images": ("@attack", 0)}),
    },
}


def described(kind: str) -> tuple[dict[str, str], list[tuple[str, Any]], list[tuple[str, str]]]:
    """Of a node class: (inputs by wire, (widget, default) in order, outputs as (name, type))."""
    if kind in STOCK:
        wires, widgets, outputs = STOCK[kind]
        return wires, [(name, None) for name in widgets], [(what, what) for what in outputs]
    made = _node(kind)
    wires, widgets = {}, []
    for name, (what, settings) in _inputs(made).items():
        if isinstance(what, list) or what in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            default = settings.get("default", what[0] if isinstance(what, list) and what else None)
            widgets.append((name, default))
        else:
            wires[name] = what
    return wires, widgets, list(zip(made.RETURN_NAMES, made.RETURN_TYPES, strict=True))


def _node(kind: str) -> Any:
    from comfy_nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS[kind]


def _inputs(made: Any) -> dict[str, Any]:
    from comfy_nodes.types import inputs_of

    return inputs_of(made)


def size(kind: str) -> tuple[int, int]:
    """Width and height of a node in pixels, without its title: with room for hidden inputs, as the front end has it."""
    wires, widgets, outputs = described(kind)
    rows = SLOT * max(len(wires), len(outputs))
    if kind in HEIGHTS:
        return WIDTHS[kind], HEIGHTS[kind]
    if kind in STOCK:
        return WIDTHS.get(kind, 300), 10 + rows + WIDGET * len(widgets)
    shown = [settings for name, (_, settings) in _inputs(_node(kind)).items() if name not in wires]
    return WIDTH, 10 + rows + sum(TEXT if settings.get("multiline") else WIDGET for settings in shown)


def placed(graph: Graph) -> dict[str, tuple[int, int]]:
    """name → position: columns side by side, each filled from the top; the second row begins below the first."""
    widths: dict[int, int] = {}
    for kind, column, _ in graph.values():
        at = column % SECOND_ROW
        widths[at] = max(widths.get(at, 0), size(kind)[0])
    left = {at: sum(width + GAP for other, width in widths.items() if other < at) for at in widths}
    bottom: dict[int, int] = {}
    positions = {}
    for name, (kind, column, _) in sorted(graph.items(), key=lambda item: item[1][1] >= SECOND_ROW):
        if column >= SECOND_ROW and column not in bottom:
            bottom[column] = max(y for other, y in bottom.items() if 0 < other < SECOND_ROW) + GAP // 2
        y = bottom.get(column, 0)
        positions[name] = (left[column % SECOND_ROW], y)
        bottom[column] = y + size(kind)[1] + TITLE + GAP // 2
    return positions


def saved(graph: Graph) -> dict[str, Any]:
    """The graph as the front end saves it."""
    numbers = {name: i for i, name in enumerate(graph, 1)}
    positions = placed(graph)
    nodes, links = {}, []
    for name, (kind, _, _) in graph.items():
        wires, _, outputs = described(kind)
        nodes[name] = {
            "id": numbers[name],
            "type": kind,
            "pos": list(positions[name]),
            "size": list(size(kind)),
            "flags": {},
            "order": numbers[name] - 1,
            "mode": 0,
            "inputs": [{"name": each, "type": what, "link": None} for each, what in wires.items()],
            "outputs": [{"name": each, "type": what, "links": []} for each, what in outputs],
            "properties": {"Node name for S&R": kind},
        }
        if kind in STOCK and name != "load":
            nodes[name]["title"] = name[0].upper() + name[1:]
    for name, (kind, _, given) in graph.items():
        wires, widgets, _ = described(kind)
        for slot, each in enumerate(nodes[name]["inputs"]):
            if each["name"] not in given:
                continue
            source, output = given[each["name"]]
            source = source.removeprefix("@")
            each["link"] = len(links) + 1
            nodes[source]["outputs"][output]["links"].append(each["link"])
            what = nodes[source]["outputs"][output]["type"]
            links.append([each["link"], numbers[source], output, numbers[name], slot, what])
        nodes[name]["widgets_values"] = [given.get(each, default) for each, default in widgets]
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def main() -> None:
    """Write every example."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as empty:
        host: Any = types.ModuleType("folder_paths")  # the lists of files are empty where no host is
        host.get_filename_list = lambda kind: []
        host.get_output_directory = host.get_input_directory = lambda: empty
        sys.modules["folder_paths"] = host
        for name, graph in WORKFLOWS.items():
            text = json.dumps(saved(graph), indent=1, ensure_ascii=False) + "\n"
            (TARGET / f"{name}.json").write_text(text, encoding="utf-8")
            print(TARGET / f"{name}.json")


if __name__ == "__main__":
    main()
