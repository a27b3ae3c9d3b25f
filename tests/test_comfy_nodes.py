"""The nodes, called as ComfyUI's server calls them, without ComfyUI.

What stands in for ComfyUI here is the least that the nodes touch: its model patcher's clone, patches and key patches,
its paths, its bar, and in place of its UNet diffusers' under ComfyUI's names. `test_comfyui_real.py` has the real one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import runpy
import sys
import traceback
import types
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from comfy_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, places, weights
from comfy_nodes import erase as erase_node
from comfy_nodes.inputs import HOST, OWN, SHARED, automatic, in_inputs_names, options_of
from comfy_nodes.kinds import Data
from comfy_nodes.model import GraphModel
from comfy_nodes.places import cache
from comfy_nodes.weights import Weights, module_order
from comfy_nodes.work import plan_of, record_of
from salun import Delta, Mask, SalunError
from salun.checkpoints import safetensors_io
from salun.checkpoints.keymap import unet_from_ldm, unet_to_ldm
from salun.delta.stock_formats import stock_notes
from salun.diffusion import evaluation
from salun.diffusion.context import prepared
from salun.diffusion.data.latents import sample_latents
from salun.diffusion.options import EraseOptions
from salun.options import MASKS
from salun.runs.folder import exclusive_lock
from salun.runs.record import NOT_IN_FINGERPRINT
from tools import comfy_help, comfy_workflows
from tools.checkpoints import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {item.name: item for item in dataclasses.fields(EraseOptions)}
CONFIG = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}
FAMILIES = {  # what tells the families apart: the widths of the text and of SDXL's sizes, and linear projections
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


# -- what stands in for ComfyUI ---------------------------------------------------------------------------------------


class UNetModel(nn.Module):
    """diffusers' UNet under ComfyUI's names."""

    def __init__(
        self,
        context_dim: int,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        operations: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        family = next(one for one in FAMILIES.values() if one["cross_attention_dim"] == context_dim)
        with torch.device(device or "cpu"):
            self.inner = UNet2DConditionModel(**CONFIG, **family)
        if context_dim == 2048:
            self.inner.add_time_proj = Already()
        names = dict(self.inner.named_parameters())
        self.theirs = {ours: name.removeprefix("model.diffusion_model.") for ours, name in unet_to_ldm(names).items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([(self.theirs[name], p) for name, p in self.inner.named_parameters()])

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        back = {theirs: ours for ours, theirs in self.theirs.items()}
        return self.inner.load_state_dict({back[name]: t for name, t in state.items()}, strict=strict, assign=assign)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, transformer_options: Any, y: Tensor | None = None
    ) -> Tensor:
        added = {"text_embeds": y[:, :1280], "time_ids": y[:, 1280:].reshape(-1, 256)} if y is not None else None
        return self.inner(x, t, context, added_cond_kwargs=added).sample


class Already(nn.Module):
    """Sizes come embedded: ComfyUI does that outside its network."""

    def forward(self, sizes: Tensor) -> Tensor:
        return sizes.reshape(-1, 256)


class ModelSamplingDiscrete:
    sigmas = (1 / torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0) - 1).sqrt()


class EPS:
    pass


class V_PREDICTION(EPS):
    pass


class Sampling(ModelSamplingDiscrete, EPS):
    pass


class VSampling(ModelSamplingDiscrete, V_PREDICTION):
    pass


class Sdxl(nn.Module):
    def encode_adm(self, pooled_output: Tensor, width: int, height: int, device: Any) -> Tensor:
        return torch.cat([pooled_output, torch.full((len(pooled_output), 6 * 256), width / 1000)], 1)


class Patcher:
    """A MODEL: weights that stay, and patches that clones add."""

    load_device = torch.device("cpu")

    def __init__(self, family: str = "sd1", prediction: str = "epsilon") -> None:
        torch.manual_seed(0)
        inner = Sdxl() if family == "sdxl" else nn.Module()
        width = FAMILIES[family]["cross_attention_dim"]
        inner.diffusion_model = UNetModel(width)
        adm = 2816 if family == "sdxl" else None
        inner.model_config = types.SimpleNamespace(
            unet_config={"context_dim": width, "in_channels": 4, "channel_mult": [1], "adm_in_channels": adm}
        )
        self.sampling = Sampling() if prediction == "epsilon" else VSampling()
        inner.latent_format = types.SimpleNamespace(
            scale_factor=0.5, latent_rgb_factors=None, process_in=lambda x: x * 0.5, process_out=lambda x: x / 0.5
        )
        self.model, self.patches, self.patches_uuid = inner, {}, uuid.uuid4()

    def clone(self) -> Patcher:
        made = Patcher.__new__(Patcher)
        made.model, made.patches_uuid, made.sampling = self.model, self.patches_uuid, self.sampling
        made.patches = {key: list(found) for key, found in self.patches.items()}
        return made

    def get_model_object(self, name: str) -> Any:
        return self.sampling

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
    def __init__(self, family: str = "sd1", weights: str = "", embedding: str = "") -> None:
        self.patcher = types.SimpleNamespace(patches={})
        self.width, self.weights, self.embedding, self.layer = (
            FAMILIES[family]["cross_attention_dim"],
            weights,
            embedding,
            0,
        )

    def tokenize(self, text: str) -> str:
        return text

    def clone(self) -> Clip:
        return copy.copy(self)

    def clip_layer(self, layer: int) -> None:
        self.layer = layer

    def encode_from_tokens(self, text: str, return_pooled: bool) -> tuple[Tensor, Tensor | None]:
        own = self.embedding if "embedding:" in text else ""
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{text} {self.weights} {own} {self.layer}".encode()))
        pooled = torch.randn(1, 1280, generator=drawn) if self.width == 2048 else None
        return torch.randn(1, 77, self.width, generator=drawn), pooled


class Vae:
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.first_stage_model = nn.Linear(2, 2)

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
    told = types.SimpleNamespace(bar=[], previews=[], guesses=[], samplers=[], interrupt_at=None, root=tmp_path)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            pass

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            told.bar.append((value, total))
            told.previews.append(preview)

    def interrupted() -> None:
        if told.interrupt_at is not None and len(told.bar) >= told.interrupt_at:
            raise Interrupt

    class WeightAdapterBase:
        pass

    class Latent2RGBPreviewer:
        def __init__(self, *_: Any) -> None:
            pass

        def decode_latent_to_preview(self, x_0: Tensor) -> Image.Image:
            told.guesses.append(x_0)
            pixels = x_0[0, :3].movedim(0, -1).sigmoid().mul(255).byte().numpy()
            return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)

    def sample_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor, disable: bool) -> Tensor:
        return model(x, sigmas[0] * x.new_ones(len(x)))

    def sample_euler(model: Any, x: Tensor, sigmas: Tensor, disable: bool) -> Tensor:
        told.samplers.append("euler")
        return sample_dpmpp_2m(model, x, sigmas, disable)

    def sample_euler_ancestral(model: Any, x: Tensor, sigmas: Tensor, disable: bool, noise_sampler: Any) -> Tensor:
        told.samplers.append("euler_ancestral")
        assert model.inner_model.inner_model.model_sampling.sigmas is not None  # where it looks for the schedule
        x = model(x, sigmas[0] * x.new_ones(len(x)))
        return x + noise_sampler(sigmas[0], sigmas[1])

    def sample_lcm(model: Any, x: Tensor, sigmas: Tensor, disable: bool, noise_sampler: Any) -> Tensor:
        told.samplers.append("lcm")
        assert model.inner_model.model_patcher.get_model_object("model_sampling").sigmas is not None  # newer ones
        x = model(x, sigmas[0] * x.new_ones(len(x)))
        return x + noise_sampler(sigmas[0], sigmas[1])

    def get_save_image_path(prefix: str, root: str) -> tuple[Any, ...]:
        return str(Path(root) / Path(prefix).parent), Path(prefix).name, 1, "", prefix

    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": interrupted,
            "soft_empty_cache": lambda: None,
            "get_torch_device": lambda: torch.device("cpu"),
            "in_training": False,
            "InterruptProcessingException": Interrupt,
            "vram_state": types.SimpleNamespace(name="NORMAL_VRAM"),
        },
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.lora": {"calculate_weight": calculate_weight},
        "comfy.weight_adapter": {"WeightAdapterBase": WeightAdapterBase},
        "comfy.ops": {"disable_weight_init": None},
        "comfy.k_diffusion": {},
        "comfy.k_diffusion.sampling": {
            "sample_dpmpp_2m": sample_dpmpp_2m,
            "sample_euler": sample_euler,
            "sample_euler_ancestral": sample_euler_ancestral,
            "sample_lcm": sample_lcm,
        },
        "folder_paths": {
            "get_output_directory": lambda: str(tmp_path / "output"),
            "get_input_directory": lambda: str(tmp_path / "input"),
            "get_user_directory": lambda: str(tmp_path / "user"),
            "get_filename_list": lambda kind: [],
            "get_full_path": lambda kind, name: str(tmp_path / name) if (tmp_path / name).exists() else None,
            "get_save_image_path": get_save_image_path,
        },
        "latent_preview": {"get_previewer": lambda device, kind: None, "Latent2RGBPreviewer": Latent2RGBPreviewer},
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


def call(kind: str, /, **inputs: Any) -> Any:
    """A node as the server calls it: a fresh object, defaults for what is not wired, in inference mode."""
    made: Any = NODE_CLASS_MAPPINGS[kind]
    given: dict[str, Any] = {}
    for name, (what, *rest) in made.INPUT_TYPES()["required"].items():
        if name not in inputs:
            given[name] = rest[0].get("default", what[0] if isinstance(what, list) else None)
    with torch.inference_mode():
        result = getattr(made(), made.FUNCTION)(**given, **inputs)
    return result["result"] if isinstance(result, dict) else result


TINY = {"steps": 2, "batch_size": 1, "lr": 1e-3, "eval_images": 0}
SIZES = {"forget_latents": 2, "retain_latents": 2, "resolution": 64}


def options(**changes: Any) -> Any:
    return call("SalUnOptions", **{**SIZES, **changes})[0]


def concept(*names: str, **given: Any) -> Any:
    made: Any = ()
    for name in names or ("a cat",):
        (made,) = call("SalUnConcept", text=name, anchor="a dog", concept=made, **given)
    return made


def erased(model: Any, family: str = "sd1", **changes: Any) -> tuple[Any, Delta, Tensor, str]:
    """SalUn Erase and, for changes that are not its own, SalUn Options."""
    shared = {name: changes.pop(name) for name in list(changes) if name in SHARED}
    parts = {"clip": Clip(family), "vae": Vae(), "concept": concept(), **TINY, **changes}
    result: tuple[Any, Delta, Tensor, str] = call("SalUnErase", model=model, options=options(**shared), **parts)
    return result


def forget_all(host: Any) -> None:
    """As if nothing had been computed here yet."""
    for path, _, _ in cache().entries():
        path.unlink()
    host.bar.clear()


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
def test_every_input_that_is_an_option_has_the_cores_default_range_and_help() -> None:
    seen: dict[str, set[str]] = {}
    for kind, made in NODE_CLASS_MAPPINGS.items():
        types_of: Any = made
        for name, (what, settings) in [i for part in types_of.INPUT_TYPES().values() for i in part.items()]:
            assert settings["tooltip"], f"{kind}.{name}"
            if name not in OPTIONS or what in ("SALUN_MASK", "IMAGE") or kind == "SalUnConcept":
                continue
            if isinstance(what, str) and what.isupper() and what not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                continue  # a wire that has an option's name
            seen.setdefault(name, set()).add(kind)
            assert "mask file" not in settings["tooltip"], "no choice of this node's"
            assert name == "mask" or settings["tooltip"].startswith(OPTIONS[name].metadata["help"])
            assert options_of({name: settings["default"]}) == EraseOptions()
            choices = MASKS if name == "mask" else OPTIONS[name].metadata["choices"]
            if choices:
                assert list(what)[-len(choices) :] == list(choices)
            if OPTIONS[name].metadata["maximum"] is not None and what in ("INT", "FLOAT"):
                assert settings["max"] == min(OPTIONS[name].metadata["maximum"], 2**53)
    assert set(seen) | set(HOST) == set(OPTIONS), "an option that no node has, and of which HOST does not say why"
    for name, nodes in seen.items():
        assert nodes == {"SalUnOptions"} or (name in OWN and "SalUnOptions" not in nodes), "two nodes would contradict"
    assert sum("SalUnErase" in nodes for nodes in seen.values()) == 7, "what everyone looks at, and no more"


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


@pytest.mark.parametrize(
    "change",
    [{"context_dim": 4096}, {"in_channels": 9}, {"adm_in_channels": 2560}],
    ids=["other", "inpaint", "refiner"],
)
def test_an_unknown_kind_of_model_is_named(host: Any, change: dict[str, int]) -> None:
    model = Patcher()
    model.model.model_config.unet_config.update(change)
    with pytest.raises(SalunError, match=r"this MODEL is Module .*SD 1\.x, SD 2\.x and SDXL"):
        erased(model)


def test_another_kind_of_sampling_is_named(host: Any) -> None:
    model = Patcher()
    model.sampling = type("ModelSamplingFlow", (), {"sigmas": Sampling.sigmas})()
    with pytest.raises(SalunError, match=r"ModelSamplingFlow.*epsilon and v-prediction"):
        erased(model)


# -- erasing ----------------------------------------------------------------------------------------------------------


def test_an_erasure_moves_only_the_mask_and_leaves_the_model_as_it_was(host: Any) -> None:
    model = Patcher()
    before = {k: p.detach().clone() for k, p in model.model.diffusion_model.named_parameters()}
    mask, told = saliency_mask(model)
    assert told.startswith(f"{mask.selected:,} of")
    after, delta, picture, figures = erased(model, given_mask=mask, eval_images=1)
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


def test_golden_delta_of_the_erase_node(host: Any) -> None:
    """The same inputs give the same bytes; `tools/golden.py` keeps the file to compare revisions."""
    kept = []
    for _ in range(2):
        forget_all(host)
        _, delta, _, _ = erased(Patcher())
        path = Path(os.environ.get("SALUN_GOLDEN", host.root)) / f"{len(kept)}.safetensors"
        delta.save(path)
        kept.append(path.read_bytes())
    assert kept[0] == kept[1]


def saliency_mask(model: Any, of: Any = None, **shared: Any) -> tuple[Mask, str]:
    parts = {"clip": Clip(), "concept": of or concept(), "options": options(**shared)}
    made: tuple[Mask, str] = call("SalUnSaliencyMask", model=model, **parts, batch_size=1, density=0.2)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_and_prediction_is_erased(host: Any, family: str, prediction: str) -> None:
    model = Patcher(family, prediction)
    after, delta, _, figures = erased(model, family)
    losses = [loss for row in json.loads(figures)["losses"] for loss in row.values()]
    assert delta.changed and np.isfinite(losses).all()
    # what the network is asked is what its own forward pass says
    graph = GraphModel(model, Clip(family))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with graph.temporarily_trainable():
        said = graph.encode(["a cat", "a dog"])
        assert said.hidden.shape == (2, 77, FAMILIES[family]["cross_attention_dim"])
        wanted = model.model.diffusion_model(x, t, said.hidden, {}, **said.extra)
        torch.testing.assert_close(graph.predict(x, t, said), wanted, rtol=1e-5, atol=1e-6)
    assert set(said.extra) == ({"y"} if family == "sdxl" else set())
    assert len(Weights(after)) == len(dict(model.model.diffusion_model.named_parameters()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_are_what_the_network_takes_for_the_picture(host: Any, prediction: str) -> None:
    """The sampler of this file makes one step: so samples are the guided network's x_0 from pure noise."""
    model = Patcher(prediction=prediction)
    graph = GraphModel(model, Clip())
    with prepared(graph, plan_of(graph, concept(), options_of({}, options()))):
        made = sample_latents(graph, ["a cat"], [5])
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))[None]
        t, said = torch.tensor([999]), graph.encode(["a cat", ""])
        asked, unasked = (graph.predict(noise, t, said[i : i + 1]) for i in range(2))
        output = unasked + graph.settings.sampling.guidance * (asked - unasked)
    a = graph.schedule.alphas_cumprod[999]
    eps = (noise - (1 - a).sqrt() * output) / a.sqrt()
    v = a.sqrt() * noise - (1 - a).sqrt() * output
    torch.testing.assert_close(made, eps if prediction == "epsilon" else v, rtol=1e-4, atol=1e-3)  # √ᾱ is 0.07


