"""The nodes, called as ComfyUI's server calls them, without ComfyUI.

What stands in for ComfyUI here is the least that the nodes touch: its model patcher's clone, patches and key patches,
its paths, its bar, and in place of its UNet diffusers' under ComfyUI's names. `test_comfyui_real.py` has the real one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from comfy_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, weights
from comfy_nodes.inputs import HOST, automatic, options_of
from comfy_nodes.kinds import Data
from comfy_nodes.weights import Weights, module_order
from salun import Delta, Mask, SalunError
from salun.formats.keymap import unet_from_ldm, unet_to_ldm
from salun.options import MASKS, EraseOptions
from tools import comfy_help, comfy_workflows
from tools.checkpoints import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {item.name: item for item in dataclasses.fields(EraseOptions)}
CONFIG = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


# -- what stands in for ComfyUI ---------------------------------------------------------------------------------------


class UNetModel(nn.Module):
    """diffusers' UNet under ComfyUI's names."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: Any = None, operations: Any = None, **_: Any
    ) -> None:
        super().__init__()
        with torch.device(device or "cpu"):
            self.inner = UNet2DConditionModel(**CONFIG)
        names = dict(self.inner.named_parameters())
        self.theirs = {ours: name.removeprefix("model.diffusion_model.") for ours, name in unet_to_ldm(names).items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([(self.theirs[name], p) for name, p in self.inner.named_parameters()])

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        back = {theirs: ours for ours, theirs in self.theirs.items()}
        return self.inner.load_state_dict({back[name]: t for name, t in state.items()}, strict=strict, assign=assign)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: Any) -> Tensor:
        return self.inner(x, t, context).sample


class ModelSamplingDiscrete:
    sigmas = (1 / torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0) - 1).sqrt()


class EPS:
    pass


class Sampling(ModelSamplingDiscrete, EPS):
    pass


class Patcher:
    """A MODEL: weights that stay, and patches that clones add."""

    load_device = torch.device("cpu")

    def __init__(self) -> None:
        torch.manual_seed(0)
        inner = nn.Module()
        inner.diffusion_model = UNetModel()
        inner.model_config = types.SimpleNamespace(
            unet_config={"context_dim": 768, "in_channels": 4, "channel_mult": [1], "adm_in_channels": None}
        )
        inner.latent_format = types.SimpleNamespace(
            scale_factor=0.5, latent_rgb_factors=None, process_in=lambda x: x * 0.5, process_out=lambda x: x / 0.5
        )
        self.model, self.patches, self.patches_uuid = inner, {}, uuid.uuid4()

    def clone(self) -> Patcher:
        made = Patcher.__new__(Patcher)
        made.model, made.patches_uuid = self.model, self.patches_uuid
        made.patches = {key: list(found) for key, found in self.patches.items()}
        return made

    def get_model_object(self, name: str) -> Any:
        return Sampling()

    def get_key_patches(self, prefix: str) -> dict[str, Any]:
        plain = lambda a, **_: a  # noqa: E731
        own = self.model.diffusion_model.named_parameters()
        return {prefix + name: [(p.data, plain), *self.patches.get(prefix + name, [])] for name, p in own}

    def add_patches(self, patches: Any, strength: float, strength_model: float) -> list[str]:
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch, strength_model, None, None))
        self.patches_uuid = uuid.uuid4()
        return list(patches)


class Clip:
    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, text: str, return_pooled: bool) -> tuple[Tensor, None]:
        seed = zlib.crc32(text.encode())
        return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(seed)), None


class Vae:
    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2).sigmoid()

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]


def calculate_weight(patches: Any, weight: Tensor, key: str) -> Tensor:
    for strength, patch, strength_model, offset, function in patches:
        weight = patch.calculate_weight(weight, key, strength, strength_model, offset, function)
    return weight


