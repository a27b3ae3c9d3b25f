"""The nodes, called as ComfyUI's server calls them, with a stand-in for ComfyUI.

The stand-in is the least that the nodes use: a MODEL's clone, patches and key patches, the paths, the progress bar, and
diffusers' UNet under ComfyUI's names. `test_comfyui_real.py` runs the real ComfyUI.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import os
import re
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
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from comfy_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, storage
from comfy_nodes import erase as erase_node
from comfy_nodes.execution import graph_and_plan, run_record
from comfy_nodes.export import loaded_checkpoint
from comfy_nodes.families import schedule_keys
from comfy_nodes.inputs import GRAPH_OPTIONS, METHOD, NODE_OPTIONS, SHARED, erase_options
from comfy_nodes.look_inputs import ATTACK, EVALUATION, LookInputs
from comfy_nodes.model import GraphModel
from comfy_nodes.storage import cache
from comfy_nodes.types import inputs_of
from comfy_nodes.weights import Weights, module_order
from salun import Delta, Mask, SalunError
from salun.checkpoints import safetensors_io
from salun.checkpoints.keymap import unet_from_ldm, unet_to_ldm
from salun.checkpoints.locate import aliases
from salun.delta.stock_formats import stock_notes
from salun.detectors import DETECTORS
from salun.diffusion import evaluation
from salun.diffusion.context import training_session
from salun.diffusion.data.latents import sample_latents
from salun.diffusion.options import EraseOptions
from salun.evaluation.calibration import Calibration
from salun.evaluation.verdict import Outcome, Verdict
from salun.options import MASKS
from salun.runs.folder import exclusive_lock
from salun.runs.record import NOT_IN_FINGERPRINT
from tools import comfy_help, comfy_workflows
from tools.checkpoints import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}
FAMILIES = {  # their differences: the widths of the text and of SDXL's sizes, and linear projections
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


# -- the stand-in for ComfyUI -----------------------------------------------------------------------------------------


class UNetModel(nn.Module):
    """diffusers' UNet under ComfyUI's names."""

    def __init__(
        self, context_dim: int, dtype: Any = torch.float32, device: Any = None, operations: Any = None, **_: Any
    ) -> None:
        super().__init__()
        family = next(facts for facts in FAMILIES.values() if facts["cross_attention_dim"] == context_dim)
        with torch.device(device or "cpu"):
            self.inner = UNet2DConditionModel(**CONFIG, **family)
        if context_dim == 2048:
            self.inner.add_time_proj = nn.Flatten(0)  # ComfyUI embeds the sizes outside its network
            self.inner.add_time_proj.forward = lambda sizes: sizes.reshape(-1, 256)
        names = unet_to_ldm(dict(self.inner.named_parameters()))
        self.names = {name: ldm.removeprefix("model.diffusion_model.") for name, ldm in names.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([(self.names[name], p) for name, p in self.inner.named_parameters()])

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        back = {key: name for name, key in self.names.items()}
        return self.inner.load_state_dict({back[key]: t for key, t in state.items()}, strict=strict, assign=assign)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: Any, y: Any = None) -> Tensor:
        added = {"text_embeds": y[:, :1280], "time_ids": y[:, 1280:].reshape(-1, 256)} if y is not None else None
        return self.inner(x, t, context, added_cond_kwargs=added).sample


class ModelSamplingDiscrete:
    sigmas = (1 / torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0) - 1).sqrt()


class EPS:
    pass


class V_PREDICTION(EPS):
    pass


def model_sampling(prediction: str) -> Any:
    kind = EPS if prediction == "epsilon" else V_PREDICTION
    return type("ModelSampling", (ModelSamplingDiscrete, kind), {})()


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
        config = {"context_dim": width, "in_channels": 4, "channel_mult": [1], "adm_in_channels": adm}
        inner.model_config = types.SimpleNamespace(unet_config=config)
        self.sampling = model_sampling(prediction)
        inner.latent_format = types.SimpleNamespace(
            scale_factor=0.5, latent_rgb_factors=None, process_in=lambda x: x * 0.5, process_out=lambda x: x / 0.5
        )
        self.model, self.patches, self.patches_uuid = inner, {}, uuid.uuid4()

    def clone(self) -> Patcher:
        made = copy.copy(self)
        made.patches = {key: list(patches) for key, patches in self.patches.items()}
        return made

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.model.diffusion_model.named_parameters()]

    def get_model_object(self, name: str) -> Any:
        return self.sampling

    def get_key_patches(self, prefix: str) -> dict[str, Any]:
        named = self.model.diffusion_model.named_parameters()
        return {prefix + n: [(p.data, lambda a, **_: a), *self.patches.get(prefix + n, [])] for n, p in named}

    def add_patches(self, patches: Any, strength: float, strength_model: float) -> list[str]:
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch, strength_model, None, None))
        self.patches_uuid = uuid.uuid4()
        return list(patches)


class Clip:
    def __init__(self, family: str = "sd1", weights: str = "", embedding: str = "") -> None:
        self.patcher = types.SimpleNamespace(patches={})
        self.width = FAMILIES[family]["cross_attention_dim"]
        self.weights, self.embedding, self.layer = weights, embedding, 0

    def tokenize(self, text: str) -> str:
        return text

    def clone(self) -> Clip:
        return copy.copy(self)

    def clip_layer(self, layer: int) -> None:
        self.layer = layer

    def encode_from_tokens(self, text: str, return_pooled: bool) -> tuple[Tensor, Tensor | None]:
        embedding = self.embedding if "embedding:" in text else ""
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{text} {self.weights} {embedding} {self.layer}".encode()))
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


class Interrupt(BaseException):
    pass


class Host:
    """What the nodes did in ComfyUI, and when it interrupts them.

    stop_at: at this value of the bar; from its end if negative. root: holds its folders. saves: what its own checkpoint
    saver was given.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.stop_at = root, None
        self.bar, self.previews, self.latents, self.samplers, self.saves = [], [], [], [], []

    @property
    def stopping(self) -> bool:
        value, total = self.bar[-1] if self.bar else (0, 0)
        return self.stop_at is not None and value >= self.stop_at + (total if self.stop_at < 0 else 0)

    def check_interrupt(self) -> None:
        if (self.bar or self.stop_at == 0) and self.stopping:
            raise Interrupt

    def update_bar(self, value: int, total: int, preview: Any = None) -> None:
        self.bar.append((value, total))
        self.previews.append(preview)

    def decode_preview(self, x_0: Tensor) -> Image.Image:
        self.latents.append(x_0)
        return Image.fromarray(_pixels(x_0)).resize((64, 64), Image.Resampling.NEAREST)

    def sample(self, name: str, model: Any, x: Tensor, sigmas: Tensor, disable: bool, noise_sampler: Any = None) -> Any:
        self.samplers.append(name)
        if noise_sampler is not None:  # such samplers look for the schedule at one of these, by version
            assert model.inner_model.inner_model.model_sampling.sigmas is not None
            assert model.inner_model.model_patcher.get_model_object("model_sampling").sigmas is not None
        x = model(x, sigmas[0] * x.new_ones(len(x)))
        return x if noise_sampler is None else x + noise_sampler(sigmas[0], sigmas[1])

    def save_checkpoint(self, path: str, model: Any, clip: Any, vae: Any, **more: Any) -> None:
        self.saves.append(more)
        Path(path).write_bytes(b"")

    def full_path(self, kind: str, name: str) -> str | None:
        return str(self.root / name) if (self.root / name).exists() else None


def _pixels(x_0: Tensor) -> np.ndarray:
    return x_0[0, :3].movedim(0, -1).sigmoid().mul(255).byte().numpy()


class WeightAdapterBase:  # of the module, since the nodes keep their subclass of it
    pass


def calculate_weight(patches: Any, weight: Tensor, key: str) -> Tensor:
    for strength, patch, strength_model, offset, function in patches:
        weight = patch.calculate_weight(weight, key, strength, strength_model, offset, function)
    return weight


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    stand_in = Host(tmp_path)
    samplers = ("dpmpp_2m", "euler", "euler_ancestral", "lcm")
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": stand_in.check_interrupt,
            "soft_empty_cache": lambda: None,
            "get_torch_device": lambda: torch.device("cpu"),
            "in_training": False,
            "InterruptProcessingException": Interrupt,
            "vram_state": types.SimpleNamespace(name="NORMAL_VRAM"),
        },
        "comfy.utils": {"ProgressBar": lambda total: types.SimpleNamespace(update_absolute=stand_in.update_bar)},
        "comfy.lora": {"calculate_weight": calculate_weight},
        "comfy.weight_adapter": {"WeightAdapterBase": WeightAdapterBase},
        "comfy.ops": {"disable_weight_init": None},
        "comfy.sd": {"save_checkpoint": stand_in.save_checkpoint},
        "comfy.k_diffusion": {},
        "comfy.k_diffusion.sampling": {f"sample_{n}": functools.partial(stand_in.sample, n) for n in samplers},
        "folder_paths": {
            **{f"get_{n}_directory": lambda n=n: str(tmp_path / n) for n in ("output", "input", "user")},
            "get_filename_list": lambda kind: [],
            "get_full_path": stand_in.full_path,
            "get_save_image_path": lambda p, root: (str(Path(root) / Path(p).parent), Path(p).name, 1, "", p),
        },
        "latent_preview": {
            "get_previewer": lambda device, kind: None,
            "Latent2RGBPreviewer": lambda *_: types.SimpleNamespace(decode_latent_to_preview=stand_in.decode_preview),
        },
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
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # ComfyUI brings none
    return stand_in