@pytest.mark.parametrize(
    ("sampler", "function"),
    [("auto", []), ("dpm++2m", []), ("ddim", ["euler"]), ("euler", ["euler"]), ("euler_a", ["euler_ancestral"]),
     ("lcm", ["lcm"])],
)  # fmt: skip
def test_graph_samples_by_the_named_sampler_of_comfyui(host: Any, sampler: str, function: list[str]) -> None:
    """Each sample adds noise of its own seed; guidance 1 takes one pass."""
    graph = GraphModel(Patcher(), Clip())
    rows, predict = [], graph.predict

    def counted(x: Tensor, t: Tensor, said: Any) -> Tensor:
        rows.append(len(x))
        return predict(x, t, said)

    graph.predict = counted  # type: ignore[method-assign]
    wanted = options_of({}, options(sampler=sampler, sampling_steps=3, sampling_guidance=1.0))
    with prepared(graph, plan_of(graph, concept(), wanted)):
        made = sample_latents(graph, ["a cat", "a cat"], [5, 6])
        alone = sample_latents(graph, ["a cat"], [6])
        facts = graph.sampler_facts()
    assert host.samplers == function * 2 and rows == [2, 1]
    torch.testing.assert_close(made[1:], alone, rtol=1e-4, atol=1e-3)
    assert (function or ["dpmpp_2m"])[0] in facts["sampler"]


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
    (nudity,) = call("SalUnConcept", preset="nudity")
    shown = erased(Patcher(), concept=nudity, eval_images=1, show_sensitive=True)[2]
    host.bar.clear()
    blurred = erased(Patcher(), concept=nudity, eval_images=1)[2]
    assert not host.bar and blurred.shape == shown.shape and not torch.equal(blurred, shown)