class Interrupt(BaseException):
    pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Told: the bar's values, and whether somebody interrupts."""
    told = types.SimpleNamespace(bar=[], interrupt_at=None, root=tmp_path)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            pass

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            told.bar.append((value, total))

    def interrupted() -> None:
        if told.interrupt_at is not None and len(told.bar) >= told.interrupt_at:
            raise Interrupt

    class WeightAdapterBase:
        pass

    def sample_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor, disable: bool) -> Tensor:
        return model(x, sigmas[0] * x.new_ones(len(x)))

    def get_save_image_path(prefix: str, root: str) -> tuple[Any, ...]:
        return str(Path(root) / Path(prefix).parent), Path(prefix).name, 1, "", prefix

    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": interrupted,
            "soft_empty_cache": lambda: None,
            "get_torch_device": lambda: torch.device("cpu"),
            "in_training": False,
        },
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.lora": {"calculate_weight": calculate_weight},
        "comfy.weight_adapter": {"WeightAdapterBase": WeightAdapterBase},
        "comfy.ops": {"disable_weight_init": None},
        "comfy.k_diffusion": {},
        "comfy.k_diffusion.sampling": {"sample_dpmpp_2m": sample_dpmpp_2m},
        "folder_paths": {
            "get_output_directory": lambda: str(tmp_path / "output"),
            "get_input_directory": lambda: str(tmp_path / "input"),
            "get_user_directory": lambda: str(tmp_path / "user"),
            "get_filename_list": lambda kind: [],
            "get_full_path": lambda kind, name: None,
            "get_save_image_path": get_save_image_path,
        },
        "latent_preview": {"get_previewer": lambda device, kind: None},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        outer, _, inner = name.rpartition(".")
        if outer:
            setattr(sys.modules[outer], inner, module)
    for name in ("SALUN_CACHE", "SALUN_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    weights._sparse.cache_clear()
    yield told
    weights._sparse.cache_clear()


def call(kind: str, **inputs: Any) -> Any:
    """A node as the server calls it: a fresh object, defaults for what is not wired, in inference mode."""
    made: Any = NODE_CLASS_MAPPINGS[kind]
    given: dict[str, Any] = {}
    for name, (what, *rest) in made.INPUT_TYPES()["required"].items():
        if name not in inputs:
            given[name] = rest[0].get("default", what[0] if isinstance(what, list) else None)
    with torch.inference_mode():
        result = getattr(made(), made.FUNCTION)(**given, **inputs)
    return result["result"] if isinstance(result, dict) else result


TINY = {"steps": 2, "batch_size": 1, "lr": 1e-3, "eval_images": 1}
SIZES = {"forget_latents": 2, "retain_latents": 2, "resolution": 64}


def erased(model: Any, **changes: Any) -> tuple[Any, Delta, Tensor, str]:
    (concept,) = call("SalUnConcept", text="a cat", anchor="a dog")
    result: tuple[Any, Delta, Tensor, str] = call(
        "SalUnErase", model=model, clip=Clip(), vae=Vae(), concept=concept, **{**TINY, **SIZES, **changes}
    )
    return result


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
def test_every_input_that_is_an_option_has_the_cores_default_range_and_help() -> None:
    seen = set()
    for kind, made in NODE_CLASS_MAPPINGS.items():
        types_of: Any = made
        for name, (what, settings) in [i for part in types_of.INPUT_TYPES().values() for i in part.items()]:
            assert settings["tooltip"], f"{kind}.{name}"
            if name not in OPTIONS or what in ("SALUN_MASK", "IMAGE") or kind == "SalUnConcept":
                continue
            if isinstance(what, str) and what.isupper() and what not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                continue  # a wire that has an option's name
            seen.add(name)
            assert settings["tooltip"].startswith(OPTIONS[name].metadata["help"])
            assert options_of({name: settings["default"]}) == EraseOptions()
            choices = MASKS if name == "mask" else OPTIONS[name].metadata["choices"]
            if choices:
                assert list(what)[-len(choices) :] == list(choices)
            if OPTIONS[name].metadata["maximum"] is not None and what in ("INT", "FLOAT"):
                assert settings["max"] == min(OPTIONS[name].metadata["maximum"], 2**53)
    assert seen | set(HOST) == set(OPTIONS), "an option that no node has, and of which HOST does not say why"


@pytest.mark.parametrize("name", ["steps", "lr", "retain_weight", "resolution"])
def test_the_number_for_auto_is_none_that_the_option_takes(name: str) -> None:
    assert getattr(options_of({name: automatic(name)}), name) is None
    with pytest.raises(SalunError):
        EraseOptions(**{name: automatic(name)})


def test_names_titles_help_pages_and_workflows_are_up_to_date(host: Any) -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for name, text in comfy_help.pages().items():
        assert (comfy_help.TARGET / f"{name}.md").read_text(encoding="utf-8") == text, "run tools/comfy_help.py"
    for name, graph in comfy_workflows.WORKFLOWS.items():
        saved = json.loads((comfy_workflows.TARGET / f"{name}.json").read_text(encoding="utf-8"))
        assert saved == comfy_workflows.saved(graph), "run tools/comfy_workflows.py"
        assert (comfy_workflows.TARGET / f"{name}.jpg").stat().st_size > 1000


def test_importing_the_nodes_needs_no_comfyui() -> None:
    assert not any(name.split(".")[0] == "comfy" for name in sys.modules)


# -- words ------------------------------------------------------------------------------------------------------------


def test_concepts_chain_and_say_what_is_missing() -> None:
    (first,) = call("SalUnConcept", text="a cat", anchor="a dog", retain_prompts="a house\n\n a tree ")
    (both,) = call("SalUnConcept", preset="van gogh", concept=first)
    assert [c.name for c in both] == ["a cat", "van gogh"]
    assert first[0].retain == ("a house", "a tree")
    assert both[1].anchor is None
    assert call("SalUnConcept", text="a cat", anchor='""')[0][0].anchor == ""
    with pytest.raises(SalunError, match="choose a preset, or write"):
        call("SalUnConcept")
    with pytest.raises(SalunError, match="both the preset"):
        call("SalUnConcept", preset="van gogh", text="a cat")


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size"), [("sd1", "true"), ("sd2", "small"), ("sdxl", "true")])
def test_parameters_come_in_the_order_of_diffusers(family: str, size: str) -> None:
    """Ties in a mask go to the earlier one, and a random mask is drawn in this order."""
    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel(**ARCHITECTURES[family, size].unet).named_parameters()]
    assert sorted(unet_from_ldm(unet_to_ldm(names).values()).values(), key=module_order) == names


