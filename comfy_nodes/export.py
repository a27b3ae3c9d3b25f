"""Erasures as files for other loaders: checkpoints and LoRAs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from salun.checkpoints.outputs import DIFF, LORA
from salun.checkpoints.safetensors_io import read_header
from salun.delta import commands as deltas
from salun.delta.delta import Delta
from salun.delta.provenance import PREFIX
from salun.delta.stacking import AppliedDeltas, BaseMismatch
from salun.delta.stock_formats import stock_notes, write_stock
from salun.errors import ConfigError, ModelError
from salun.files import temporary_folder
from salun.progress import Stage, StageCost

from .delta import delta_on_model
from .execution import computes
from .families import family_of, schedule_keys
from .inputs import AUTO, filename_prefix, wires
from .model import free_gpu
from .patches import has_delta, has_only_delta
from .paths import SAFETENSORS, checkpoint_names, checkpoint_path, output_path, validation
from .progress import ComfyProgress
from .types import Node

LOW_RANK = "low rank"
HIGHEST_RANK = 4096
UNCONNECTED = "unconnected"  # default of an input in VALIDATE_INPUTS, where a connected one is None
CONNECT = "Connect model, clip and vae, and ComfyUI's own saver writes them"
PART = "For graphs with other patches, or a source that is not a .safetensors file."


class SalUnSaveErasedCheckpoint(Node):
    """Saves the erased model as a checkpoint."""

    OUTPUT_NODE = True
    TITLE = "SalUn Save Erased Checkpoint"
    RETURN_TYPES, RETURN_NAMES = ("STRING", "STRING"), ("ckpt_name", "summary")
    OUTPUT_TOOLTIPS = ("Name of the file in ComfyUI's list of checkpoints.", "How the file was written, and notes.")
    DESCRIPTION = (
        "Saves the erased checkpoint to output/checkpoints. The source file is copied and only the changed weights are "
        "replaced; all else stays byte-identical. For a graph with other patches (a LoRA, a second erasure) connect "
        "model, clip and vae: ComfyUI's own saver then writes them with all patches."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **wires("delta"),
                "ckpt_name": (
                    [AUTO, *checkpoint_names()],
                    {
                        "default": AUTO,
                        "tooltip": "Source: the .safetensors file that was loaded. It is copied, never changed. auto: "
                        "that of the checkpoint loader that the delta comes from.",
                    },
                ),
                **filename_prefix("erased"),
            },
            "optional": {
                "model": ("MODEL", {"tooltip": f"The erased model. {PART}"}),
                "clip": ("CLIP", {"tooltip": f"Its text encoder. {PART}"}),
                "vae": ("VAE", {"tooltip": f"Its VAE. {PART}"}),
            },
            "hidden": {"graph": "PROMPT", "node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        filename_prefix: str | None = None,
        ckpt_name: str | None = None,
        model: Any = UNCONNECTED,
        clip: Any = UNCONNECTED,
        vae: Any = UNCONNECTED,
    ) -> bool | str:
        def check() -> None:
            connected = _all_connected([part is not UNCONNECTED for part in (model, clip, vae)])
            if ckpt_name not in (None, AUTO) and (source := _source_path(ckpt_name, connected)).suffix == SAFETENSORS:
                read_header(source)  # a damaged file is rejected now, not after the training

        return validation(filename_prefix, "checkpoints", check)

    @computes
    def run(
        self,
        delta: Delta,
        ckpt_name: str,
        filename_prefix: str,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
        graph: Mapping[str, Any] | None = None,
        node: str = "",
    ) -> dict[str, Any]:
        if ckpt_name == AUTO:
            ckpt_name = loaded_checkpoint(graph or {}, node)
        path, name = output_path(filename_prefix, "checkpoints", SAFETENSORS)
        connected = _all_connected([part is not None for part in (model, clip, vae)])
        source, reason = _source_path(ckpt_name, connected), ""
        if source.suffix != SAFETENSORS:
            reason = f"{ckpt_name} is not a {SAFETENSORS} file"
        elif connected and not has_only_delta(model, delta):
            reason = "the connected MODEL has other patches"
        elif connected and clip.patcher.patches:
            reason = "the connected CLIP has patches"
        notes: list[str] = []
        if not reason:
            bar = ComfyProgress([StageCost(Stage.WRITING, len(delta.names))])
            try:
                notes = deltas.stack(str(source), [delta], str(path), progress=bar)["notes"]
            except BaseMismatch as error:
                if not connected:
                    raise _not_the_base(ckpt_name, error) from error
                reason = f"{ckpt_name} is not the erasure's base"
        if reason:
            _save_by_comfyui(path, model, clip, vae, delta)
            summary = f"{name}: written by ComfyUI's own saver, since {reason}"
        else:
            copied = f"{name}: {ckpt_name} with {len(delta.names)} tensors changed, with the CLIP and VAE of that file"
            summary = "; ".join([copied, *notes])
        return {"ui": {"text": [summary]}, "result": (name, summary)}


class SalUnSaveAsLora(Node):
    """Saves the erasure for stock LoRA loaders."""

    OUTPUT_NODE = True
    TITLE = "SalUn Save as LoRA"
    RETURN_TYPES, RETURN_NAMES = ("STRING", "STRING"), ("lora_name", "summary")
    OUTPUT_TOOLTIPS = (
        "Name of the file in ComfyUI's list of LoRAs.",
        "Fraction of the erasure that the file contains.",
    )
    DESCRIPTION = (
        "Saves the erasure to output/loras for any LoRA loader (ComfyUI, A1111, Forge): as a low-rank approximation, "
        "or every difference. Anyone who has the file can undo the erasure."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = (
            "Content: a low-rank approximation, which is small and loses a part, or every difference, which is exact."
        )
        energy = "Fraction of each layer's squared difference that a low-rank file must contain."
        rank = f"Rank of every layer of a low-rank file. {AUTO}: chosen by energy, layer by layer."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The original model, before the erasure."}),
                **wires("delta"),
                "kind": ([LOW_RANK, "every difference"], {"default": LOW_RANK, "tooltip": kind}),
                "energy": ("FLOAT", {"default": 0.9, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": energy}),
                "rank": ("STRING", {"default": AUTO, "tooltip": rank, "advanced": True}),
                **filename_prefix("erased"),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None, rank: str | None = None) -> bool | str:
        return validation(filename_prefix, "loras", lambda: _rank(AUTO if rank is None else rank))

    @computes
    def run(
        self, model: Any, delta: Delta, kind: str, energy: float, rank: str, filename_prefix: str
    ) -> dict[str, Any]:
        low_rank, n, ranks = kind == LOW_RANK, len(delta.names), _rank(rank)
        path, name = output_path(filename_prefix, "loras", LORA if low_rank else DIFF)
        family_of(model)
        applied = delta_on_model(model, delta)
        size = ({"rank": ranks} if ranks else {"energy": energy}) if low_rank else {}
        bar = ComfyProgress([StageCost(Stage.COMPARING, n), StageCost(Stage.WRITING, 0 if low_rank else n)])
        base = applied.base_tensors
        report = write_stock(path, base, AppliedDeltas(base, applied.layers), stock_notes(delta), progress=bar, **size)
        content = f"{report.total.fraction:.1%} of the squared difference" if report else "every difference"
        summary = f"{name}: {content}"
        return {"ui": {"text": [summary]}, "result": (name, summary)}


def _rank(text: str) -> int | None:
    """The rank that a text names, None for `auto`. Raises ConfigError for any other text."""
    if str(text).strip().lower() == AUTO:
        return None
    try:
        rank = int(text)
    except ValueError:
        rank = 0
    if not 1 <= rank <= HIGHEST_RANK:
        raise ConfigError(
            f"is {str(text)[:40]!r}, but must be auto or an integer from 1 to {HIGHEST_RANK}", option="rank"
        )
    return rank


def _all_connected(connected: list[bool]) -> bool:
    """Whether model, clip and vae are connected. Raises ConfigError if only some are: a checkpoint needs all three."""
    if any(connected) and not all(connected):
        raise ConfigError(
            "only some of model, clip and vae are connected", advice="Connect model, clip and vae, or none of them"
        )
    return all(connected)


def loaded_checkpoint(graph: Mapping[str, Any], node: str) -> str:
    """The `ckpt_name` of the loader that a node's wires lead back to.

    Args:
        graph: Node → its "inputs", among them wires [node, output], as ComfyUI executes it.

    Raises:
        ConfigError: There is none, or several.
    """
    names, seen, left = list[str](), set[str](), [node]
    while left:
        inputs = graph.get(at := left.pop(), {}).get("inputs", {})
        if at in seen:
            continue
        seen.add(at)
        if at != node and isinstance(inputs.get("ckpt_name"), str):
            names.append(inputs["ckpt_name"])
        left += [str(value[0]) for value in inputs.values() if isinstance(value, list) and len(value) == 2]
    if len(set(names)) != 1:
        among = f"{' and '.join(sorted(set(names)))} are" if names else "no checkpoint is"
        raise ConfigError(
            f"is auto, but {among} loaded in the graph before this node",
            option="ckpt_name",
            advice="Choose the checkpoint that the erasure was made from",
        )
    return names[0]


def _source_path(name: str, connected: bool) -> Path:
    """The checkpoint to copy; with model, clip and vae connected it may have another format. Raises ConfigError."""
    import folder_paths

    path = folder_paths.get_full_path("checkpoints", name)
    if path is None or name.endswith(SAFETENSORS):
        return checkpoint_path(name)
    if not connected:
        raise ConfigError(f"{name} is not a {SAFETENSORS} file, so it cannot be patched", advice=CONNECT)
    return Path(path)


def _not_the_base(name: str, error: BaseMismatch) -> ModelError:
    return ModelError(
        f"{name} is not the erasure's base (its hash is {error.actual[:12]}…, not {error.expected[:12]}…)",
        advice="Choose the checkpoint that was loaded. If the graph has other patches, such as a LoRA before SalUn "
        "Erase, or ComfyUI stores the model in another dtype, connect model, clip and vae",
    )


def _save_by_comfyui(path: Path, model: Any, clip: Any, vae: Any, delta: Delta) -> None:
    """Have ComfyUI write the graph's model. Raises ModelError if the model is not erased."""
    from comfy.sd import save_checkpoint

    if not has_delta(model, delta):
        raise ModelError(
            "the connected MODEL does not contain this erasure at strength 1, or was merged after it",
            advice="Connect the MODEL of SalUn Erase",
        )
    metadata = {key: value for key, value in delta.metadata.items() if key.startswith(PREFIX)}
    try:
        with torch.inference_mode(), temporary_folder(path) as folder:
            part = folder / path.name
            save_checkpoint(str(part), model, clip, vae, metadata=metadata, extra_keys=schedule_keys(model))
            os.replace(part, path)
    finally:
        free_gpu()