@pytest.mark.parametrize(
    ("preset", "show", "blurred"), [("nudity", False, True), ("nudity", True, False), ("van gogh", False, False)]
)
def test_previews_of_sensitive_concepts_are_blurred(host: Any, preset: str, show: bool, blurred: bool) -> None:
    model = Patcher()
    model.model.latent_format.latent_rgb_factors = [[0.0] * 3] * 4
    (of,) = call("SalUnConcept", preset=preset)
    erased(model, concept=of, show_sensitive=show)
    pictures = [preview[1] for preview in host.previews if preview is not None]
    assert pictures
    for picture, guess in zip({id(p): p for p in pictures}.values(), host.guesses, strict=True):
        clear = guess[0, :3].movedim(0, -1).sigmoid().mul(255).byte().numpy()
        small = np.asarray(picture.resize((8, 8), Image.Resampling.NEAREST))
        assert np.array_equal(small, clear) != blurred


@pytest.mark.parametrize("kind", ["SalUnTrainingData", "SalUnSaliencyMask", "SalUnEvaluate"])
@pytest.mark.parametrize(("preset", "blurred"), [("nudity", True), ("van gogh", False)])
def test_what_is_sampled_is_shown_and_blurred_alike(host: Any, kind: str, preset: str, blurred: bool) -> None:
    model, after = Patcher(), Patcher(prediction="v_prediction")
    for one in (model, after):
        one.model.latent_format.latent_rgb_factors = [[0.0] * 3] * 4
    wired = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()["required"]  # type: ignore[attr-defined]
    parts = {"model": model, "before": model, "after": after, "clip": Clip(), "vae": Vae(), "eval_images": 1}
    (of,) = call("SalUnConcept", preset=preset)
    call(kind, **{name: part for name, part in parts.items() if name in wired}, concept=of, options=options())
    assert len(host.previews) == len(host.bar) and all(host.previews), "from the first sample on"
    for (_, picture, _), guess in zip(host.previews, host.guesses, strict=True):
        clear = guess[0, :3].movedim(0, -1).sigmoid().mul(255).byte().numpy()
        small = np.asarray(picture.resize((8, 8), Image.Resampling.NEAREST))
        assert np.array_equal(small, clear) != blurred


def test_an_interrupt_is_comfyuis_own_and_the_next_run_goes_on_from_it(host: Any) -> None:
    whole = erased(Patcher(), steps=6)[1]
    wanted = len(host.bar)
    forget_all(host)
    host.interrupt_at = wanted - 2  # after step 4 of 6
    with pytest.raises(Interrupt) as caught:
        erased(Patcher(), steps=6)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "wrapped" and caught.value.__context__ is None, "frames of the training would hold its memory"
    (left,) = (cache().folder / "unfinished").iterdir()
    assert (left / "state/training.safetensors").exists()
    host.interrupt_at = None
    host.bar.clear()
    again = erased(Patcher(), steps=6)[1]  # another object, as after a restart
    assert again.result_hash == whole.result_hash
    end = host.bar[-1][1]
    assert [value for value, _ in host.bar if value > end - 6] == [end - 1, end], "it began anew"
    assert not list((cache().folder / "unfinished").iterdir())