@pytest.mark.usefixtures("host")
def test_a_widened_model_is_told_in_the_dtype_that_holds_it() -> None:
    model = Patcher()
    assert {t.dtype for t in Weights(model).values()} == {torch.float32}
    for _, p in model.model.diffusion_model.named_parameters():
        p.data = p.data.half().float()
    other = Patcher()
    other.model.diffusion_model.load_state_dict(dict(model.model.diffusion_model.named_parameters()))
    assert {t.dtype for t in Weights(other).values()} == {torch.float16}


def test_an_unknown_kind_of_model_is_named(host: Any) -> None:
    model = Patcher()
    model.model.model_config.unet_config["context_dim"] = 4096
    with pytest.raises(SalunError, match=r"this MODEL is Module .*SD 1\.x, SD 2\.x and SDXL"):
        erased(model)


# -- erasing ----------------------------------------------------------------------------------------------------------


def test_an_erasure_moves_only_the_mask_and_leaves_the_model_as_it_was(host: Any) -> None:
    model = Patcher()
    before = {k: p.detach().clone() for k, p in model.model.diffusion_model.named_parameters()}
    (concept,) = call("SalUnConcept", text="a cat", anchor="a dog")
    mask, told = call(
        "SalUnSaliencyMask", model=model, clip=Clip(), concept=concept, batch_size=1, density=0.2, **SIZES_F
    )
    assert told.startswith(f"{mask.selected:,} of")
    after, delta, picture, figures = erased(model, given_mask=mask)
    new = Weights(after)
    for name, old in Weights(model).items():
        outside = ~mask.dense(name)
        assert torch.equal(new[name][outside], old[outside])
    assert 0 < delta.changed <= mask.selected
    # the patches add what the delta says; a difference of two fp32 numbers may round once
    exact = delta.apply(Weights(model))
    for name, tensor in exact.items():
        torch.testing.assert_close(new[name], tensor, rtol=2.0**-22, atol=1e-9)
    assert picture.shape[-1] == 3 and picture.std() > 0
    assert [len(json.loads(figures)["losses"])] == [2]
    for name, p in model.model.diffusion_model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


SIZES_F = {"forget_latents": 2, "resolution": 64}


def test_the_same_inputs_train_once_and_a_changed_option_trains(host: Any) -> None:
    model = Patcher()
    first = erased(model)[1]
    rising = [value for value, _ in host.bar]
    assert rising == sorted(set(rising)) and rising[-1] == host.bar[-1][1]
    host.bar.clear()
    again = erased(Patcher())[1]  # another object, as after a restart
    assert not host.bar and again.result_hash == first.result_hash
    assert erased(model, lr=2e-3)[1].result_hash != first.result_hash and host.bar