def call(kind: str, /, **inputs: Any) -> Any:
    """A node as the server calls it: a fresh object, defaults for inputs without a value, in inference mode."""
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
    method = {name: changes.pop(name) for name in list(changes) if name in METHOD}
    (made,) = call("SalUnOptions", **{**SIZES, **changes})
    return call("SalUnMethod", options=made, **method)[0] if method else made


def concept(*names: str, **given: Any) -> Any:
    made: Any = ()
    for name in names or ("a cat",):
        (made,) = call("SalUnConcept", text=name, anchor="a dog", concept=made, **given)
    return made


def preset(name: str) -> Any:
    return call("SalUnConcept", preset=name)[0]


def parts(**changes: Any) -> dict[str, Any]:
    """Inputs that most nodes take."""
    return {"model": Patcher(), "clip": Clip(), "vae": Vae(), "concept": concept(), "options": options(), **changes}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, so that the same weights round to other values in two erasures."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def erased(model: Any, family: str = "sd1", **changes: Any) -> tuple[Any, Delta, Tensor, str]:
    """SalUn Erase and, for changes of options that are not its inputs, SalUn Options."""
    shared = {name: changes.pop(name) for name in list(changes) if name in SHARED}
    inputs = parts(model=model, clip=Clip(family), options=options(**shared), **TINY)
    after, delta, image, metrics, verdict, *_ = call("SalUnErase", **{**inputs, **changes})
    assert verdict.splitlines()[1].startswith("Next: ")
    return after, delta, image, metrics


@functools.cache
def erasure() -> tuple[Any, Any, Delta]:
    """(model, erased model, delta) of an erasure that tests share; they change none of them. Needs the host."""
    model = Patcher()
    return model, *erased(model)[:2]


@functools.cache
def six_steps() -> str:
    """The result hash of an erasure of 6 steps that was not interrupted. Needs the host."""
    return erased(Patcher(), steps=6)[1].result_hash


def saliency_mask(model: Any, of: Any = None, **shared: Any) -> tuple[Mask, str]:
    inputs = parts(model=model, concept=of or concept(), options=options(**shared))
    del inputs["vae"]
    made: tuple[Mask, str] = call("SalUnSaliencyMask", **inputs, batch_size=1, density=0.2)
    return made


def shifted(by: float = 1e-3) -> Patcher:
    """A MODEL of other weights."""
    model = Patcher()
    for p in model.parameters():
        p.data = p.data + by
    return model


def checkpoint(path: Path, model: Any, by: float = 0.0, **more: Tensor) -> str:
    """Writes a checkpoint with the MODEL's weights, shifted; returns its name."""
    keys = model.get_key_patches("diffusion_model.").items()
    safetensors_io.write(path, {f"model.{key}": value[0][0] + by for key, value in keys} | more)
    return path.name


def clear_cache(host: Host) -> None:
    for path, _, _ in cache().entries():
        path.unlink()
    host.bar.clear()


# -- inputs -----------------------------------------------------------------------------------------------------------


SENTINEL = re.compile(r"automatic|-1\\b|\\b0: |\\b0 (is|means)\\b|\\bEmpty: |unset,|`")


@pytest.mark.usefixtures("host")
def test_every_input_and_output_says_what_it_is() -> None:
    for kind, node in NODE_CLASS_MAPPINGS.items():
        settings = [(name, of) for name, (_, of) in inputs_of(node).items()]
        outputs = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
        for name, text in [("", node.DESCRIPTION), *((name, of["tooltip"]) for name, of in settings), *outputs]:
            assert text.endswith(".") and len(text) > 10, f"{kind}.{name}"
            assert not SENTINEL.search(text), f"{kind}.{name}: no number or empty text may stand for something else"
        for name, of in settings:
            assert ("auto: " in of["tooltip"] or name == "dtype") == (of.get("default") == "auto"), f"{kind}.{name}"


@pytest.mark.usefixtures("host")
def test_option_inputs_have_the_cores_default_range_and_help() -> None:
    fields = {item.name: item for item in dataclasses.fields(EraseOptions)}
    seen: dict[str, set[str]] = {}
    for kind, node in NODE_CLASS_MAPPINGS.items():
        for name, (what, settings) in inputs_of(node).items():
            is_wire = isinstance(what, str) and what not in ("INT", "FLOAT", "STRING", "BOOLEAN")
            if name not in fields or is_wire or kind in ("SalUnConcept", "SalUnEvaluate", "SalUnAttack"):
                continue
            seen.setdefault(name, set()).add(kind)
            rules = fields[name].metadata
            assert "mask file" not in settings["tooltip"], "a file is not a choice of this node"
            own = ("mask", "detector", "method", "optimizer")
            assert name in own or settings["tooltip"].startswith(rules["text"].replace("`", ""))
            same = {name: 16} if name == "eval_images" else {}  # the number of every recipe
            assert erase_options({name: settings["default"]}) == EraseOptions(**same)
            choices = {"mask": MASKS, "method": [each for each in rules["choices"] if each != "fmn"]}.get(
                name, rules["choices"]
            )
            assert not choices or list(what)[-len(choices) :] == list(choices)
            if rules["maximum"] is not None and what in ("INT", "FLOAT"):
                assert settings["max"] == min(rules["maximum"], 2**53)
            if what == "FLOAT":
                assert round(settings["default"], decimals(settings["step"])) == settings["default"]
    assert set(seen) | set(GRAPH_OPTIONS) == set(fields), "an option of no node, and without a reason in GRAPH_OPTIONS"
    for name, nodes in seen.items():
        shared = "SalUnMethod" if name in METHOD else "SalUnOptions"
        assert nodes == {shared} or (name in NODE_OPTIONS and shared not in nodes), "set at two nodes"
    assert sum("SalUnErase" in nodes for nodes in seen.values()) == 8
    families = aliases()["families"]
    assert {families[name]["recipe"]["eval_images"] for name in ("sd1", "sd2", "sdxl")} == {16}
    assert all("eval_images" not in paper for of in families.values() for paper in of.get("recipes_paper", {}).values())


def decimals(step: float) -> int:
    """Decimal places that ComfyUI's front end shows of a number with this step."""
    return max(0, -int(np.floor(np.log10(step))))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("kind", "inputs", "main"),
    [
        ("SalUnEvaluate", EVALUATION, {"detector", "n", "seed"}),
        ("SalUnAttack", ATTACK, {"attack", "budget", "n", "control", "seed"}),
    ],
    ids=["evaluation", "attack"],
)
def test_every_option_of_a_look_is_an_input_or_decided_elsewhere(
    kind: str, inputs: LookInputs[Any], main: set[str]
) -> None:
    fields = {item.name: item for item in dataclasses.fields(inputs.kind)}
    declared = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    widgets = {
        name: settings for part in declared.values() for name, (_, settings) in part.items() if "default" in settings
    }
    options = {{"clip_model": "clip"}.get(name, name) for name in widgets}
    assert options | set(GRAPH_OPTIONS) | set(SHARED) | {"concept", "against"} >= set(fields)
    assert options - {"detector"} <= set(fields) - set(GRAPH_OPTIONS) - set(SHARED)
    assert inputs.options({name: of["default"] for name, of in widgets.items()})[0] == inputs.kind()
    in_view = {name for name, settings in widgets.items() if not settings.get("advanced")}
    assert in_view == main


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kind", ["SalUnOptions", "SalUnEvaluate"])
def test_the_tooltip_names_no_detector_that_cannot_be_used_here(kind: str) -> None:
    declared = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    (text,) = [part["detector"][1]["tooltip"] for part in declared.values() if "detector" in part]
    assert "nudenet" in text and "q16" not in text and "attribute" not in text


@pytest.mark.usefixtures("host")
def test_numbers_are_read_from_text_and_auto_is_the_cores() -> None:
    """ComfyUI makes a text of a number that an API prompt has for such an input."""
    values = {"steps": " 300 ", "lr": "1e-5", "batch_size": 4, "retain_weight": "0", "resolution": "Auto"}
    assert erase_options(values) == EraseOptions(steps=300, lr=1e-5, batch_size=4, retain_weight=0.0)
    assert call("SalUnOptions", resolution="512", sampling_guidance="auto", sampler="auto")[0] == {"resolution": 512}
    node: Any = NODE_CLASS_MAPPINGS["SalUnErase"]
    assert node.VALIDATE_INPUTS(steps="auto", lr=None, eval_images=0) is True
    for given, message in (
        ({"steps": "2.5"}, "steps is '2.5', but must be auto or an integer"),
        ({"lr": "fast"}, "lr is 'fast', but must be auto or a number"),
        ({"lr": "2"}, "lr is 2.0, but must be at most 1"),
        ({"until": "better"}, "until"),
    ):
        assert message in node.VALIDATE_INPUTS(**given)
    assert "batch_size is 0" in NODE_CLASS_MAPPINGS["SalUnSaliencyMask"].VALIDATE_INPUTS(batch_size="0")
    assert "rank is '0'" in NODE_CLASS_MAPPINGS["SalUnSaveAsLora"].VALIDATE_INPUTS(rank="0")
    with pytest.raises(SalunError, match="resolution is 4"):
        call("SalUnOptions", resolution="4")
    chained = call("SalUnMethod", options={"resolution": 64}, method="uce", uce_erase=2.0)[0]
    assert chained == {"resolution": 64, "method": "uce", "uce_erase": 2.0}


