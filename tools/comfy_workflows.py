"""Writes example_workflows/*.json, in the form that ComfyUI's front end saves, from the graphs below.

    python tools/comfy_workflows.py

Widgets' values follow the nodes' INPUT_TYPES, so a changed input needs no editing by hand.
"""

from __future__ import annotations

import json
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
    "SaveImage": ({"images": "IMAGE"}, ["filename_prefix"], []),
}
Graph = dict[str, tuple[str, tuple[int, int], dict[str, Any]]]
"""name → (class, position, inputs): an input is a value, or ("@name", output) for a wire."""

SAMPLER = {
    "seed": 1,
    "control": "fixed",
    "steps": 20,
    "cfg": 7.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
    "denoise": 1.0,
}
LOADER: Graph = {"load": ("CheckpointLoaderSimple", (0, 0), {"ckpt_name": CHECKPOINT})}


def sampled(text: str, models: dict[str, tuple[str, int]], x: int, y: int, save: bool = False) -> Graph:
    """One prompt in several models, with the same noise. models: name → the wire it comes by."""
    graph: Graph = {
        "prompt": ("CLIPTextEncode", (x, y), {"clip": ("@load", 1), "text": text}),
        "negative": ("CLIPTextEncode", (x, y + 220), {"clip": ("@load", 1), "text": ""}),
        "latent": ("EmptyLatentImage", (x, y + 440), {"width": 512, "height": 512, "batch_size": 1}),
    }
    for i, (name, wire) in enumerate(models.items()):
        position = y + 460 * i
        wires = {
            "model": wire,
            "positive": ("@prompt", 0),
            "negative": ("@negative", 0),
            "latent_image": ("@latent", 0),
        }
        graph[f"sample {name}"] = ("KSampler", (x + 460, position), {**wires, **SAMPLER})
        graph[f"decode {name}"] = (
            "VAEDecode",
            (x + 820, position),
            {"samples": (f"@sample {name}", 0), "vae": ("@load", 2)},
        )
        images = {"images": (f"@decode {name}", 0)}
        if save:
            shown: tuple[str, dict[str, Any]] = ("SaveImage", {**images, "filename_prefix": f"salun/{name}"})
        else:
            shown = ("PreviewImage", images)
        graph[f"show {name}"] = (shown[0], (x + 1180, position), shown[1])
    return graph


CONCEPT: Graph = {"concept": ("SalUnConcept", (0, 180), {"preset": "van gogh", "retain_prompts": ""})}
PARTS = {"model": ("@load", 0), "clip": ("@load", 1)}
WHAT = {"concept": ("@concept", 0), "options": ("@options", 0)}
WORKFLOWS: dict[str, Graph] = {
    "erase_a_concept": {
        **LOADER,
        **CONCEPT,
        "erase": (
            "SalUnErase",
            (420, 0),
            {**PARTS, "vae": ("@load", 2), "concept": ("@concept", 0), "eval_images": 4},
        ),
        "grid": ("PreviewImage", (900, 0), {"images": ("@erase", 2)}),
        "save delta": ("SalUnSaveDelta", (900, 360), {"delta": ("@erase", 1), "filename_prefix": "erased"}),
        "save checkpoint": (
            "SalUnSaveErasedCheckpoint",
            (900, 520),
            {"delta": ("@erase", 1), "ckpt_name": CHECKPOINT, "filename_prefix": "erased"},
        ),
        **sampled("a village street, Van Gogh", {"before": ("@load", 0), "after": ("@erase", 0)}, 1360, 0),
    },
    "mask_and_data": {
        **LOADER,
        **CONCEPT,
        "options": ("SalUnOptions", (0, 420), {}),
        "data": ("SalUnTrainingData", (420, 0), {**PARTS, **WHAT}),
        "mask": ("SalUnSaliencyMask", (420, 360), {**PARTS, **WHAT, "data": ("@data", 0)}),
        "heatmap": ("SalUnMaskHeatmap", (860, 460), {"mask": ("@mask", 0)}),
        "show heatmap": ("PreviewImage", (1380, 660), {"images": ("@heatmap", 0)}),
        "save mask": ("SalUnSaveMask", (860, 600), {"mask": ("@mask", 0), "filename_prefix": "mask"}),
        "erase": (
            "SalUnErase",
            (860, 0),
            {
                **PARTS,
                **WHAT,
                "vae": ("@load", 2),
                "given_mask": ("@mask", 0),
                "given_data": ("@data", 0),
                "eval_images": 0,
            },
        ),
        "evaluate": (
            "SalUnEvaluate",
            (1380, 0),
            {
                "before": ("@load", 0),
                "after": ("@erase", 0),
                "clip": ("@load", 1),
                "vae": ("@load", 2),
                **WHAT,
                "n": 16,
            },
        ),
        "show images": ("PreviewImage", (1820, 0), {"images": ("@evaluate", 0)}),
        "save lora": (
            "SalUnSaveAsLora",
            (1380, 360),
            {"model": ("@load", 0), "delta": ("@erase", 1), "filename_prefix": "erased"},
        ),
    },
    "dial_a_delta": {
        **LOADER,
        "delta": ("SalUnLoadDelta", (0, 180), {"file": "erased_00001_.salun.safetensors"}),
        "apply": ("SalUnApplyDelta", (420, 0), {"model": ("@load", 0), "delta": ("@delta", 0), "strength": 0.5}),
        **sampled("a village street, Van Gogh", {"without": ("@load", 0), "half": ("@apply", 0)}, 860, 0, save=True),
    },
}


def described(kind: str) -> tuple[dict[str, str], list[tuple[str, Any]], list[str]]:
    """Of a node class: (inputs by wire, (widget, default) in order, outputs)."""
    if kind in STOCK:
        wires, widgets, outputs = STOCK[kind]
        return wires, [(name, None) for name in widgets], outputs
    from comfy_nodes import NODE_CLASS_MAPPINGS

    made: Any = NODE_CLASS_MAPPINGS[kind]
    wires, widgets = {}, []
    for part in made.INPUT_TYPES().values():
        for name, (what, *rest) in part.items():
            if isinstance(what, list) or what in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                default = rest[0].get("default", what[0] if isinstance(what, list) and what else None)
                widgets.append((name, default))
            else:
                wires[name] = what
    return wires, widgets, list(made.RETURN_TYPES)


def saved(graph: Graph) -> dict[str, Any]:
    """The graph as the front end saves it."""
    numbers = {name: i for i, name in enumerate(graph, 1)}
    nodes, links = {}, []
    for name, (kind, position, _) in graph.items():
        wires, _, outputs = described(kind)
        nodes[name] = {
            "id": numbers[name],
            "type": kind,
            "pos": list(position),
            "size": [400, 120] if kind.startswith("SalUn") else [315, 120],
            "flags": {},
            "order": numbers[name] - 1,
            "mode": 0,
            "inputs": [{"name": each, "type": what, "link": None} for each, what in wires.items()],
            "outputs": [{"name": what, "type": what, "links": []} for what in outputs],
            "properties": {"Node name for S&R": kind},
        }
    for name, (kind, _, given) in graph.items():
        wires, widgets, _ = described(kind)
        for slot, each in enumerate(nodes[name]["inputs"]):
            if each["name"] not in given:
                continue
            source, output = given[each["name"]]
            source = source.removeprefix("@")
            each["link"] = len(links) + 1
            nodes[source]["outputs"][output]["links"].append(each["link"])
            links.append([each["link"], numbers[source], output, numbers[name], slot, each["type"]])
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