def test_what_was_kept_is_blurred_as_it_is_asked_for_now(host: Any) -> None:
    (concept,) = call("SalUnConcept", preset="nudity")
    assert concept[0].name == "nudity"
    parts = {"clip": Clip(), "vae": Vae(), "concept": concept, **TINY, **SIZES}
    shown = call("SalUnErase", model=Patcher(), **parts, show_sensitive=True)[2]
    host.bar.clear()
    blurred = call("SalUnErase", model=Patcher(), **parts)[2]
    assert not host.bar and blurred.shape == shown.shape and not torch.equal(blurred, shown)


def test_an_interrupt_passes_through_and_the_next_run_is_whole(host: Any) -> None:
    model = Patcher()
    host.interrupt_at = 8
    with pytest.raises(Interrupt):
        erased(model)
    assert not list((host.root / "user").rglob("*-delta.safetensors"))
    host.interrupt_at = None
    assert erased(model)[1].changed


def test_deltas_stack_and_other_data_are_refused(host: Any) -> None:
    model = Patcher()
    after, delta, _, _ = erased(model)
    (half,) = call("SalUnApplyDelta", model=model, delta=delta, strength=0.5)
    (twice,) = call("SalUnApplyDelta", model=half, delta=delta, strength=0.5)
    for name, tensor in Weights(after).items():
        torch.testing.assert_close(Weights(twice)[name], tensor, rtol=2.0**-21, atol=1e-8)  # two roundings of fp32
    (data,) = call(
        "SalUnTrainingData", model=model, clip=Clip(), concept=call("SalUnConcept", text="a cow")[0], **SIZES
    )
    assert isinstance(data, Data)
    with pytest.raises(SalunError, match="the training data are of a cow"):
        erased(model, given_data=data)


def test_pictures_take_the_place_of_samples(host: Any) -> None:
    (concept,) = call("SalUnConcept", text="a cat", anchor="a dog")
    images = torch.rand(3, 80, 64, 3)
    parts = {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept, **SIZES}
    (data,) = call("SalUnTrainingData", **parts, forget_images=images, retain_images=images, retain_captions="a\nb\nc")
    assert data.content.forget_latents.shape == (3, 4, 8, 8)
    with pytest.raises(SalunError, match="2 lines for 3"):
        call("SalUnTrainingData", **parts, retain_images=images, retain_captions="a\nb")
    with pytest.raises(SalunError, match="both given"):
        call("SalUnTrainingData", **parts, forget_images=images, forget_samples={"samples": torch.rand(1, 4, 8, 8)})


# -- files ------------------------------------------------------------------------------------------------------------


def test_masks_and_deltas_are_kept_under_new_names_and_found_again(host: Any) -> None:
    mask = Mask.random({"conv_in.weight": torch.zeros(40)}, 0.5, 0)
    names = [call("SalUnSaveMask", mask=mask, filename_prefix="sub/mine")[0] for _ in range(2)]
    assert names == ["sub/mine_00001_.mask.safetensors", "sub/mine_00002_.mask.safetensors"]
    made: Any = NODE_CLASS_MAPPINGS["SalUnLoadMask"]
    assert set(made.INPUT_TYPES()["required"]["file"][0]) == set(names)
    assert call("SalUnLoadMask", file=names[0])[0] == mask
    either, told = call("SalUnCombineMasks", first=mask, second=mask.shuffled(1), operation="union")
    assert either.selected > mask.selected and "Jaccard" in told
    assert call("SalUnMaskHeatmap", mask=mask)[0].ndim == 4
    with pytest.raises(SalunError, match="not in output/salun"):
        call("SalUnLoadMask", file="../../secret.mask.safetensors")


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../out", "C:\\out", "", "folder/"])
def test_no_name_leads_out_of_the_output_folder(host: Any, prefix: str) -> None:
    mask = Mask.full({"conv_in.weight": torch.zeros(40)})
    with pytest.raises(SalunError, match="filename_prefix"):
        call("SalUnSaveMask", mask=mask, filename_prefix=prefix)
    assert not list(host.root.rglob("*.safetensors"))