@pytest.mark.usefixtures("host")
def test_names_titles_help_pages_and_workflows_are_up_to_date() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for name, text in comfy_help.pages().items():
        assert (comfy_help.TARGET / f"{name}.md").read_text(encoding="utf-8") == text, "run tools/comfy_help.py"
    for name, graph in comfy_workflows.WORKFLOWS.items():
        saved = json.loads((comfy_workflows.TARGET / f"{name}.json").read_text(encoding="utf-8"))
        assert saved == comfy_workflows.saved(graph), "run tools/comfy_workflows.py"
        assert (comfy_workflows.TARGET / f"{name}.jpg").stat().st_size > 1000
        kinds = [node["type"] for node in saved["nodes"]]
        assert "MarkdownNote" in kinds and {"PreviewImage", "PreviewAny"} & set(kinds)
    assert {path.stem for path in comfy_workflows.TARGET.iterdir()} == set(comfy_workflows.WORKFLOWS)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("language", ["zh", "ja"])
def test_every_node_input_and_output_is_translated(language: str) -> None:
    folder = ROOT / "locales" / language
    words = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(words) == set(NODE_CLASS_MAPPINGS)
    for kind, node in NODE_CLASS_MAPPINGS.items():
        of = words[kind]
        assert of["display_name"].startswith("SalUn ") and of["description"]
        assert list(of["inputs"]) == list(inputs_of(node)), kind
        assert list(of["outputs"]) == [str(i) for i in range(len(node.RETURN_NAMES))], kind
        for name, entry in [*of["inputs"].items(), *of["outputs"].items()]:
            assert entry["name"] and entry["tooltip"][-1] in "。）", f"{kind}.{name}"
        for name, (_, settings) in inputs_of(node).items():
            assert ("auto" in settings["tooltip"]) == ("auto" in of["inputs"][name]["tooltip"]), f"{kind}.{name}"
    english = json.loads((ROOT / "locales/en/main.json").read_text(encoding="utf-8"))
    assert json.loads((folder / "main.json").read_text(encoding="utf-8")).keys() == english.keys()


def test_the_registrys_table_names_the_pack_its_icon_and_the_oldest_comfyui() -> None:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.comfy]")[2].partition("\n[")[0]
    values = dict(re.findall(r'^([\w-]+) = "([^"]*)"', table, re.MULTILINE))
    assert values["DisplayName"] and values["requires-comfyui"].startswith(">=")
    assert values["Icon"] == "" or values["Icon"].startswith("https://"), "an address, or none yet"
    icon = ElementTree.parse(ROOT / "comfy_nodes" / "icon.svg").getroot()
    assert int(icon.attrib["width"]) <= 800 and int(icon.attrib["height"]) <= 400, "the registry's limits"


def test_nodes_are_imported_without_comfyui_and_the_installer_names_what_they_need() -> None:
    assert "comfy.model_management" not in sys.modules
    needed = runpy.run_path(str(ROOT / "install.py"))["NEEDED"]
    assert {"torch", "filelock", "numpy", "PIL", "yaml", "psutil", "safetensors"} == set(needed)


def test_concepts_chain_and_name_what_is_missing() -> None:
    first = concept(retain_prompts="a house\n\n a tree ")
    (both,) = call("SalUnConcept", preset="van gogh", concept=first)
    assert [c.name for c in both] == ["a cat", "van gogh"]
    assert first[0].retain == ("a house", "a tree")
    assert both[1].anchor is None
    assert call("SalUnConcept", text="a cat", anchor="")[0][0].anchor == ""
    assert call("SalUnConcept", text="a cat")[0][0].anchor is None
    with pytest.raises(SalunError, match="choose a preset, or enter a text"):
        call("SalUnConcept")
    with pytest.raises(SalunError, match="both the preset"):
        call("SalUnConcept", preset="van gogh", text="a cat")


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size"), [("sd1", "true"), ("sd2", "small"), ("sdxl", "true")])
def test_module_order_is_that_of_diffusers(family: str, size: str) -> None:
    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel(**ARCHITECTURES[family, size].unet).named_parameters()]
    assert sorted(unet_from_ldm(unet_to_ldm(names).values()).values(), key=module_order) == names


@pytest.mark.usefixtures("host")
def test_weights_of_a_widened_model_have_the_dtype_that_represents_them() -> None:
    assert {t.dtype for t in Weights(Patcher()).values()} == {torch.float32}
    model = Patcher()
    for p in model.parameters():
        p.data = p.data.half().float()
    assert {t.dtype for t in Weights(model).values()} == {torch.float16}


@pytest.mark.parametrize("change", [{"context_dim": 4096}, {"in_channels": 9}, {"adm_in_channels": 2560}, None])
def test_unsupported_models_are_rejected_with_their_type(host: Host, change: dict[str, int] | None) -> None:
    model, match = Patcher(), r"this MODEL is Module .*SD 1\.x, SD 2\.x and SDXL"
    if change is None:
        model.sampling = type("ModelSamplingFlow", (), {"sigmas": ModelSamplingDiscrete.sigmas})()
        match = r"ModelSamplingFlow.*epsilon and v-prediction"
    else:
        model.model.model_config.unet_config.update(change)
    with pytest.raises(SalunError, match=match):
        erased(model)


@pytest.mark.parametrize(("family", "prediction"), [("sd2", "v_prediction"), ("sdxl", "epsilon")])
def test_every_family_and_prediction_is_erased(host: Host, family: str, prediction: str) -> None:
    model = Patcher(family, prediction)
    _, delta, _, metrics = erased(model, family)
    assert delta.changed and np.isfinite([list(row.values()) for row in _rows(json.loads(metrics)["losses"])]).all()


def _rows(losses: list[Any]) -> list[dict[str, float]]:
    """Losses as rows of names and values, in either of the forms that the core gives."""
    return [row if isinstance(row, dict) else dict(enumerate(row)) for row in losses]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_are_the_networks_x_0(host: Host, prediction: str) -> None:
    """The stand-in's sampler makes one step: so samples are the guided network's x_0 from pure noise."""
    graph, plan = graph_and_plan(Patcher(prediction=prediction), Clip(), None, concept(), {}, options())
    with training_session(graph, plan):
        made = sample_latents(graph, ["a cat"], [5])
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))[None]
        t, encoded = torch.tensor([999]), graph.encode(["a cat", ""])
        guided, plain = (graph.predict(noise, t, encoded[i : i + 1]) for i in range(2))
        output = plain + graph.settings.sampling.guidance * (guided - plain)
    a = graph.schedule.alphas_cumprod[999]
    eps = (noise - (1 - a).sqrt() * output) / a.sqrt()
    v = a.sqrt() * noise - (1 - a).sqrt() * output
    torch.testing.assert_close(made, eps if prediction == "epsilon" else v, rtol=1e-4, atol=1e-3)  # √ᾱ is 0.07


@pytest.mark.parametrize(
    ("sampler", "function"),
    [("auto", "dpmpp_2m"), ("dpm++2m", "dpmpp_2m"), ("ddim", "euler"), ("euler", "euler"),
     ("euler_a", "euler_ancestral"), ("lcm", "lcm")],
)  # fmt: skip
def test_samplers_are_comfyuis(host: Host, sampler: str, function: str) -> None:
    """Each sample's noise has its own seed; guidance 1 takes one pass."""
    shared = options(sampler=sampler, sampling_steps=3, sampling_guidance=1.0)
    graph, plan = graph_and_plan(Patcher(), Clip(), None, concept(), {}, shared)
    rows, predict = [], graph.predict

    def counted(x: Tensor, t: Tensor, encoded: Any) -> Tensor:
        rows.append(len(x))
        return predict(x, t, encoded)

    graph.predict = counted  # type: ignore[method-assign]
    with training_session(graph, plan):
        made = sample_latents(graph, ["a cat", "a cat"], [5, 6])
        alone = sample_latents(graph, ["a cat"], [6])
        facts = graph.sampler_facts()
    assert host.samplers == [function] * 2 and rows == [2, 1]
    torch.testing.assert_close(made[1:], alone, rtol=1e-4, atol=1e-3)
    assert function in facts["sampler"]