@pytest.mark.parametrize("damage", ["run.json", "state/training.safetensors", "state/mask.safetensors", "other"])
def test_a_state_that_is_damaged_or_of_others_is_not_taken_up(host: Any, damage: str) -> None:
    whole = erased(Patcher(), steps=6)[1]
    left = stopped(host)
    if damage == "other":
        assert erased(Patcher(), steps=5)[1].result_hash != whole.result_hash
        assert not left.exists()
    else:
        (left / damage).write_bytes((left / damage).read_bytes()[:20])
        assert erased(Patcher(), steps=6)[1].result_hash == whole.result_hash


def test_without_a_cache_nothing_is_kept_of_an_interrupted_run(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALUN_CACHE_SIZE", "0")
    host.interrupt_at = 8
    with pytest.raises(Interrupt):
        erased(Patcher())
    assert not list((host.root / "user").rglob("*.safetensors"))
    host.interrupt_at = None
    assert erased(Patcher())[1].changed


def test_deltas_stack_and_other_data_are_refused(host: Any) -> None:
    model = Patcher()
    after, delta, _, _ = erased(model)
    (half,) = call("SalUnApplyDelta", model=model, delta=delta, strength=0.5)
    (twice,) = call("SalUnApplyDelta", model=half, delta=delta, strength=0.5)
    for name, tensor in Weights(after).items():
        torch.testing.assert_close(Weights(twice)[name], tensor, rtol=2.0**-21, atol=1e-8)  # two roundings of fp32
    (data,) = call("SalUnTrainingData", model=model, clip=Clip(), concept=concept("a cow"), options=options())
    assert isinstance(data, Data)
    with pytest.raises(SalunError, match="the training data are of a cow"):
        erased(model, given_data=data)


def test_pictures_take_the_place_of_samples(host: Any) -> None:
    images = torch.rand(3, 80, 64, 3)
    parts = {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept(), "options": options()}
    (data,) = call("SalUnTrainingData", **parts, forget_images=images, retain_images=images, retain_captions="a\nb\nc")
    assert data.content.forget_latents.shape == (3, 4, 8, 8)
    with pytest.raises(SalunError, match="2 lines for 3"):
        call("SalUnTrainingData", **parts, retain_images=images, retain_captions="a\nb")
    with pytest.raises(SalunError, match="retain_captions are of"):
        call("SalUnTrainingData", **parts, forget_images=images, retain_captions="a\nb\nc")
    with pytest.raises(SalunError, match="both given"):
        call("SalUnTrainingData", **parts, forget_images=images, forget_samples={"samples": torch.rand(1, 4, 8, 8)})


def test_the_bar_of_training_data_fills(host: Any) -> None:
    parts = {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept(), "options": options()}
    images = torch.rand(3, 64, 64, 3)
    for own in ({}, {"forget_images": images}, {"retain_images": images}):
        host.bar.clear()
        call("SalUnTrainingData", **parts, **own)
        assert host.bar[-1][0] == host.bar[-1][1] > 0


def test_the_bar_of_several_concepts_fills(host: Any) -> None:
    """Each concept's own saliency begins at 1 again."""
    saliency_mask(Patcher(), concept("a cat", "a cow"), combine="union")
    values = [value for value, _ in host.bar]
    assert values[-4 * 2 * 2 :] == list(range(5, 5 + 4 * 2 * 2)) and values[-1] == host.bar[-1][1]
    host.bar.clear()
    erased(Patcher(), concept=concept("a cat", "a cow"), combine="union")
    assert host.bar[-1][0] == host.bar[-1][1]


@pytest.mark.parametrize(("state", "low"), [("LOW_VRAM", True), ("NO_VRAM", True), ("NORMAL_VRAM", False)])
def test_a_comfyui_that_was_started_for_little_memory_trains_with_little(
    host: Any, monkeypatch: pytest.MonkeyPatch, state: str, low: bool
) -> None:
    monkeypatch.setattr(sys.modules["comfy.model_management"], "vram_state", types.SimpleNamespace(name=state))
    assert json.loads(erased(Patcher())[3])["options"]["low_vram"] is low


def test_errors_name_inputs_and_nodes_not_the_command_line(host: Any) -> None:
    model = Patcher()
    mask, _ = saliency_mask(model)
    other = Patcher()
    for _, p in other.model.diffusion_model.named_parameters():
        p.data = p.data + 1e-3
    delta = erased(model)[1]
    failing: list[tuple[Any, str]] = [
        (lambda: erased(model, lr=2.0), "lr is 2.0"),
        (lambda: erased(model, resolution=60), "resolution 60"),
        (lambda: erased(model, recipe="paper", concept=call("SalUnConcept", preset="van gogh")[0]), "recipe paper"),
        (lambda: erased(model, given_mask=mask, scope="xattn"), "with scope full"),
        (lambda: erased(other, given_mask=mask), "make one with SalUn Saliency Mask"),
        (lambda: erased(model, optimizer="adam8bit"), "optimizer adam8bit"),
        (lambda: erased(model, retain_latents=0, anchor_share=0.0), "retain_latents above 0"),
        (lambda: call("SalUnApplyDelta", model=other, delta=delta), "SalUn Apply Delta's base_checkpoint"),
    ]
    for run, said in failing:
        with pytest.raises(SalunError) as caught:
            run()
        assert said in str(caught.value) and "--" not in str(caught.value), caught.value
    assert in_inputs_names("give --retain-prompts and --clip-skip 2") == "give retain_prompts and clip_skip 2"


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_what_was_kept_counts_as_used_and_is_made_again_if_it_is_damaged(host: Any) -> None:
    model = Patcher()
    mask, delta = saliency_mask(model)[0], erased(model)[1]
    for path, _, _ in cache().entries():
        os.utime(path, (1, 1))
    host.bar.clear()
    assert saliency_mask(model)[0] == mask and erased(model)[1].result_hash == delta.result_hash and not host.bar
    used = [path for path, _, at in cache().entries() if at > 1]
    assert len(used) == 3, "a mask, a delta, and its pictures"
    for path in used:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1  # of the last tensor
        path.write_bytes(content)
        host.bar.clear()
        assert saliency_mask(model)[0] == mask and erased(model)[1].result_hash == delta.result_hash
        assert host.bar, path
    assert saliency_mask(model)[1] == saliency_mask(Patcher())[1]


def test_all_that_a_result_depends_on_is_in_what_it_is_kept_by(host: Any) -> None:
    def key(model: Any = None, clip: Any = None, vae: Any = None, of: Any = None, **changes: Any) -> str:
        wires = (changes.pop("given_data", None), changes.pop("given_mask", None))
        graph = GraphModel(model or Patcher(), clip or Clip(), vae or Vae())
        plan = plan_of(graph, of or concept(), options_of(changes, options()))
        return str(record_of("erasure", graph, plan, *wires).fingerprint)

    first, widened, patched, heads, scale = key(), Patcher(), Patcher(), Patcher(), Patcher()
    assert key() == first
    next(iter(widened.model.diffusion_model.named_parameters()))[1].data.view(-1)[0] += 1
    patched = call("SalUnApplyDelta", model=patched, delta=erased(patched)[1])[0]
    heads.model.model_config.unet_config["num_heads"] = 5
    scale.model.latent_format.scale_factor = 0.25
    zero = Patcher()
    zero.sampling.sigmas = zero.sampling.sigmas * 1.5
    (data,) = call("SalUnTrainingData", model=Patcher(), clip=Clip(), concept=concept(), options=options())
    (more,) = call("SalUnTrainingData", model=Patcher(), clip=Clip(), concept=concept(), options=options(), seed=1)
    mask = saliency_mask(Patcher())[0]
    graphs = {
        "weights": key(widened),
        "a patch": key(patched),
        "heads": key(heads),
        "prediction": key(Patcher(prediction="v_prediction")),
        "schedule": key(zero),
        "text encoder": key(clip=Clip(weights="other")),
        "an embedding that a prompt names": key(of=concept("embedding:cat")),
        "that embedding's file": key(of=concept("embedding:cat"), clip=Clip(embedding="other")),
        "one among prompts to keep": key(of=concept(retain_prompts="a house\nan embedding:cat")),
        "and its file": key(of=concept(retain_prompts="a house\nan embedding:cat"), clip=Clip(embedding="other")),
        "a negative prompt's": key(negative_prompt="embedding:bad"),
        "that one's file": key(negative_prompt="embedding:bad", clip=Clip(embedding="other")),
        "vae": key(vae=Vae(1)),
        "latents' scale": key(scale),
        "concept": key(of=concept("a cow")),
        "anchor": key(of=(replace(concept()[0], anchor="a cow"),)),
        "prompts to keep": key(of=concept(retain_prompts="a house")),
        "data": key(given_data=data),
        "other data": key(given_data=more),
        "mask": key(given_mask=mask),
        "another mask": key(given_mask=mask.shuffled(1)),
    }
    changed: dict[str, Any] = {
        **{"mask": "random", "density": 0.4, "steps": 7, "batch_size": 3, "lr": 1e-4, "retain_weight": 2.0},
        **{"eval_images": 3, "seed": 9, "prompt_style": "tags", "negative_prompt": "blurry", "clip_skip": 2},
        **{"resolution": 128, "forget_latents": 3, "retain_latents": 3, "combine": "union", "scope": "xattn"},
        **{"method": "salun-soft", "guidance": 3.0, "lr_decay": 0.1, "target": "online", "retain_target": "noise"},
        **{"anchor_share": 0.25, "optimizer": "adam8bit", "dtype": "bf16", "low_vram": True, "show_sensitive": True},
        **{"gradient_checkpointing": True, "deterministic": False},
        **{"sampling_steps": 3, "sampling_guidance": 1.0, "sampler": "lcm"},
    }
    assert set(changed) | {"recipe"} == {*SHARED, *OWN}, "recipe is in the numbers that it gives"
    keys = {
        **graphs,
        **{name: key(**{name: value}) for name, value in changed.items() if name not in NOT_IN_FINGERPRINT},
    }
    assert len({first, *keys.values()}) == len(keys) + 1, [name for name in keys if keys[name] == first]
    assert key(show_sensitive=True) == first


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


def test_folders_that_are_links_are_written_to_and_read(host: Any) -> None:
    """Users keep models on another disk; what a name may not do is lead out."""
    mask = Mask.full({"conv_in.weight": torch.zeros(40)})
    for folder in ("elsewhere/salun", "elsewhere/sub", "output"):
        (host.root / folder).mkdir(parents=True)
    (host.root / "output/salun").symlink_to(host.root / "elsewhere/salun", target_is_directory=True)
    (host.root / "elsewhere/salun/linked").symlink_to(host.root / "elsewhere/sub", target_is_directory=True)
    (host.root / "elsewhere/sub/loop").symlink_to(host.root / "elsewhere/salun", target_is_directory=True)
    for prefix in ("mine", "linked/mine"):
        (name,) = call("SalUnSaveMask", mask=mask, filename_prefix=prefix)
        assert name == f"{prefix}_00001_.mask.safetensors"
        assert call("SalUnLoadMask", file=name)[0] == mask
    assert (host.root / "elsewhere/sub/mine_00001_.mask.safetensors").is_file()


def test_a_checkpoint_is_patched_and_only_another_base_asks_for_the_graphs_parts(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Patcher()
    own = {f"model.{key}": value[0][0] for key, value in model.get_key_patches("diffusion_model.").items()}
    safetensors_io.write(host.root / "own.safetensors", {**own, "first_stage_model.x": torch.ones(3)})
    safetensors_io.write(host.root / "other.safetensors", {name: tensor + 1e-3 for name, tensor in own.items()})
    (host.root / "cut.safetensors").write_bytes((host.root / "own.safetensors").read_bytes()[:-8])
    after, delta, _, _ = erased(model)
    saved: list[str] = []
    sd = types.ModuleType("comfy.sd")
    sd.save_checkpoint = lambda path, *parts, **notes: saved.append(path) or Path(path).write_bytes(b"")  # type: ignore
    monkeypatch.setitem(sys.modules, "comfy.sd", sd)

    def save(**given: Any) -> Any:
        return call("SalUnSaveErasedCheckpoint", delta=delta, filename_prefix="new", **given)

    parts = {"model": after, "clip": Clip(), "vae": Vae()}
    name, told = save(ckpt_name="own.safetensors", **parts)
    assert "tensors changed" in told and not saved
    written = dict(safetensors_io.tensors(host.root / "output/checkpoints" / name))
    for ours, tensor in delta.apply(Weights(model)).items():
        assert torch.equal(written[unet_to_ldm(Weights(model))[ours]], tensor)
    with pytest.raises(SalunError, match=r"choose the checkpoint that was loaded.*connect model, clip and vae"):
        save(ckpt_name="other.safetensors")
    with pytest.raises(SalunError, match="not a valid safetensors file"):  # which no other saver may hide
        save(ckpt_name="cut.safetensors", **parts)
    with pytest.raises(SalunError, match=r"is no \.safetensors checkpoint"):
        save(ckpt_name="gone.safetensors", **parts)
    for file in ("other.safetensors", "own.safetensors"):
        with pytest.raises(SalunError, match="does not hold this erasure"):
            save(ckpt_name=file, **{**parts, "model": model})
    damaged = replace(delta, result_hash="0" * 64)
    with pytest.raises(SalunError, match="damaged"):
        call("SalUnSaveErasedCheckpoint", delta=damaged, filename_prefix="n", ckpt_name="own.safetensors")
    assert not saved
    name, told = save(ckpt_name="other.safetensors", **parts)
    assert len(saved) == 1 and "own saver" in told and name == "new_00002_.safetensors"


# -- before and after the work ----------------------------------------------------------------------------------------

SAVERS = ("SalUnSaveMask", "SalUnSaveDelta", "SalUnSaveErasedCheckpoint", "SalUnSaveAsLora")


@pytest.mark.parametrize("kind", SAVERS)
def test_a_bad_name_is_refused_before_anything_runs(host: Any, kind: str) -> None:
    """ComfyUI asks VALIDATE_INPUTS with the inputs that it names, None for one that another node will give."""
    made: Any = NODE_CLASS_MAPPINGS[kind]
    named = inspect.signature(made.VALIDATE_INPUTS).parameters
    assert set(named) <= {name for part in made.INPUT_TYPES().values() for name in part}
    (host.root / "output").mkdir()
    for folder in ("salun", "checkpoints", "loras"):
        (host.root / "output" / folder).mkdir()
        (host.root / "output" / folder / "file").write_bytes(b"")
    before = sorted(host.root.rglob("*"))
    for bad in ("../out", "/tmp/out", "a/../../out", "C:\\out", " ", "folder/", "file/name", "a\0b", "ü" * 101):
        assert "filename_prefix" in made.VALIDATE_INPUTS(filename_prefix=bad), bad
    for good in ("erased", "folder/erased", "%year%/a", "ü" * 100, None):
        assert made.VALIDATE_INPUTS(filename_prefix=good) is True
    assert sorted(host.root.rglob("*")) == before


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_runs(host: Any) -> None:
    made: Any = NODE_CLASS_MAPPINGS["SalUnSaveErasedCheckpoint"]
    assert "gone.safetensors is no" in made.VALIDATE_INPUTS(filename_prefix="a", ckpt_name="gone.safetensors")
    safetensors_io.write(host.root / "own.safetensors", {"x": torch.ones(2)})
    assert made.VALIDATE_INPUTS(filename_prefix="a", ckpt_name="own.safetensors") is True
    (host.root / "cut.safetensors").write_bytes((host.root / "own.safetensors").read_bytes()[:-2])
    assert "not a valid safetensors file" in made.VALIDATE_INPUTS(filename_prefix="a", ckpt_name="cut.safetensors")
    assert made.VALIDATE_INPUTS(filename_prefix="a", ckpt_name=None) is True


@pytest.fixture
def stock_saves(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ComfyUI's own saver was given, each time."""
    saved: list[dict[str, Any]] = []

    def save_checkpoint(path: str, model: Any, clip: Any, vae: Any, **more: Any) -> None:
        saved.append(more)
        Path(path).write_bytes(b"")

    sd = types.ModuleType("comfy.sd")
    vars(sd)["save_checkpoint"] = save_checkpoint
    monkeypatch.setitem(sys.modules, "comfy.sd", sd)
    return saved


def other_file(host: Any, model: Any) -> str:
    """A checkpoint that is not the model's own, so that only ComfyUI's saver can write the graph's."""
    own = {f"model.{key}": value[0][0] for key, value in model.get_key_patches("diffusion_model.").items()}
    safetensors_io.write(host.root / "other.safetensors", {name: tensor + 1e-3 for name, tensor in own.items()})
    return "other.safetensors"


def test_the_stock_saver_writes_a_whole_erasure_or_nothing(host: Any, stock_saves: list[Any]) -> None:
    """What is labelled erased is: the same entries with other values, or the erasure in part, are not."""
    model = Patcher()
    file = other_file(host, model)
    mask = saliency_mask(model)[0]
    after, delta, _, _ = erased(model, given_mask=mask)
    other, another, _, _ = erased(model, given_mask=mask, lr=5e-3)
    places = [(patch[1].weights[0], key) for key, found in other.patches.items() for patch in found]
    assert places and all(torch.equal(after.patches[key][0][1].weights[0], at) for at, key in places)

    def apply(to: Any, strength: float, of: Delta = delta) -> Any:
        return call("SalUnApplyDelta", model=to, delta=of, strength=strength)[0]

    merged = after.clone()
    for found in merged.patches.values():
        found.append((0.5, ("diff", (torch.zeros(1),)), 0.5, None, None))
    reset = after.clone()
    for found in reset.patches.values():
        found.append((1.0, ("set", (torch.zeros(1),)), 1.0, None, None))
    parts = {"delta": delta, "ckpt_name": file, "filename_prefix": "new", "clip": Clip(), "vae": Vae()}
    for wrong in (model, apply(model, 0.0), apply(model, 0.5), apply(after, -0.5), other, merged, reset):
        with pytest.raises(SalunError, match="does not hold this erasure"):
            call("SalUnSaveErasedCheckpoint", model=wrong, **parts)
    assert not stock_saves
    for right in (after, apply(apply(model, 0.5), 0.5), apply(after, 0.3, another)):
        call("SalUnSaveErasedCheckpoint", model=right, **parts)
    assert len(stock_saves) == 3


def test_what_a_graph_adds_to_an_erasure_is_in_the_file_or_refused(host: Any, stock_saves: list[Any]) -> None:
    """The delta alone would fit the source file, and a second erasure or a LoRA would silently be missing there."""
    model = Patcher()
    own = {f"model.{key}": value[0][0] for key, value in model.get_key_patches("diffusion_model.").items()}
    safetensors_io.write(host.root / "own.safetensors", own)
    after, delta, _, _ = erased(model)
    second = erased(model, concept=concept("a cow"))[1]
    (both,) = call("SalUnApplyDelta", model=after, delta=second, strength=1.0)
    (weak,) = call("SalUnApplyDelta", model=model, delta=delta, strength=0.3)
    tuned = Clip()
    tuned.patcher.patches["layer"] = [(1.0, ("diff", (torch.ones(1),)), 1.0, None, None)]
    parts = {"delta": delta, "ckpt_name": "own.safetensors", "filename_prefix": "new"}
    for model_, clip, why in ((both, Clip(), "model has other patches"), (after, tuned, "CLIP has patches")):
        told = call("SalUnSaveErasedCheckpoint", model=model_, clip=clip, vae=Vae(), **parts)[1]
        assert "own saver" in told and why in told
    assert len(stock_saves) == 2
    with pytest.raises(SalunError, match="does not hold this erasure"):
        call("SalUnSaveErasedCheckpoint", model=weak, clip=Clip(), vae=Vae(), **parts)
    made: Any = NODE_CLASS_MAPPINGS["SalUnSaveErasedCheckpoint"]
    for some in ({"model": weak}, {"clip": tuned}, {"model": both, "vae": Vae()}):
        assert "or none of them" in made.VALIDATE_INPUTS("new", "own.safetensors", **dict.fromkeys(some))
        with pytest.raises(SalunError, match="or none of them"):
            call("SalUnSaveErasedCheckpoint", **some, **parts)
    assert len(stock_saves) == 2


def test_a_patch_can_be_made_anew_of_its_keys_and_weights(host: Any) -> None:
    """As ComfyUI's `prefetch_prepared_value` does for every patch when it streams weights to a GPU."""
    after, _, _, _ = erased(Patcher())
    key, (patch, *_) = next(iter(after.patches.items()))
    adapter = patch[1]
    moved = tuple(part.clone() if isinstance(part, Tensor) else part for part in adapter.weights)
    again = type(adapter)(adapter.loaded_keys, moved)
    weight = after.get_key_patches("diffusion_model.")[key][0][0]
    one, two = (each.calculate_weight(weight.clone(), key, 1.0, 1.0, None, None) for each in (adapter, again))
    assert torch.equal(one, two) and not torch.equal(one, weight)


@pytest.mark.parametrize(("here", "there"), [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_a_delta_of_a_copy_in_another_dtype_adds_its_differences(
    host: Any, here: torch.dtype, there: torch.dtype
) -> None:
    """The model is rounded to the delta's dtype to know it, and moves by what the erasure moved there."""
    model, copy = Patcher(), Patcher()
    for p, q in zip(*(each.model.diffusion_model.parameters() for each in (model, copy)), strict=True):
        p.data = p.data.to(here)
        q.data = p.data.to(there)
    delta = erased(copy, lr=1e-2)[1]
    assert {change.dtype for change in delta.changes.values()} == {there}
    (applied,) = call("SalUnApplyDelta", model=model, delta=delta, strength=1.0)
    base, was, new = Weights(model), Weights(copy), delta.apply(Weights(copy))
    now = Weights(applied)
    step = torch.finfo(here).eps  # one rounding of the sum
    for name in base:
        moved = new[name].float() - was[name].float() if name in new else torch.zeros(())
        want = base[name].float() + moved
        assert ((now[name].float() - want).abs() <= step * want.abs() + 1e-7).all(), name
    lora = call("SalUnSaveAsLora", model=model, delta=delta, kind="every difference", filename_prefix="x")[0]
    (first, *_) = (name for name, tensor in new.items() if tensor.dim() > 1)
    stored = dict(safetensors_io.tensors(host.root / "output/loras" / lora))
    differences = [tensor for tensor in stored.values() if tensor.shape == new[first].shape]
    moved = new[first].float() - was[first].float()
    assert any(torch.allclose(found.float(), moved, rtol=1e-3, atol=1e-7) for found in differences)


def test_a_mask_that_does_not_fit_is_refused_before_the_sampling(host: Any) -> None:
    model = Patcher()
    mask, _ = saliency_mask(model)
    other = Patcher()
    for parameter in other.model.diffusion_model.parameters():
        parameter.data = parameter.data + 1e-3
    (empty, _) = call("SalUnCombineMasks", first=mask, second=mask, operation="first without second")
    host.bar.clear()
    for match, given in (
        ("salun-soft finds its mask", {"method": "salun-soft"}),
        ("was made with scope", {"scope": "xattn"}),
        ("from another model", {"model": other}),
        ("selects no weight", {"given_mask": empty}),
    ):
        with pytest.raises(SalunError, match=match):
            erased(**{"model": model, "given_mask": mask, **given})
        assert not host.bar, match


def test_the_figures_of_salun_soft_tell_the_mask_that_it_found(host: Any) -> None:
    _, delta, _, figures = erased(Patcher(), method="salun-soft", density=0.1, steps=4)
    told = json.loads(figures)["mask"]
    assert told["selected"] < told["total"] and told["density"] == told["selected"] / told["total"]
    assert delta.changed <= told["selected"]


def test_a_file_is_not_hidden_by_one_of_its_name_elsewhere(host: Any) -> None:
    """ComfyUI looks into models/ first: a file moved there, and another saved under its name, would be mixed up."""
    model = Patcher()
    own = {f"model.{key}": value[0][0] for key, value in model.get_key_patches("diffusion_model.").items()}
    safetensors_io.write(host.root / "own.safetensors", own)
    delta = erased(model)[1]
    (host.root / "new_00001_.safetensors").write_bytes(b"moved here")  # where the stand-in's lists look first
    name, _ = call("SalUnSaveErasedCheckpoint", delta=delta, ckpt_name="own.safetensors", filename_prefix="new")
    assert name == "new_00002_.safetensors"
    mask = Mask.random({"conv_in.weight": torch.zeros(40)}, 0.5, 0)
    (mine,) = call("SalUnSaveMask", mask=mask, filename_prefix="mask")
    (host.root / "input").mkdir(exist_ok=True)
    mask.shuffled(3).save(host.root / "input" / mine)
    assert call("SalUnLoadMask", file=mine)[0] == mask
    assert call("SalUnLoadMask", file=f"{mine} [input]")[0] == mask.shuffled(3)


def test_what_the_core_says_is_in_the_log(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    parts = {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept(), "options": options()}
    captions = "a horse\na cat on a wall\na tree"
    call("SalUnTrainingData", **parts, retain_images=torch.rand(3, 80, 64, 3), retain_captions=captions)
    assert "1 pictures to keep left out" in caplog.text


def test_odd_pictures_are_taken_or_refused_in_words(host: Any) -> None:
    parts = {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept(), "options": options()}
    (grey,) = call("SalUnTrainingData", **parts, forget_images=torch.full((2, 64, 64, 1), 0.5))
    (same,) = call("SalUnTrainingData", **parts, forget_images=torch.full((2, 64, 64, 3), 0.5))
    assert grey.digest == same.digest
    for match, given in (
        ("forget_images is an empty batch", {"forget_images": torch.rand(0, 64, 64, 3)}),
        ("retain_samples is an empty batch", {"retain_samples": {"samples": torch.rand(0, 4, 8, 8)}}),
    ):
        with pytest.raises(SalunError, match=match):
            call("SalUnTrainingData", **parts, **given)


def test_the_stock_saver_is_told_the_schedule(host: Any, stock_saves: list[Any]) -> None:
    """As ComfyUI's own node tells it: nothing else in an SDXL file says v-prediction, or a schedule that ends in noise.

    The empty keys are the ones that its loader looks for.
    """
    for prediction, zero, keys in (
        ("epsilon", False, []),
        ("v_prediction", False, ["v_pred"]),
        ("v_prediction", True, ["v_pred", "ztsnr"]),
    ):
        model = Patcher("sdxl", prediction)
        model.sampling.zsnr = zero
        after, delta, _, _ = erased(model, "sdxl")
        parts = {"model": after, "clip": Clip(), "vae": Vae(), "filename_prefix": "new"}
        call("SalUnSaveErasedCheckpoint", delta=delta, ckpt_name=other_file(host, model), **parts)
        assert list(stock_saves[-1]["extra_keys"]) == keys
        assert all(tensor.numel() == 0 for tensor in stock_saves[-1]["extra_keys"].values())


def stopped(host: Any) -> Path:
    """An erasure of 6 steps that was interrupted after step 4; returns what it left."""
    erased(Patcher(), steps=6)
    wanted = len(host.bar)
    forget_all(host)
    host.interrupt_at = wanted - 2
    with pytest.raises(Interrupt):
        erased(Patcher(), steps=6)
    host.interrupt_at = None
    host.bar.clear()
    (left,) = (cache().folder / "unfinished").iterdir()
    return left


def trained_again(host: Any) -> int:
    """How many of the last 6 steps were told: of 2, where a stopped erasure went on."""
    end = host.bar[-1][1]
    return sum(value > end - 6 for value, _ in host.bar)


def test_what_a_stopped_run_left_has_its_room_already(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    unfinished = places.unfinished
    monkeypatch.setattr(erase_node, "unfinished", lambda *of: (asked.append(of[1]), unfinished(*of))[1])
    left = stopped(host)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=asked[0]))
    erased(Patcher(), steps=6)
    assert trained_again(host) == 2 and not left.exists()
    host.bar.clear()
    host.interrupt_at = 8
    with pytest.raises(Interrupt):  # a new one does ask for room
        erased(Patcher(), steps=5)
    assert not left.parent.exists() or not list(left.parent.rglob("*.safetensors"))


def test_a_trained_result_that_cannot_be_kept_is_not_trained_again(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(erase_node, "_keep", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            erased(Patcher(), steps=6)
    (left,) = (cache().folder / "unfinished").iterdir()
    host.bar.clear()
    assert erased(Patcher(), steps=6)[1].changed
    assert trained_again(host) == 1, "the last step's place alone is told anew"
    assert not left.exists()


def test_an_erasure_that_another_comfyui_is_at_runs_without_a_state(host: Any) -> None:
    left = stopped(host)
    with exclusive_lock(left):
        assert erased(Patcher(), steps=6)[1].changed
        assert trained_again(host) == 6 and (left / "state/training.safetensors").exists()


@pytest.mark.parametrize("kind", ["low rank", "every difference"])
def test_a_lora_tells_its_progress_can_be_stopped_and_says_what_it_is(host: Any, kind: str) -> None:
    model = Patcher()
    delta = erased(model)[1]
    host.bar.clear()
    host.interrupt_at = 3
    with pytest.raises(Interrupt):
        call("SalUnSaveAsLora", model=model, delta=delta, kind=kind)
    assert not list((host.root / "output").rglob("*.safetensors*"))
    host.interrupt_at = None
    host.bar.clear()
    name, _ = call("SalUnSaveAsLora", model=model, delta=delta, kind=kind)
    assert host.bar[-1][0] == host.bar[-1][1] >= len(delta.names)
    written = safetensors_io.read_header(host.root / "output/loras" / name).metadata
    assert stock_notes(delta).items() <= written.items()


def test_an_interrupt_is_seen_within_a_batch_of_the_figures(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answers, predict = evaluation._predict, GraphModel.predict

    def counted(graph: Any, x_t: Tensor, *more: Any) -> Tensor:
        asked.append(len(x_t))
        return predict(graph, x_t, *more)

    def interrupted_here(*args: Any, **kwargs: Any) -> Tensor:
        asked.clear()
        host.interrupt_at = 0
        return answers(*args, **kwargs)

    monkeypatch.setattr(GraphModel, "predict", counted)
    monkeypatch.setattr(evaluation, "_predict", interrupted_here)
    with pytest.raises(Interrupt):
        erased(Patcher(), eval_images=1)
    assert len(asked) == 1


def test_training_data_fit_their_erasure_or_say_which_input_does_not(host: Any) -> None:
    model, of = Patcher(), concept()
    (data,) = call("SalUnTrainingData", model=model, clip=Clip(), concept=of, options=options())
    assert erased(model, given_data=data)[1].changed
    failing: list[tuple[Any, str]] = [
        (lambda: erased(model, given_data=data, concept=concept("a cow")), "of a cat, the concept is a cow"),
        (lambda: erased(model, given_data=data, concept=(replace(of[0], anchor="a cow"),)), "anchors"),
        (lambda: erased(Patcher("sd2"), "sd2", given_data=data), "family sd1, this model is sd2"),
        (lambda: erased(model, given_data=data, resolution=128), "resolution 64, options here of 128"),
        (lambda: erased(model, given_data=data, concept=concept(retain_prompts="a house")), "retain_prompts"),
        (lambda: erased(model, given_data=data, prompt_style="tags"), "prompt_style"),
        (
            lambda: call(
                "SalUnSaliencyMask", model=model, clip=Clip(), concept=of, data=data, options=options(resolution=128)
            ),
            "resolution 64",
        ),
    ]
    for run, said in failing:
        host.bar.clear()
        with pytest.raises(SalunError) as caught:
            run()
        assert said in str(caught.value) and not host.bar, caught.value


def test_models_of_two_families_are_not_compared(host: Any) -> None:
    parts = {"clip": Clip(), "vae": Vae(), "concept": concept(), "options": options(), "eval_images": 1}
    with pytest.raises(SalunError, match="MODEL of sd1, after one of sd2"):
        call("SalUnEvaluate", before=Patcher(), after=Patcher("sd2"), **parts)
    assert not host.bar


@pytest.mark.parametrize(("asked", "found"), [(True, ":4096:8"), (False, None)])
def test_deterministic_prepares_cublas(
    host: Any, monkeypatch: pytest.MonkeyPatch, asked: bool, found: str | None
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    parts = {"model": Patcher(), "clip": Clip(), "concept": concept(), "options": options(deterministic=asked)}
    call("SalUnTrainingData", **parts)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == found


def test_an_interrupt_on_a_full_disk_is_an_interrupt(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    erased(Patcher(), steps=6)
    wanted = len(host.bar)
    forget_all(host)
    host.interrupt_at = wanted - 2
    full = lambda path: types.SimpleNamespace(free=0 if len(host.bar) >= wanted - 2 else 10**12)  # noqa: E731
    monkeypatch.setattr(places.shutil, "disk_usage", full)
    with pytest.raises(Interrupt):
        erased(Patcher(), steps=6)
    assert "the state to go on from is not saved" in caplog.text and "run.json is as it was" in caplog.text


def test_a_disk_that_fills_up_costs_the_means_to_resume_and_not_the_erasure(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = erased(Patcher(), steps=6)[1]
    end = len(host.bar)
    for full_from in (1, end - 2):
        forget_all(host)
        full = lambda path: types.SimpleNamespace(free=0 if len(host.bar) >= full_from else 10**12)  # noqa: E731, B023
        monkeypatch.setattr(places.shutil, "disk_usage", full)
        assert erased(Patcher(), steps=6)[1].result_hash == wanted.result_hash
        assert "run.json is as it was" in caplog.text
        caplog.clear()


def test_a_checkpoint_of_another_format_goes_through_the_stock_saver(host: Any, stock_saves: list[Any]) -> None:
    (host.root / "old.ckpt").write_bytes(b"x")
    model = Patcher()
    after, delta, _, _ = erased(model)
    parts = {"delta": delta, "ckpt_name": "old.ckpt", "filename_prefix": "new"}
    wires = {"model": after, "clip": Clip(), "vae": Vae()}
    made: Any = NODE_CLASS_MAPPINGS["SalUnSaveErasedCheckpoint"]
    linked: dict[str, Any] = dict.fromkeys(wires)  # what ComfyUI says of links before anything runs
    assert made.VALIDATE_INPUTS("new", "old.ckpt", **linked) is True
    for missing in wires:
        some = {name: value for name, value in linked.items() if name != missing}
        assert "connect model, clip and vae" in made.VALIDATE_INPUTS("new", "old.ckpt", **some)
        with pytest.raises(SalunError, match="connect model, clip and vae"):
            call("SalUnSaveErasedCheckpoint", **parts, **{n: v for n, v in wires.items() if n != missing})
    with pytest.raises(SalunError, match="does not hold this erasure"):
        call("SalUnSaveErasedCheckpoint", **parts, **{**wires, "model": model})
    assert not stock_saves
    name, told = call("SalUnSaveErasedCheckpoint", **parts, **wires)
    assert len(stock_saves) == 1 and name == "new_00001_.safetensors" and "old.ckpt is no .safetensors file" in told


@pytest.mark.parametrize("mask", ["random", "full"])
def test_a_mask_that_no_gradient_finds_needs_no_samples(host: Any, mask: str) -> None:
    parts = {"model": Patcher(), "clip": Clip(), "concept": concept(), "options": options()}
    found, _ = call("SalUnSaliencyMask", **parts, mask=mask, density=0.2)
    assert not host.bar and found.density == pytest.approx(1.0 if mask == "full" else 0.2, abs=1e-4)


def test_a_delta_that_is_too_large_for_the_cache_is_told(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SALUN_CACHE_SIZE", "10KB")
    erased(Patcher())
    assert "MB are not kept" in caplog.text and "SALUN_CACHE_SIZE" in caplog.text


def test_the_installer_asks_for_what_the_nodes_import() -> None:
    asked = runpy.run_path(str(ROOT / "install.py"))["NEEDED"]
    assert {"torch", "filelock", "numpy", "PIL", "yaml", "psutil", "safetensors"} == set(asked)
