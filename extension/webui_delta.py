"""The "Erased delta" accordion of txt2img and img2img: a generation with deltas applied to the loaded checkpoint.

The changed tensors replace the checkpoint's, as `salun delta stack` would write them, so that a delta at strength 1
gives exactly the erased checkpoint's weights; LoRAs are added to them. The host's LoRA code applies and removes them:

Forge   a patch of type "set" on a clone of the UNet's patcher, first in its order. Forge merges patches when their
        names change, and restores the original weights before that.
reForge the same in the patcher's lists of patches, one per tensor, which it merges again whenever they change.
A1111   a network among the LoRA extension's, first in its order, whose layers return new − old in double precision.
        The extension keeps a copy of each layer that it changes, and restores it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from modules import scripts, shared

from .page_deltas import ROWS, rows
from .webui import service, trouble

PREFIX = "salun:"
logger = logging.getLogger("salun")
_last: dict[str, Any] = {}  # the last choice, so that the next image need not read its files again


class ErasedDelta(scripts.Script):  # type: ignore[misc]
    """Choose deltas and strengths for this generation."""

    def title(self) -> str:
        return "Erased delta"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        if trouble() is not None:  # the tab shows it
            return []
        side = "img2img" if is_img2img else "txt2img"
        with gr.Accordion(self.title(), open=False, elem_id=f"salun_{side}_delta"):
            on = gr.Checkbox(value=False, label="Use these deltas", elem_id=f"salun_{side}_on")
            chosen, strengths = rows(gr, service().runs.deltas(), f"salun_{side}", allow_custom_value=True)
            refresh = gr.Button("Refresh the list", elem_id=f"salun_{side}_refresh")
            refresh.click(
                lambda: [gr.update(choices=["", *service().runs.deltas()]) for _ in chosen], [], chosen, queue=False
            )
        controls: list[Any] = [on, *chosen, *strengths]
        for control in controls:
            control.do_not_save_to_config = True
        return controls

    def process_before_every_sampling(self, p: Any, on: bool = False, *rest: Any, **kwargs: Any) -> None:
        """Apply the deltas before the first pass and before hires fix. An error stops the generation."""
        try:
            self._apply(p, on, *rest)
        except Exception as error:  # the host would report any error and generate without the delta
            p.comment(f"Erased delta: {error}")
            shared.state.interrupt()
            raise

    def _apply(self, p: Any, on: bool, *rest: Any) -> None:
        forge = hasattr(p.sd_model, "forge_objects")
        pairs = (
            [(str(d), float(s)) for d, s in zip(rest[:ROWS], rest[ROWS:], strict=True) if d and float(s)] if on else []
        )
        networks = None if forge else _networks() if pairs else sys.modules.get("networks")
        if networks is not None:  # those of the last image
            networks.loaded_networks[:] = [n for n in networks.loaded_networks if not n.name.startswith(PREFIX)]
        if not pairs:
            _last.clear()
            return
        name, tensors = _stacked(Path(p.sd_model.sd_checkpoint_info.filename), pairs)
        if forge:
            _into_forge(p, name, tensors)
        else:
            _into_a1111(p, name, tensors)
        p.extra_generation_params["Erased delta"] = ", ".join(f"{run} {strength:g}" for run, strength in pairs)


def _stacked(checkpoint: Path, pairs: Sequence[tuple[str, float]]) -> tuple[str, Mapping[str, Any]]:
    """A unique name of the choice, and the changed tensors by their names in the checkpoint's UNet (LDM layout).

    Raises SalunError for a delta of another base.
    """
    from salun.checkpoints.single_file import open_unet
    from salun.delta.delta import Delta
    from salun.delta.stacking import stack

    files = [service().runs.delta(run) for run, _ in pairs]
    stamp = [(str(f), f.stat().st_mtime_ns) for f in (checkpoint, *files)]
    key = repr((stamp, [strength for _, strength in pairs]))
    if _last.get("key") != key:
        _last.clear()
        stored = open_unet(checkpoint)
        layers = [(Delta.load(file), strength) for file, (_, strength) in zip(files, pairs, strict=True)]
        made = stack(stored, layers)
        names = {stored.name_in_file(name).removeprefix("model."): name for name in made}
        ids = ",".join(f"{delta.id}@{strength:g}" for delta, strength in made.layers)
        _last.update(key=key, name=f"{PREFIX}{made.base_hash[:12]}:{ids}", tensors=_Tensors(made, names))
    return _last["name"], _last["tensors"]


class _Tensors(Mapping[str, Any]):
    """The changed tensors by their names in the checkpoint's UNet, each computed on access."""

    def __init__(self, made: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._made, self._names = made, names

    def __getitem__(self, key: str) -> Any:
        return self._made[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _into_forge(p: Any, name: str, tensors: Mapping[str, Any]) -> None:
    unet = p.sd_model.forge_objects.unet.clone()
    known = {key for key, _ in unet.model.named_parameters()}
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise RuntimeError(f"the loaded model has no {unknown[0]}")
    patches = {key: ("set", (tensor,)) for key, tensor in tensors.items()}
    if hasattr(unet, "lora_patches"):
        unet.add_patches(filename=name, patches=patches)
        added = next(key for key in unet.lora_patches if key[0] == name)
        unet.lora_patches = {added: unet.lora_patches.pop(added), **unet.lora_patches}  # before LoRAs, which are added
    else:  # reForge
        unet.add_patches(patches)
        for key in patches:
            unet.patches[key].insert(0, unet.patches[key].pop())
    p.sd_model.forge_objects.unet = unet


def _into_a1111(p: Any, name: str, tensors: Mapping[str, Any]) -> None:
    networks = _networks()
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        layer, _, part = key.rpartition(".")
        layers.setdefault(layer.replace(".", "_"), {})[part] = key
    if not hasattr(p.sd_model, "network_layer_mapping"):
        networks.assign_network_names_to_compvis_modules(p.sd_model)
    unknown = sorted(set(layers) - set(p.sd_model.network_layer_mapping))
    if unknown:
        raise RuntimeError(f"the loaded model has no layer {unknown[0]}")
    network = networks.network.Network(name, None)
    network.dyn_dim = 1.0
    network.modules = {
        layer: _Layer(tensors, parts, p.sd_model.network_layer_mapping[layer]) for layer, parts in layers.items()
    }
    networks.loaded_networks.insert(0, network)  # before LoRAs, which are added


class _Layer:
    """A layer as A1111's LoRA extension calls it: the differences to add to its weight and bias."""

    def __init__(self, tensors: Mapping[str, Any], parts: Mapping[str, str], layer: Any) -> None:
        self.tensors, self.parts, self.layer = tensors, parts, layer

    def calc_updown(self, weight: Any) -> tuple[Any, Any]:
        import torch

        wide = torch.float32 if weight.device.type == "mps" else torch.float64  # there new − old + old is new

        def difference(part: str, old: Any) -> Any:
            if part not in self.parts:
                return torch.zeros(old.shape, dtype=wide, device=old.device)
            return self.tensors[self.parts[part]].to(old.device, wide).reshape(old.shape) - old.to(wide)

        bias = difference("bias", self.layer.bias) if "bias" in self.parts else None
        return difference("weight", weight), bias


def _networks() -> Any:
    """A1111's built-in LoRA extension. Raises RuntimeError if it is disabled."""
    networks = sys.modules.get("networks")
    if networks is None:
        raise RuntimeError("Erased delta needs the built-in extension Lora, which is disabled: enable it")
    return networks