@pytest.mark.parametrize(
    ("state", "low", "deterministic"),
    [("LOW_VRAM", True, True), ("NO_VRAM", True, False), ("NORMAL_VRAM", False, True)],
)
def test_low_vram_and_cublas_follow_comfyui_and_the_options(
    host: Host, monkeypatch: pytest.MonkeyPatch, state: str, low: bool, deterministic: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(sys.modules["comfy.model_management"], "vram_state", types.SimpleNamespace(name=state))
    shared = options(deterministic=deterministic)
    assert graph_and_plan(erasure()[0], None, None, concept(), {}, shared)[1].options.low_vram is low
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


# -- erasing ----------------------------------------------------------------------------------------------------------


def test_erasure_changes_only_the_masks_weights_and_not_the_graphs_model(host: Host) -> None:
    model = Patcher()
    before = [p.detach().clone() for p in model.parameters()]
    mask, summary = saliency_mask(model)
    assert summary.startswith(f"{mask.selected:,} of")
    after, delta, image, metrics = erased(model, mask=mask, eval_images=1)
    new, old, exact = Weights(after), Weights(model), delta.apply(Weights(model))
    for name in old:
        outside = ~mask.dense(name)
        assert torch.equal(new[name][outside], old[name][outside])
        if name in exact:  # a difference of two fp32 numbers may round once
            torch.testing.assert_close(new[name], exact[name], rtol=2.0**-22, atol=1e-9)
    assert 0 < delta.changed <= mask.selected
    assert image.shape[-1] == 3 and image.std() > 0
    assert len(json.loads(metrics)["losses"]) == 2
    for p, same in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, same) and p.grad is None


@pytest.mark.usefixtures("host")
def test_a_method_that_needs_attention_maps_is_rejected_before_anything_is_computed() -> None:
    """SalUn Method does not offer it; the options of a prompt may still name it."""
    with pytest.raises(SalunError, match="method is fmn, which needs tokens and attention maps, and this model does"):
        erased(Patcher(), method="fmn", retain_latents="auto")


def test_golden_delta_of_the_erase_node(host: Host) -> None:
    """The same inputs give the same bytes; `tools/golden.py` keeps the file to compare revisions."""
    written = []
    for i in range(2):
        clear_cache(host)
        path = Path(os.environ.get("SALUN_GOLDEN", host.root)) / f"{i}.safetensors"
        erased(Patcher())[1].save(path)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_same_inputs_train_once_and_a_changed_option_trains(host: Host) -> None:
    first = erased(Patcher())[1]
    values = [value for value, _ in host.bar]
    assert values == sorted(set(values)) and values[-1] == host.bar[-1][1]
    host.bar.clear()
    again = erased(Patcher())[1]  # another object, as after a restart
    assert not host.bar and again.result_hash == first.result_hash
    assert erased(Patcher(), lr=2e-3)[1].result_hash != first.result_hash and host.bar


def test_mask_and_summary_of_a_cached_erasure_are_those_of_its_training(host: Host) -> None:
    inputs = parts(**{**TINY, "eval_images": 2})
    names = NODE_CLASS_MAPPINGS["SalUnErase"].RETURN_NAMES
    trained, cached = (dict(zip(names, call("SalUnErase", **inputs), strict=True)) for _ in range(2))
    for result in (trained, cached):
        mask, lines = result["mask"], result["summary"].splitlines()
        assert mask.selected == json.loads(result["metrics"])["mask"]["selected"] >= result["delta"].changed
        assert lines[:2] == ["Concept: a cat → a dog", f"Mask: {mask.selected:,} of {mask.total:,} weights (50.00%)"]
        assert any(line.startswith("Drift of other images: ") for line in lines[2:])
    assert trained["mask"] is not cached["mask"], "the second comes out of the cache"
    assert trained["mask"] == cached["mask"] and trained["mask"].metadata == cached["mask"].metadata
    assert trained["summary"] == cached["summary"]


def test_metrics_of_salun_soft_have_the_mask_of_the_result(host: Host) -> None:
    _, delta, _, metrics = erased(Patcher(), method="salun-soft", density=0.1, steps=4)
    mask = json.loads(metrics)["mask"]
    assert mask["selected"] < mask["total"] and mask["density"] == mask["selected"] / mask["total"]
    assert delta.changed <= mask["selected"]


def test_cached_images_are_blurred_by_the_current_option(host: Host) -> None:
    nudity = preset("nudity")
    shown = erased(Patcher(), concept=nudity, eval_images=1, show_sensitive=True)[2]
    host.bar.clear()
    blurred = erased(Patcher(), concept=nudity, eval_images=1)[2]
    assert not host.bar and blurred.shape == shown.shape and not torch.equal(blurred, shown)


@pytest.mark.parametrize(
    ("kind", "name", "show", "blur"),
    [
        ("SalUnTrainingData", "nudity", False, True),
        ("SalUnTrainingData", "van gogh", False, False),
        ("SalUnSaliencyMask", "nudity", False, True),
        ("SalUnEvaluate", "nudity", False, True),
        ("SalUnErase", "nudity", False, True),
        ("SalUnErase", "nudity", True, False),
    ],
)
def test_previews_are_blurred_for_sensitive_concepts(host: Host, kind: str, name: str, show: bool, blur: bool) -> None:
    model, after = Patcher(), Patcher(prediction="v_prediction")
    for each in (model, after):
        each.model.latent_format.latent_rgb_factors = [[0.0] * 3] * 4
    inputs = parts(model=model, before=model, after=after, concept=preset(name), n=2, **{**TINY, "eval_images": 1})
    inputs["options"] = options(show_sensitive=show)
    if kind == "SalUnErase":
        inputs["eval_images"] = 0
    taken = inputs_of(NODE_CLASS_MAPPINGS[kind])
    call(kind, **{name: value for name, value in inputs.items() if name in taken})
    shown = [preview for preview in host.previews if preview is not None]
    if kind == "SalUnEvaluate":  # and then it detects
        assert len(shown) == 2 and host.previews[:2] == shown, "one for each batch of samples"
    else:
        assert len(shown) == len(host.bar), "from the first sample on"
    images = {id(image): image for _, image, _ in shown}.values()
    for image, latent in zip(images, host.latents, strict=True):
        small = np.asarray(image.resize((8, 8), Image.Resampling.NEAREST))
        assert np.array_equal(small, _pixels(latent)) != blur


# -- interrupts and the cache -----------------------------------------------------------------------------------------


def interrupted(host: Host) -> Path:
    """The folder that an erasure of 6 steps leaves when it is interrupted after step 4."""
    host.stop_at = -2
    with pytest.raises(Interrupt):
        erased(Patcher(), steps=6)
    host.stop_at = None
    host.bar.clear()
    (left,) = (cache().folder / "unfinished").iterdir()
    return left


def steps_trained(host: Host) -> int:
    """How many of the last 6 values the bar had: 2 for a training that was resumed after step 4."""
    return sum(value > host.bar[-1][1] - 6 for value, _ in host.bar)


def test_interrupted_erasure_resumes_to_the_same_delta(host: Host) -> None:
    host.stop_at = -2  # after step 4 of 6
    with pytest.raises(Interrupt) as caught:
        erased(Patcher(), steps=6)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "wrapped" and caught.value.__context__ is None, "the training's frames would hold its memory"
    host.stop_at = None
    host.bar.clear()
    (left,) = (cache().folder / "unfinished").iterdir()
    assert (left / "state/training.safetensors").exists()
    again = erased(Patcher(), steps=6)[1]  # another object, as after a restart
    assert steps_trained(host) == 2 and not left.exists()
    clear_cache(host)
    assert again.result_hash == six_steps()


@pytest.mark.parametrize("damage", ["run.json", "state/training.safetensors", "state/mask.safetensors", "other"])
def test_damaged_or_foreign_state_is_not_resumed(host: Host, damage: str) -> None:
    expected = six_steps()
    clear_cache(host)
    left = interrupted(host)
    if damage == "other":
        assert erased(Patcher(), steps=5)[1].result_hash != expected
        assert not left.exists()
    else:
        (left / damage).write_bytes((left / damage).read_bytes()[:20])
        assert erased(Patcher(), steps=6)[1].result_hash == expected


def test_interrupt_without_a_cache_leaves_no_files(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALUN_CACHE_SIZE", "0")
    host.stop_at = -1
    with pytest.raises(Interrupt):
        erased(Patcher())
    assert not list((host.root / "user").rglob("*.safetensors"))


def test_disk_space_is_required_of_new_states_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(erase_node, "state_folder", lambda *a: (sizes.append(a[1]), storage.state_folder(*a))[1])
    left = interrupted(host)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=sizes[0]))
    erased(Patcher(), steps=6)
    assert steps_trained(host) == 2 and not left.exists()
    host.bar.clear()
    host.stop_at = -2
    with pytest.raises(Interrupt):  # there is no room for another one
        erased(Patcher(), steps=5)
    assert not left.parent.exists() or not list(left.parent.rglob("*.safetensors"))


