"""Erasures as deltas: applied in the graph, kept as files, written into checkpoints and for stock loaders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from salun.checkpoints.outputs import DELTA as DELTA_ENDING
from salun.checkpoints.outputs import DIFF, LORA
from salun.checkpoints.safetensors_io import read_header
from salun.delta import commands as deltas
from salun.delta import stacking
from salun.delta.delta import Delta
from salun.delta.provenance import PREFIX
from salun.delta.stacking import STRENGTHS, AppliedDeltas, BaseMismatch
from salun.delta.stock_formats import stock_notes, write_stock
from salun.errors import ConfigError, ModelError
from salun.files import temporary_folder

from .inputs import in_inputs_names, prefix, wires
from .kinds import DELTA, Node
from .model import family_of, release, schedule_keys
from .places import chosen, output_path, saved, state_of, validated
from .progress import ComfyProgress
from .weights import Weights, holds, holds_alone, patched
from .work import computes

ITSELF = "(the model itself)"
ENDING = ".safetensors"
UNWIRED = "unwired"  # of an optional input, when ComfyUI asks whether the inputs are valid; a wired one is None then
STRENGTH = {"default": 1.0, "min": STRENGTHS[0], "max": STRENGTHS[1], "step": 0.05}


class SalUnApplyDelta(Node):
    """A delta at work on a MODEL."""

    RETURN_TYPES, RETURN_NAMES = ("MODEL",), ("model",)
    OUTPUT_TOOLTIPS = ("The model with the differences as patches; several can follow each other.",)
    DESCRIPTION = (
        "Adds an erasure to a model in the graph: 1 is the erased model, 0 the model as it was, below 0 more of the "
        "concept. Deltas of one checkpoint can follow each other in any order and at any strength, and so can LoRAs. A "
        "delta of a model with patches (a LoRA, an earlier erasure) needs these as they were."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the delta was made from, or a copy in another dtype."}),
                **wires("delta"),
                "strength": ("FLOAT", {**STRENGTH, "tooltip": "How much of the difference is added."}),
            },
            "optional": {
                "base_checkpoint": (
                    [ITSELF, *checkpoints()],
                    {
                        "default": ITSELF,
                        "advanced": True,
                        "tooltip": "Where the model is a fine-tune of the delta's base, or kept in fp8 by ComfyUI: the "
                        "base's own file. Then the differences are added.",
                    },
                )
            },
        }

    @computes
    def run(self, model: Any, delta: Delta, strength: float, base_checkpoint: str = ITSELF) -> tuple[Any]:
        family_of(model)
        if base_checkpoint != ITSELF:
            other = deltas.open_model(str(checkpoint(base_checkpoint)))
            made = stacking.stack(Weights(model, patched=False), [(delta, 1.0)], fine_tune_of_base=other)
            return (patched(model, delta, made.base_tensors, strength),)
        return (patched(model, delta, on_model(model, delta).base_tensors, strength),)


class SalUnLoadDelta(Node):
    """A delta file."""

    RETURN_TYPES, RETURN_NAMES = (DELTA,), ("delta",)
    OUTPUT_TOOLTIPS = ("For SalUn Apply Delta and the savers.",)
    DESCRIPTION = "A *.salun.safetensors file of SalUn Save Delta or the command line, from output/salun or input."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (saved("salun", (DELTA_ENDING,)), {"tooltip": "Press R to refresh the list."})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        return state_of(file, (DELTA_ENDING,))

    def run(self, file: str) -> tuple[Delta]:
        return (Delta.load(chosen(file, "salun", (DELTA_ENDING,))),)


class SalUnSaveDelta(Node):
    """A delta to a file."""

    OUTPUT_NODE = True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("file",)
    OUTPUT_TOOLTIPS = ("The file's name in output/salun.",)
    DESCRIPTION = (
        "Writes a delta to output/salun, under a new name each time. Who has it can undo the erasure: publish the "
        "checkpoint instead, where a concept must not come back."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**wires("delta"), **prefix("erased")}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return validated(filename_prefix, "salun")

    def run(self, delta: Delta, filename_prefix: str) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "salun", DELTA_ENDING)
        delta.save(path)
        return {"ui": {"text": [f"output/salun/{name}"]}, "result": (name,)}


class SalUnSaveErasedCheckpoint(Node):
    """The erased model as a checkpoint."""

    OUTPUT_NODE = True
    RETURN_TYPES, RETURN_NAMES = ("STRING", "STRING"), ("ckpt_name", "told")
    OUTPUT_TOOLTIPS = ("The file's name in the lists of checkpoints.", "How it was written.")
    DESCRIPTION = (
        "Writes the erased checkpoint to output/checkpoints, where loaders find it. The source file is copied and only "
        "the changed weights are replaced: all else stays byte for byte. A graph with other patches (a LoRA, a second "
        "erasure) is no file's copy: connect model, clip and vae, and ComfyUI's own saver writes them as they are."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **wires("delta"),
                "ckpt_name": (
                    checkpoints(),
                    {"tooltip": "The checkpoint that was loaded; it is copied, never changed. Only .safetensors is."},
                ),
                **prefix("erased"),
            },
            "optional": {
                "model": ("MODEL", {"tooltip": "For graphs with other patches, or another format: the erased model."}),
                "clip": ("CLIP", {"tooltip": "For graphs with other patches, or another format."}),
                "vae": ("VAE", {"tooltip": "For graphs with other patches, or another format."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        filename_prefix: str | None = None,
        ckpt_name: str | None = None,
        model: Any = UNWIRED,
        clip: Any = UNWIRED,
        vae: Any = UNWIRED,
    ) -> bool | str:
        def found() -> None:
            wired = [part is not UNWIRED for part in (model, clip, vae)]
            _all_or_none(wired)
            if ckpt_name is not None and (source := _source(ckpt_name, all(wired))).suffix == ENDING:
                read_header(source)  # a damaged one is told of now, not after the training

        return validated(filename_prefix, "checkpoints", found)

    @computes
    def run(
        self, delta: Delta, ckpt_name: str, filename_prefix: str, model: Any = None, clip: Any = None, vae: Any = None
    ) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "checkpoints", ".safetensors")
        parts = [part is not None for part in (model, clip, vae)]
        _all_or_none(parts)
        wired = all(parts)
        source, why = _source(ckpt_name, wired), ""
        if source.suffix != ENDING:
            why = f"{ckpt_name} is no {ENDING} file"
        elif wired and not holds_alone(model, delta):
            why = "the connected model has other patches"
        elif wired and clip.patcher.patches:
            why = "the connected CLIP has patches"
        if why:
            told = _by_stock_saver(path, name, model, clip, vae, delta, why)
            return {"ui": {"text": [told]}, "result": (name, told)}
        try:
            made = deltas.stack(str(source), [delta], str(path), progress=ComfyProgress({"writing": len(delta.names)}))
        except BaseMismatch as error:
            if not wired:
                raise ModelError(
                    f"{ckpt_name} is not what this was erased from (its hash is {error.actual[:12]}…, not "
                    f"{error.expected[:12]}…): choose the checkpoint that was loaded. If the graph has other patches, "
                    "such as a LoRA before SalUn Erase, or ComfyUI keeps the model in another dtype, connect model, "
                    "clip and vae"
                ) from error
            told = _by_stock_saver(path, name, model, clip, vae, delta, f"{ckpt_name} is not what this was erased from")
        else:
            notes = map(in_inputs_names, made["notes"])
            copied = f"{name}: {ckpt_name} with {len(delta.names)} tensors changed, its CLIP and VAE as they are there"
            told = "; ".join([copied, *notes])
        return {"ui": {"text": [told]}, "result": (name, told)}


class SalUnSaveAsLora(Node):
    """The erasure for stock loaders."""

    OUTPUT_NODE = True
    RETURN_TYPES, RETURN_NAMES = ("STRING", "STRING"), ("lora_name", "told")
    OUTPUT_TOOLTIPS = ("The file's name in the lists of LoRAs.", "How much of the erasure it holds.")
    DESCRIPTION = (
        "Writes the erasure to output/loras for any LoRA loader (ComfyUI, A1111, Forge): of low rank, which loses some "
        "of it, or every difference. Who has the file can undo the erasure."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model before the erasure."}),
                **wires("delta"),
                "kind": (["low rank", "every difference"], {"tooltip": "Small, or whole."}),
                "energy": (
                    "FLOAT",
                    {
                        "default": 0.9,
                        "min": 0.01,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Of low rank: the share of each layer's difference (squared) that is kept.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 4096,
                        "tooltip": "Of low rank: a rank for all layers (0: by energy).",
                    },
                ),
                **prefix("erased"),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return validated(filename_prefix, "loras")

    @computes
    def run(
        self, model: Any, delta: Delta, kind: str, energy: float, rank: int, filename_prefix: str
    ) -> dict[str, Any]:
        path, name = output_path(filename_prefix, "loras", LORA if kind == "low rank" else DIFF)
        family_of(model)
        made = on_model(model, delta)
        by = ({"rank": rank} if rank else {"energy": energy}) if kind == "low rank" else {}
        bar = ComfyProgress({"comparing": len(delta.names), **({} if by else {"writing": len(delta.names)})})
        base = made.base_tensors
        account = write_stock(path, base, AppliedDeltas(base, made.layers), stock_notes(delta), progress=bar, **by)
        told = f"{name}: {account.total.share:.1%} of the difference kept" if account else f"{name}: every difference"
        return {"ui": {"text": [told]}, "result": (name, told)}


def on_model(model: Any, delta: Delta) -> AppliedDeltas:
    """The delta on what it fits of the graph: the model as loaded, or with the patches so far. Raises ModelError."""
    errors: list[ModelError] = []
    for candidate in (Weights(model, patched=False), Weights(model)):
        try:
            return stacking.stack(candidate, [(delta, 1.0)], known_hash=candidate.hash)
        except ModelError as error:
            errors.append(error)
    if isinstance(errors[0], BaseMismatch):
        raise ModelError(
            f"this delta is of another model (hash {errors[0].expected[:12]}…) than this one "
            f"({errors[0].actual[:12]}…). If that was a checkpoint, set SalUn Apply Delta's base_checkpoint to it; if "
            "it was a model with patches (a LoRA, an earlier erasure), the same patches must come before this node, at "
            "the same strengths"
        ) from errors[0]
    raise errors[0]


def _all_or_none(wired: list[bool]) -> None:
    """Raises ConfigError for a graph's model, clip and vae of which only some are connected: no saver takes that."""
    if any(wired) and not all(wired):
        raise ConfigError("connect model, clip and vae, or none of them: only all three can be written as they are")