def test_result_that_cannot_be_cached_is_not_trained_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(erase_node, "_cached", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            erased(Patcher(), steps=6)
    (left,) = (cache().folder / "unfinished").iterdir()
    host.bar.clear()
    assert erased(Patcher(), steps=6)[1].changed
    assert steps_trained(host) == 1, "the last step alone is reported again"
    assert not left.exists()


def test_erasure_that_another_comfyui_runs_has_no_state(host: Host) -> None:
    left = interrupted(host)
    with exclusive_lock(left):
        assert erased(Patcher(), steps=6)[1].changed
        assert steps_trained(host) == 6 and (left / "state/training.safetensors").exists()


@pytest.mark.parametrize(("full_from", "stop_at"), [(1, None), (-2, None), (-2, -2)])
def test_full_disk_costs_the_state_but_not_the_erasure(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full_from: int, stop_at: int | None
) -> None:
    expected = six_steps()
    clear_cache(host)

    def usage(path: Path) -> Any:
        value, total = host.bar[-1] if host.bar else (0, 10**6)
        return types.SimpleNamespace(free=0 if value >= full_from % total else 10**12)

    monkeypatch.setattr(storage.shutil, "disk_usage", usage)
    host.stop_at = stop_at
    with pytest.raises(Interrupt) if stop_at else contextlib.nullcontext():
        assert erased(Patcher(), steps=6)[1].result_hash == expected
    assert any("run.json" in record.message for record in caplog.records)
    assert not stop_at or len(caplog.records) > 1, "nor is the state saved"


def test_interrupt_is_seen_within_one_batch_of_the_metrics(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answers, predict = evaluation._predict, GraphModel.predict

    def counted(graph: Any, x_t: Tensor, *more: Any) -> Tensor:
        sizes.append(len(x_t))
        return predict(graph, x_t, *more)

    def interrupted_here(*args: Any, **kwargs: Any) -> Tensor:
        sizes.clear()
        host.stop_at = 0
        return answers(*args, **kwargs)

    monkeypatch.setattr(GraphModel, "predict", counted)
    monkeypatch.setattr(evaluation, "_predict", interrupted_here)
    with pytest.raises(Interrupt):
        erased(Patcher(), eval_images=1)
    assert len(sizes) == 1


def test_cached_results_count_as_used_and_damaged_ones_are_made_again(host: Host) -> None:
    model = Patcher()
    (mask, summary), delta = saliency_mask(model), erased(model)[1]
    for path, _, _ in cache().entries():
        os.utime(path, (1, 1))
    host.bar.clear()

    def same() -> bool:
        return saliency_mask(model) == (mask, summary) and erased(model)[1].result_hash == delta.result_hash

    assert same() and not host.bar
    used = [path for path, _, at in cache().entries() if at > 1]
    assert len(used) == 4, "a mask, a delta, its mask, and its images and metrics"
    for path in used:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1  # of the last tensor
        path.write_bytes(content)
        host.bar.clear()
        assert same() and host.bar, path


def test_delta_that_exceeds_the_cache_is_logged(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SALUN_CACHE_SIZE", "10KB")
    erased(Patcher())
    assert "SALUN_CACHE_SIZE" in caplog.text


def test_fingerprint_covers_all_that_a_result_depends_on(host: Host) -> None:
    model, after, _ = erasure()
    default = {"model": model, "clip": Clip(), "vae": Vae()}

    def key(of: Any = None, given_data: Any = None, given_mask: Any = None, **changes: Any) -> str:
        graph_parts = {name: changes.pop(name, part) for name, part in default.items()}
        unread = {name: changes.pop(name) for name in METHOD[1:] if name in changes}
        graph, plan = graph_and_plan(**graph_parts, concept=of or concept(), values=changes, shared=options())
        plan = replace(plan, options=replace(plan.options, **unread))
        return str(run_record("erasure", graph, plan, given_data, given_mask).fingerprint)

    first, heads, scale, schedule = key(), Patcher(), Patcher(), Patcher()
    assert key(model=Patcher()) == first
    heads.model.model_config.unet_config["num_heads"] = 5
    scale.model.latent_format.scale_factor = 0.25
    schedule.sampling.sigmas = schedule.sampling.sigmas * 1.5
    data = [call("SalUnTrainingData", **parts(model=model), seed=seed)[0] for seed in (0, 1)]
    mask = Mask.random(Weights(model), 0.2, 0)
    other_clip = {"clip": Clip(embedding="other")}
    retained = concept(retain_prompts="a house\nan embedding:cat")
    keys = {
        "weights": key(model=shifted()),
        "patches": key(model=after),
        "heads": key(model=heads),
        "prediction": key(model=Patcher(prediction="v_prediction")),
        "schedule": key(model=schedule),
        "text encoder": key(clip=Clip(weights="other")),
        "an embedding in a prompt": key(of=concept("embedding:cat")),
        "its file": key(of=concept("embedding:cat"), **other_clip),
        "an embedding in a retain prompt": key(of=retained),
        "that file": key(of=retained, **other_clip),
        "a negative prompt": key(negative_prompt="embedding:bad"),
        "its embedding": key(negative_prompt="embedding:bad", **other_clip),
        "vae": key(vae=Vae(1)),
        "scale of latents": key(model=scale),
        "concept": key(of=concept("a cow")),
        "anchor": key(of=(replace(concept()[0], anchor="a cow"),)),
        "retain prompts": key(of=concept(retain_prompts="a house")),
        "data": key(given_data=data[0]),
        "other data": key(given_data=data[1]),
        "mask": key(given_mask=mask),
        "another mask": key(given_mask=mask.shuffled(1)),
    }
    changed: dict[str, Any] = {
        **{"mask": "random", "density": 0.4, "steps": 7, "batch_size": 3, "lr": 1e-4, "retain_weight": 2.0},
        **{"eval_images": 3, "seed": 9, "prompt_style": "tags", "negative_prompt": "blurry", "clip_skip": 2},
        **{"resolution": 128, "forget_latents": 3, "retain_latents": 3, "combine": "union", "scope": "xattn"},
        **{"method": "salun-soft", "guidance": 3.0, "lr_decay": 0.1, "target": "online", "retain_target": "noise"},
        **{"anchor_share": 0.25, "optimizer": "adam8bit", "dtype": "bf16", "low_vram": True, "show_sensitive": True},
        **{"detector": "self", "gradient_checkpointing": True, "deterministic": False},
        **{"sampling_steps": 3, "sampling_guidance": 1.0, "sampler": "lcm", "until": "ua>=0.9", "target_guidance": 0.5},
        **{"negative_guidance": 2.0, "uce_erase": 2.0, "uce_preserve": 2.0, "uce_lambda": 0.1},
        **{"esd_samples": "original", "ant_early": 2.0, "ant_empty": 2.0, "ca_regularization": 2.0, "leco_rank": 2},
        **{"spm_anchoring": 2.0, "erasediff_lambda": 2.0, "rece_rounds": 1, "rece_erase": 2.0, "rece_preserve": 2.0},
        **{"rece_lambda": 2.0, "speed_threshold": 0.5, "forget_timesteps": "0-0.5", "gradient_surgery": True},
    }
    assert set(changed) | {"recipe"} == {*SHARED, *NODE_OPTIONS}, "a recipe counts by its numbers"
    keys |= {name: key(**{name: value}) for name, value in changed.items() if name not in NOT_IN_FINGERPRINT}
    assert len({first, *keys.values()}) == len(keys) + 1, [name for name in keys if keys[name] == first]
    assert key(show_sensitive=True) == first


# -- training data and masks ------------------------------------------------------------------------------------------


def test_images_replace_forget_samples(host: Host) -> None:
    images, latents = torch.rand(3, 80, 64, 3), {"samples": torch.rand(1, 4, 8, 8)}
    inputs = parts()
    (data,) = call("SalUnTrainingData", **inputs, forget_images=images, retain_images=images, retain_captions="a\nb\nc")
    assert data.content.forget_latents.shape == (3, 4, 8, 8)
    grey, same = (
        call("SalUnTrainingData", **inputs, forget_images=torch.full((2, 64, 64, channels), 0.5))[0]
        for channels in (1, 3)
    )
    assert grey.digest == same.digest
    for match, given in (
        ("has 2 lines", {"retain_images": images, "retain_captions": "a\nb"}),
        ("has 3 lines", {"forget_images": images, "retain_captions": "a\nb\nc"}),
        ("both connected", {"forget_images": images, "forget_samples": latents}),
        ("forget_images is an empty batch", {"forget_images": torch.rand(0, 64, 64, 3)}),
        ("retain_samples is an empty batch", {"retain_samples": {"samples": torch.rand(0, 4, 8, 8)}}),
        ("retain_samples has latents of shape", {"retain_samples": {"samples": torch.rand(1, 4, 4, 8)}}),
        ("several concepts", {"forget_images": images, "concept": concept("a cat", "a cow")}),
    ):
        with pytest.raises(SalunError, match=match):
            call("SalUnTrainingData", **{**inputs, **given})


def test_messages_of_the_core_are_logged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    captions = "a horse\na cat on a wall\na tree"
    call("SalUnTrainingData", **parts(), retain_images=torch.rand(3, 80, 64, 3), retain_captions=captions)
    assert any("captions" in record.message for record in caplog.records)


def test_progress_bars_reach_their_end(host: Host) -> None:
    images, two = torch.rand(3, 64, 64, 3), concept("a cat", "a cow")
    inputs = parts()
    for images_of in ({}, {"forget_images": images}, {"retain_images": images}):
        host.bar.clear()
        call("SalUnTrainingData", **inputs, **images_of)
        assert host.bar[-1][0] == host.bar[-1][1] > 0
    host.bar.clear()
    saliency_mask(Patcher(), two, combine="union")  # each concept's saliency begins at 1 again
    values = [value for value, _ in host.bar]
    assert values[-16:] == list(range(5, 21)) and values[-1] == host.bar[-1][1]
    host.bar.clear()
    erased(Patcher(), concept=two, combine="union")
    assert host.bar[-1][0] == host.bar[-1][1]


def test_training_data_must_match_the_erasure(host: Host) -> None:
    model, of = Patcher(), concept()
    (data,) = call("SalUnTrainingData", **parts(model=model))
    assert erased(model, data=data)[1].changed
    mask_inputs = {name: value for name, value in parts(model=model).items() if name != "vae"}
    for run, words in (
        (lambda: erased(model, data=data, concept=concept("a cow")), "the concept a cat, not a cow"),
        (lambda: erased(model, data=data, concept=(replace(of[0], anchor="a cow"),)), "the anchors"),
        (lambda: erased(Patcher("sd2"), "sd2", data=data), "family sd1, not sd2"),
        (lambda: erased(model, data=data, resolution=128), "resolution 64, not 128"),
        (lambda: erased(model, data=data, concept=concept(retain_prompts="a house")), "retain_prompts"),
        (lambda: erased(model, data=data, prompt_style="tags"), "prompt_style"),
        (lambda: erased(model, data=data, clip=Clip(weights="other")), "another CLIP"),
        (
            lambda: call("SalUnSaliencyMask", **{**mask_inputs, "data": data, "options": options(resolution=128)}),
            "resolution 64",
        ),
    ):
        host.bar.clear()
        with pytest.raises(SalunError) as caught:
            run()
        assert words in str(caught.value) and not host.bar, caught.value


@pytest.mark.parametrize(("mask", "density"), [("random", 0.2), ("full", 0.5)])
def test_masks_without_gradients_need_no_samples(host: Host, mask: str, density: float) -> None:
    inputs = {name: value for name, value in parts().items() if name != "vae"}
    made, _ = call("SalUnSaliencyMask", **inputs, mask=mask, density=density)
    assert not host.bar and made.density == pytest.approx(1.0 if mask == "full" else density, abs=1e-4)


def test_mask_that_does_not_fit_is_rejected_before_sampling(host: Host) -> None:
    model = Patcher()
    mask, _ = saliency_mask(model)
    (empty, _) = call("SalUnCombineMasks", first=mask, second=mask, operation="first without second")
    host.bar.clear()
    for words, given in (
        ("salun-soft, which does not use a given mask", {"method": "salun-soft"}),
        ("was made with", {"scope": "xattn"}),
        ("Make one with SalUn Saliency Mask", {"model": shifted()}),
        ("selects no weight", {"mask": empty}),
    ):
        with pytest.raises(SalunError) as caught:
            erased(**{"model": model, "mask": mask, **given})
        assert words in str(caught.value) and not host.bar, caught.value


def test_errors_name_inputs_and_nodes(host: Host) -> None:
    model, _, delta = erasure()
    for run, words in (
        (lambda: erased(model, lr=2.0), "lr is 2.0"),
        (lambda: erased(model, resolution=60), "resolution"),
        (lambda: erased(model, recipe="paper", concept=preset("van gogh")), "recipe"),
        (lambda: erased(model, optimizer="adam8bit"), "ComfyUI's Python environment, or set optimizer to adam"),
        (lambda: erased(model, retain_latents=0, anchor_share=0.0), "retain_images to SalUn Training Data"),
        (lambda: call("SalUnApplyDelta", model=shifted(), delta=delta), "SalUn Apply Delta's base_checkpoint"),
        (lambda: call("SalUnTrainingData", **{**parts(), "clip": None}), "no CLIP is connected"),
    ):
        with pytest.raises(SalunError) as caught:
            run()
        assert words in str(caught.value), caught.value


def test_models_of_two_families_are_not_compared(host: Host) -> None:
    inputs = {name: value for name, value in parts().items() if name != "model"}
    with pytest.raises(SalunError, match="before is a MODEL of the family sd1, but after is of sd2"):
        call("SalUnEvaluate", before=Patcher(), after=Patcher("sd2"), **inputs, n=2)
    assert not host.bar


# -- evaluations ------------------------------------------------------------------------------------------------------


def evaluated(**given: Any) -> tuple[Tensor, dict[str, Any], str]:
    """SalUn Evaluate on a MODEL and one of slightly other weights."""
    inputs = {name: value for name, value in parts().items() if name != "model"}
    image, metrics, verdict = call("SalUnEvaluate", before=Patcher(), after=shifted(), **{**inputs, "n": 2, **given})
    return image, json.loads(metrics), verdict


def test_an_evaluation_has_further_prompts_and_several_detectors(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector of a folder is a stand-in that needs none: `self`."""
    monkeypatch.setitem(DETECTORS, "images", replace(DETECTORS["self"], argument="FOLDER"))
    (host.root / "input/cats").mkdir(parents=True)
    rows = "prompt,seed,width,height,guidance\na cat,1,64,72,2\na dog,2,,,\n"
    (host.root / "input/rows.csv").write_text(rows, encoding="utf-8")
    given = {"detector": "self\n images:cats\n", "prompts": "rows.csv", "sets": "languages"}
    image, metrics, verdict = evaluated(**given, keep_images=True)
    assert image.ndim == 4 and str(host.root) not in json.dumps(metrics)
    assert set(metrics["detectors"]) == {"self", "images:cats"} and metrics["seed"] == 1
    assert {line.split(": ")[0] for line in verdict.splitlines()} == {"self", "images:cats"}
    found = metrics["sets"]["rows.csv"]
    rate = found["detected"]["self"]["a cat"]
    assert found["n"] == 2 and rate["calibrated"] and rate["corrected"].keys() == {"before", "after"}
    assert (rate["before"] is None) == (rate["reason"] is not None)
    assert {"concept", "other prompts", "languages"} <= set(metrics["sets"])
    folder = host.root / metrics["folder"]
    assert folder == host.root / "output/salun/evaluation_00001_" and (folder / "eval.html").is_file()
    sizes = {path.name: Image.open(path).size for path in (folder / "images/rows.csv").iterdir()}
    assert sizes == {
        f"{row}-{side}.png": size for row, size in (("00001", (64, 72)), ("00002", (64, 64)))
        for side in ("before", "after")
    }  # fmt: skip
    assert host.bar[-1][0] <= host.bar[-1][1]
    sampled = len(host.samplers)
    advice = Verdict(Outcome.UNKNOWN, "Few images", "Use {eval_images} 16")
    monkeypatch.setattr("salun.report.metrics.verdict_on", lambda _: advice)
    verdict = evaluated(**given)[2]
    assert len(host.samplers) == sampled, "all samples are cached"
    second = host.root / "output/salun/evaluation_00002_"
    assert {path.name for path in second.iterdir()} == {"eval.json", "eval.csv", "eval.html"}, "no images unless asked"
    assert verdict.count("Use n 16") == 2, "the advice names the input of this node"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"detector": "q16:/etc"}, "can name no folder here"),
        ({"detector": "self\nclip:/etc"}, "can name no folder here"),
        ({"detector": "images:../output"}, "names '../output', which is not a folder in input"),
        ({"detector": "images:/etc"}, "not a folder in input"),
        ({"detector": "images:"}, "not a folder in input"),
        ({"detector": "eye"}, "is 'eye', but must be one of"),
        ({"metric": "fid:/etc"}, "not a folder in input"),
        ({"metric": "fid:C:\\pictures"}, "not a folder in input"),
        ({"metric": "fd"}, "is 'fd', but must be one of"),
        ({"prompts": "../secret.txt"}, "not in output/salun or input"),
        ({"prompts": "/etc/passwd.txt"}, "not in output/salun or input"),
        ({"prompts": "gone.csv"}, "not in output/salun or input"),
        ({"clip_model": "/models/clip"}, "must be a hub id"),
    ],
    ids=str,
)
def test_names_of_an_evaluation_are_checked_before_anything_runs(given: dict[str, str], message: str) -> None:
    made: Any = NODE_CLASS_MAPPINGS["SalUnEvaluate"]
    assert message in made.VALIDATE_INPUTS(**given)
    assert made.VALIDATE_INPUTS(detector="self\nnudenet:mace", metric="lpips", prompts=None) is True
    with pytest.raises(SalunError, match=message.split("'")[-1]):  # a text from another node is checked when it runs
        evaluated(**given)


def test_an_evaluation_runs_again_where_its_prompts_changed(host: Host) -> None:
    made: Any = NODE_CLASS_MAPPINGS["SalUnEvaluate"]
    file = host.root / "input/mine.txt"
    file.parent.mkdir()
    file.write_text("a cat\n", encoding="utf-8")
    before = made.IS_CHANGED(prompts="mine.txt\nAIML-TUDA/i2p", n=2, before=None)
    os.utime(file, (1, 1))
    assert made.IS_CHANGED(prompts="mine.txt\nAIML-TUDA/i2p", n=2, before=None) != before
    assert made.IS_CHANGED(n=2) == made.IS_CHANGED(prompts="") == ""


# -- attacks ----------------------------------------------------------------------------------------------------------


def test_attacks_that_need_no_tokens_are_made_on_a_graphs_models(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is a stand-in that can tell: nothing of the tiny network shows a concept."""
    monkeypatch.setattr(Calibration, "of_scores", classmethod(lambda cls, p, n, *_: sure(p, n)))
    inputs = {name: value for name, value in parts().items() if name != "model"}
    given = {"attack": "seeds+tries=1\ncompletion+steps=4+first=2\nrelearn+steps=2\nquantize\nmerge\ninversion"}
    image, text, verdict = call(
        "SalUnAttack", before=Patcher(), after=shifted(), **inputs, **given, n=2, images=2, control=True
    )
    data = json.loads(text)
    assert image.ndim == 4 and str(host.root) not in text
    made = {(each["attack"], each["side"]): each for each in data["attacks"]}
    assert len(made) == 12
    assert all(each["error"] == "" for (name, _), each in made.items() if name != "inversion")
    assert "tokens of the text encoder" in made["inversion", "erased"]["error"]
    assert "Quantization" in verdict and host.bar[-1][0] <= host.bar[-1][1]
    assert (host.root / data["folder"] / "attack.html").is_file()


def sure(positives: Any, negatives: Any) -> Calibration:
    return Calibration(np.ones(len(positives), bool), np.zeros(len(negatives), bool), 1.0)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attack": "sneaky"}, "must be one of seeds, noise"),
        ({"attack": "seeds\nlora:/etc/x"}, "lora can name no file or model here"),
        ({"attack": "prompts:../x.txt"}, "not in output/salun or input"),
        ({"clip_model": "/models/clip"}, "must be a hub id"),
    ],
    ids=str,
)
def test_names_of_an_attack_are_checked_before_anything_runs(given: dict[str, str], message: str) -> None:
    made: Any = NODE_CLASS_MAPPINGS["SalUnAttack"]
    assert message in made.VALIDATE_INPUTS(**given)
    assert made.VALIDATE_INPUTS(attack="seeds\nrelearn+steps=5") is True


# -- deltas -----------------------------------------------------------------------------------------------------------


def apply(model: Any, delta: Delta, strength: float, **more: Any) -> Any:
    return call("SalUnApplyDelta", model=model, delta=delta, strength=strength, **more)[0]


def test_deltas_add_up(host: Host) -> None:
    model, after, delta = erasure()
    twice = Weights(apply(apply(model, delta, 0.5), delta, 0.5))
    for name, tensor in Weights(after).items():
        torch.testing.assert_close(twice[name], tensor, rtol=2.0**-21, atol=1e-8)  # two roundings of fp32


def test_base_checkpoint_must_be_the_deltas_base(host: Host) -> None:
    model, _, delta = erasure()
    tuned = shifted()
    base, other = (checkpoint(host.root / f"{by}.safetensors", model, by) for by in (0.0, 1.0))
    moved = Weights(apply(tuned, delta, 1.0, base_checkpoint=base))
    assert any(not torch.equal(moved[name], tensor) for name, tensor in Weights(tuned).items())
    with pytest.raises(SalunError, match=r"base_checkpoint is 1\.0\.safetensors.*Choose the checkpoint"):
        apply(tuned, delta, 1.0, base_checkpoint=other)


def test_patch_is_rebuilt_from_its_keys_and_weights(host: Host) -> None:
    """As ComfyUI's `prefetch_prepared_value` does for every patch when it streams weights to a GPU."""
    after = erasure()[1]
    key, (patch, *_) = next(iter(after.patches.items()))
    adapter = patch[1]
    moved = tuple(part.clone() if isinstance(part, Tensor) else part for part in adapter.weights)
    weight = after.get_key_patches("diffusion_model.")[key][0][0]
    first, second = (
        each.calculate_weight(weight.clone(), key, 1.0, 1.0, None, None)
        for each in (adapter, type(adapter)(adapter.loaded_keys, moved))
    )
    assert torch.equal(first, second) and not torch.equal(first, weight)


@pytest.mark.parametrize(("here", "there"), [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_delta_of_another_dtype_adds_its_differences(host: Host, here: torch.dtype, there: torch.dtype) -> None:
    model, base = Patcher(), Patcher()
    for p, q in zip(model.parameters(), base.parameters(), strict=True):
        p.data = p.data.to(here)
        q.data = p.data.to(there)
    delta = erased(base, lr=1e-2)[1]
    assert {change.dtype for change in delta.changes.values()} == {there}
    old, before, new = Weights(model), Weights(base), delta.apply(Weights(base))
    now = Weights(apply(model, delta, 1.0))
    step = torch.finfo(here).eps  # one rounding of the sum
    for name in old:
        difference = new[name].float() - before[name].float() if name in new else torch.zeros(())
        expected = old[name].float() + difference
        assert ((now[name].float() - expected).abs() <= step * expected.abs() + 1e-7).all(), name
    lora = call("SalUnSaveAsLora", model=model, delta=delta, kind="every difference", filename_prefix="x")[0]
    (first, *_) = (name for name, tensor in new.items() if tensor.dim() > 1)
    difference = new[first].float() - before[first].float()
    stored = [t for _, t in safetensors_io.tensors(host.root / "output/loras" / lora) if t.shape == difference.shape]
    assert any(torch.allclose(tensor.float(), difference, rtol=1e-3, atol=1e-7) for tensor in stored)


@pytest.mark.parametrize("kind", ["low rank", "every difference"])
def test_lora_reports_progress_can_be_interrupted_and_has_notes(host: Host, kind: str) -> None:
    model, _, delta = erasure()
    host.bar.clear()
    host.stop_at = 3
    with pytest.raises(Interrupt):
        call("SalUnSaveAsLora", model=model, delta=delta, kind=kind)
    assert not list((host.root / "output").rglob("*.safetensors*"))
    host.stop_at = None
    host.bar.clear()
    name, summary = call("SalUnSaveAsLora", model=model, delta=delta, kind=kind)
    assert host.bar[-1][0] == host.bar[-1][1] >= len(delta.names) and summary.startswith(name)
    written = safetensors_io.read_header(host.root / "output/loras" / name).metadata
    assert stock_notes(delta).items() <= written.items()


# -- files ------------------------------------------------------------------------------------------------------------

SMALL = {"conv_in.weight": torch.zeros(40)}
SAVERS = ("SalUnSaveMask", "SalUnSaveDelta", "SalUnSaveErasedCheckpoint", "SalUnSaveAsLora")


def test_masks_are_saved_under_new_names_and_loaded(host: Host) -> None:
    mask = Mask.random(SMALL, 0.5, 0)
    names = [call("SalUnSaveMask", mask=mask, filename_prefix="sub/mine")[0] for _ in range(2)]
    assert names == ["sub/mine_00001_.mask.safetensors", "sub/mine_00002_.mask.safetensors"]
    made: Any = NODE_CLASS_MAPPINGS["SalUnLoadMask"]
    assert set(made.INPUT_TYPES()["required"]["file"][0]) == set(names)
    assert call("SalUnLoadMask", file=names[0])[0] == mask
    before = made.IS_CHANGED(names[0])
    os.utime(host.root / "output/salun" / names[0], (1, 1))
    assert made.IS_CHANGED(names[0]) != before
    either, summary = call("SalUnCombineMasks", first=mask, second=mask.shuffled(1), operation="union")
    assert either.selected > mask.selected and "Jaccard" in summary
    assert call("SalUnMaskHeatmap", mask=mask)[0].ndim == 4
    with pytest.raises(SalunError, match="not in output/salun"):
        call("SalUnLoadMask", file="../../secret.mask.safetensors")


def test_delta_is_saved_and_loaded(host: Host) -> None:
    delta = erasure()[2]
    (name,) = call("SalUnSaveDelta", delta=delta)
    assert call("SalUnLoadDelta", file=name)[0].result_hash == delta.result_hash


def test_linked_folders_are_written_to_and_read(host: Host) -> None:
    mask = Mask.full(SMALL)
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


def test_files_of_the_same_name_elsewhere_are_distinguished(host: Host) -> None:
    """ComfyUI looks into models/ first: a file there would be loaded in place of a new one of its name."""
    model, _, delta = erasure()
    source = checkpoint(host.root / "own.safetensors", model)
    (host.root / "new_00001_.safetensors").write_bytes(b"in models/")  # where the stand-in's lists look first
    name, _ = call("SalUnSaveErasedCheckpoint", delta=delta, ckpt_name=source, filename_prefix="new")
    assert name == "new_00002_.safetensors"
    mask = Mask.random(SMALL, 0.5, 0)
    (mine,) = call("SalUnSaveMask", mask=mask, filename_prefix="mask")
    (host.root / "input").mkdir(exist_ok=True)
    mask.shuffled(3).save(host.root / "input" / mine)
    assert call("SalUnLoadMask", file=mine)[0] == mask
    assert call("SalUnLoadMask", file=f"{mine} [input]")[0] == mask.shuffled(3)


@pytest.mark.parametrize("kind", SAVERS)
def test_invalid_names_are_rejected_before_anything_runs(host: Host, kind: str) -> None:
    """ComfyUI calls VALIDATE_INPUTS with the inputs that it names, None for one that another node will give."""
    made: Any = NODE_CLASS_MAPPINGS[kind]
    named = inspect.signature(made.VALIDATE_INPUTS).parameters
    assert set(named) <= set(inputs_of(made))
    for folder in ("salun", "checkpoints", "loras"):
        (host.root / "output" / folder).mkdir(parents=True)
        (host.root / "output" / folder / "file").write_bytes(b"")
    before = sorted(host.root.rglob("*"))
    invalid = ("", "../out", "/tmp/out", "a/../../out", "C:\\out", " ", "folder/", "file/name", "a\0b", "ü" * 101)
    for name in invalid:
        assert "filename_prefix is" in made.VALIDATE_INPUTS(filename_prefix=name), name
    for name in ("erased", "folder/erased", "%year%/a", "ü" * 100, None):
        assert made.VALIDATE_INPUTS(filename_prefix=name) is True
    if kind == "SalUnSaveMask":  # a name from another node is checked when the node runs
        for name in invalid:
            with pytest.raises(SalunError, match="filename_prefix is"):
                call(kind, mask=Mask.full(SMALL), filename_prefix=name)
    assert sorted(host.root.rglob("*")) == before


def test_missing_or_damaged_checkpoint_is_rejected_before_anything_runs(host: Host) -> None:
    made: Any = NODE_CLASS_MAPPINGS["SalUnSaveErasedCheckpoint"]
    safetensors_io.write(host.root / "own.safetensors", {"x": torch.ones(2)})
    (host.root / "cut.safetensors").write_bytes((host.root / "own.safetensors").read_bytes()[:-2])
    assert "gone.safetensors is not" in made.VALIDATE_INPUTS("a", "gone.safetensors")
    assert "safetensors file" in made.VALIDATE_INPUTS("a", "cut.safetensors")
    assert made.VALIDATE_INPUTS("a", "own.safetensors") is True
    assert made.VALIDATE_INPUTS("a", None) is True and made.VALIDATE_INPUTS("a", "auto") is True


def graph_of(**inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: {"inputs": of} for name, of in inputs.items()}


def test_the_checkpoint_that_was_loaded_is_found_in_the_graph() -> None:
    load, other = {"ckpt_name": "a.safetensors"}, {"ckpt_name": "b.safetensors"}
    erase = {"model": ["load", 0], "clip": ["load", 1], "eval_images": 8}
    save = {"delta": ["erase", 1], "ckpt_name": "auto"}
    assert loaded_checkpoint(graph_of(load=load, lora={"model": ["load", 0]}, erase=erase, save=save), "save") == (
        "a.safetensors"
    )
    mixed = graph_of(load=load, vae=other, erase={**erase, "vae": ["vae", 2]}, save=save)
    with pytest.raises(SalunError, match=r"a.safetensors and b.safetensors are loaded"):
        loaded_checkpoint(mixed, "save")
    round_and_round = graph_of(erase={"model": ["save", 0]}, save=save)
    with pytest.raises(SalunError, match="no checkpoint is loaded in the graph"):
        loaded_checkpoint(round_and_round, "save")


def save(host: Host, delta: Delta, file: str, **given: Any) -> tuple[str, str]:
    made: tuple[str, str] = call(
        "SalUnSaveErasedCheckpoint", delta=delta, filename_prefix="new", ckpt_name=file, **given
    )
    return made


def test_checkpoint_is_patched_and_another_base_needs_the_graphs_parts(host: Host) -> None:
    model, after, delta = erasure()
    source = checkpoint(host.root / "own.safetensors", model, **{"first_stage_model.x": torch.ones(3)})
    other = checkpoint(host.root / "other.safetensors", model, 1e-3)
    (host.root / "cut.safetensors").write_bytes((host.root / source).read_bytes()[:-8])
    wired = {"model": after, "clip": Clip(), "vae": Vae()}
    name, summary = save(host, delta, source, **wired)
    assert "tensors changed" in summary and not host.saves
    written = dict(safetensors_io.tensors(host.root / "output/checkpoints" / name))
    for key, tensor in delta.apply(Weights(model)).items():
        assert torch.equal(written[unet_to_ldm(Weights(model))[key]], tensor)
    for match, file, given in (
        (r"Choose the checkpoint that was loaded.*connect model, clip and vae", other, {}),
        ("safetensors file", "cut.safetensors", wired),  # which no other saver may hide
        (r"is not a \.safetensors checkpoint", "gone.safetensors", wired),
        ("does not contain this erasure", other, {**wired, "model": model}),
        ("does not contain this erasure", source, {**wired, "model": model}),
    ):
        with pytest.raises(SalunError, match=match):
            save(host, delta, file, **given)
    with pytest.raises(SalunError, match="damaged"):
        save(host, replace(delta, result_hash="0" * 64), source)
    assert not host.saves
    name, summary = save(host, delta, other, **wired)
    assert len(host.saves) == 1 and "own saver" in summary and name == "new_00002_.safetensors"


def test_comfyuis_saver_writes_complete_erasures_only(host: Host, one_thread: None) -> None:
    """The same weights with other values, or the erasure in part, must not be called erased."""
    model, mask = Patcher(), saliency_mask(Patcher())[0]
    file = checkpoint(host.root / "other.safetensors", model, 1e-3)
    after, delta, _, _ = erased(model, mask=mask)
    other, another, _, _ = erased(model, mask=mask, lr=5e-3)
    for key, patches in other.patches.items():
        assert torch.equal(after.patches[key][0][1].weights[0], patches[0][1].weights[0])
    merged, reset = after.clone(), after.clone()
    for patches in merged.patches.values():
        patches.append((0.5, ("diff", (torch.zeros(1),)), 0.5, None, None))
    for patches in reset.patches.values():
        patches.append((1.0, ("set", (torch.zeros(1),)), 1.0, None, None))
    wired = {"clip": Clip(), "vae": Vae()}
    for wrong in (model, apply(model, delta, 0.0), apply(model, delta, 0.5), apply(after, delta, -0.5), other, merged,
                  reset):  # fmt: skip
        with pytest.raises(SalunError, match="does not contain this erasure"):
            save(host, delta, file, model=wrong, **wired)
    assert not host.saves
    for right in (after, apply(apply(model, delta, 0.5), delta, 0.5), apply(after, another, 0.3)):
        save(host, delta, file, model=right, **wired)
    assert len(host.saves) == 3


def test_patches_besides_the_erasure_are_saved_or_rejected(host: Host) -> None:
    """The delta alone fits the source file, but a second erasure or a LoRA would be missing from the copy."""
    model, after, delta = erasure()
    source = checkpoint(host.root / "own.safetensors", model)
    (host.root / "old.ckpt").write_bytes(b"x")
    made: Any = NODE_CLASS_MAPPINGS["SalUnSaveErasedCheckpoint"]
    both = after.clone()
    both.add_patches({next(iter(both.patches)): ("diff", (torch.zeros(1),))}, 1.0, 1.0)
    tuned = Clip()
    tuned.patcher.patches["layer"] = [(1.0, ("diff", (torch.ones(1),)), 1.0, None, None)]
    wired = {"model": after, "clip": Clip(), "vae": Vae()}
    for reason, file, change in (
        ("MODEL has other patches", source, {"model": both}),
        ("CLIP has patches", source, {"clip": tuned}),
        (r"old.ckpt is not a .safetensors file", "old.ckpt", {}),
    ):
        summary = save(host, delta, file, **{**wired, **change})[1]
        assert "own saver" in summary and reason in summary
    assert len(host.saves) == 3
    with pytest.raises(SalunError, match="does not contain this erasure"):
        save(host, delta, source, **{**wired, "model": apply(model, delta, 0.3)})
    assert made.VALIDATE_INPUTS("new", "old.ckpt", **dict.fromkeys(wired)) is True
    for names in (("model",), ("clip",), ("model", "vae")):
        assert "or none of them" in made.VALIDATE_INPUTS("new", source, **dict.fromkeys(names))
        with pytest.raises(SalunError, match="or none of them"):
            save(host, delta, source, **{name: wired[name] for name in names})
    assert "Connect model, clip and vae" in made.VALIDATE_INPUTS("new", "old.ckpt")
    with pytest.raises(SalunError, match="Connect model, clip and vae"):
        save(host, delta, "old.ckpt")
    assert len(host.saves) == 3


@pytest.mark.parametrize(
    ("prediction", "zero", "keys"),
    [("epsilon", False, []), ("v_prediction", False, ["v_pred"]), ("v_prediction", True, ["v_pred", "ztsnr"])],
)
def test_comfyuis_saver_gets_the_keys_of_the_schedule(host: Host, prediction: str, zero: bool, keys: list[str]) -> None:
    """As ComfyUI's own node gives it: nothing else in an SDXL file says v-prediction or zero terminal SNR."""
    model, after, delta = erasure()
    after = after.clone()
    after.sampling = model_sampling(prediction)
    after.sampling.zsnr = zero
    file = checkpoint(host.root / "other.safetensors", model, 1e-3)
    save(host, delta, file, model=after, clip=Clip(), vae=Vae())
    assert list(host.saves[-1]["extra_keys"]) == keys == list(schedule_keys(after))
    assert all(tensor.numel() == 0 for tensor in host.saves[-1]["extra_keys"].values())