def checkpoints() -> list[str]:
    """ComfyUI's checkpoints."""
    import folder_paths

    return list(folder_paths.get_filename_list("checkpoints"))


def checkpoint(name: str) -> Path:
    """A checkpoint's file. Raises ConfigError if it is not there."""
    import folder_paths

    found = folder_paths.get_full_path("checkpoints", name)
    if found is None or not name.endswith(".safetensors"):
        raise ConfigError(f"{name} is no .safetensors checkpoint that ComfyUI finds: press R to refresh the lists")
    return Path(found)


def _source(name: str, wired: bool) -> Path:
    """The checkpoint to patch; where model, clip and vae are wired, one of another format too. Raises ConfigError."""
    import folder_paths

    found = folder_paths.get_full_path("checkpoints", name)
    if found is None or name.endswith(ENDING):
        return checkpoint(name)
    if not wired:
        raise ConfigError(
            f"{name} is no {ENDING} file, and no other is patched: connect model, clip and vae, and ComfyUI's own "
            "saver writes them"
        )
    return Path(found)


def _by_stock_saver(path: Path, name: str, model: Any, clip: Any, vae: Any, delta: Delta, why: str) -> str:
    """Have ComfyUI write the graph's model; returns a line that says so. Raises ModelError for one not erased."""
    import torch
    from comfy.sd import save_checkpoint

    if not holds(model, delta):
        raise ModelError(
            "the connected model does not hold this erasure in full (strength 1 in all, and no merge after it): "
            "connect the MODEL of SalUn Erase"
        )
    notes = {key: value for key, value in delta.metadata.items() if key.startswith(PREFIX)}
    try:
        with torch.inference_mode(), temporary_folder(path) as folder:
            part = folder / path.name
            save_checkpoint(str(part), model, clip, vae, metadata=notes, extra_keys=schedule_keys(model))
            os.replace(part, path)
    finally:
        release()
    return f"{name}: written by ComfyUI's own saver, since {why}"
