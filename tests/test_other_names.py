"""Checkpoints as other tools write them: fewer text layers, other names, distilled UNets. The references are built here
by transformers and diffusers, and named by the rules of those tools rather than by salun's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import salun
from salun.checkpoints import safetensors_io
from salun.diagnostics.inspect import inspect
from salun.diffusion.model.convert import write_folder, write_single_file
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import ModelOptions
from salun.errors import ModelError
from tools.checkpoints import make, unet_config

QUICK: dict[str, Any] = {
    "steps": 1, "batch_size": 1, "forget_latents": 1, "retain_latents": 1, "eval_images": 0, "resolution": 64,
    "sampling_steps": 2,
}  # fmt: skip
SMALL_UNETS = {
    "sd2": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 1,
    }
}
PROMPTS = ["a photo of a cat", ""]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A small checkpoint, made once for the same arguments."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(family: str, **keywords: Any) -> Path:
        key = repr((family, sorted(keywords.items())))
        if key not in made:
            keywords = {"unet": SMALL_UNETS.get(family), **keywords}
            made[key] = make(folder / f"{len(made)}-{family}.safetensors", family, dtype="fp32", **keywords)
        return made[key]

    return get


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Tensors], Path]:
    def write(tensors: Tensors) -> Path:
        path = tmp_path / "x.safetensors"
        safetensors_io.write(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        return path

    return write


def load(path: Path | str) -> Model:
    return salun.load(str(path), device="cpu")


def verdict(path: Path, **options: Any) -> str:
    return str(inspect(str(path), ModelOptions(**options))["verdict"])


def converted(path: Path, target: Path) -> Path:
    """The model in the other layout, its weights as they are."""
    write = write_single_file if path.is_dir() else write_folder
    write(load(path), target, {}, {})
    return target


# -- text encoders ----------------------------------------------------------------------------------------------------


def tower(layers: int, projection: bool = False) -> Any:
    """A text encoder of 64 channels with known weights, as transformers computes it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=1, projection_dim=64,
        hidden_act="gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)  # without it, biases are 0 and norms 1
    return model


def state_of(model: Any) -> Tensors:
    """Under the names of files: `text_model.…`."""
    return {
        name if name.startswith("text_") else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }


OPEN_CLIP = [  # the table of diffusers' converter
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    (".self_attn", ".attn"),
]


def open_clip(model: Any) -> Tensors:
    """Under OpenCLIP's names, as diffusers' converter writes them: the text projection keeps its name and shape."""
    found, fused = {}, {}
    for name, tensor in state_of(model).items():
        for theirs, ours in OPEN_CLIP:
            name = name.replace(theirs, ours)
        if part := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):
            fused.setdefault(f"{name[: part.start()]}.in_proj_{part[2]}", {})[part[1]] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in fused.items()}


def with_text(path: Path, prefix: str, text: Tensors) -> Tensors:
    """A checkpoint's tensors, one of its text encoders replaced."""
    old = ("cond_stage_model.",) if "embedders" not in prefix else ("cond_stage_model.", prefix)
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(old)}
    return kept | {f"{prefix}{name}": tensor for name, tensor in text.items()}


def embedded(model: Any, layer: int) -> torch.Tensor:
    """The tower's output after `layer` layers and its last norm, computed by transformers alone."""
    from salun.diffusion.model.clip_tokenizer import clip_tokenizer

    tokens = clip_tokenizer("!")(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[layer]
        normed: torch.Tensor = getattr(model, "text_model", model).final_layer_norm(hidden)
    return normed


@pytest.mark.parametrize("stored", [23, 24])
def test_sd2_text_encoder_uses_layer_23_of_24_however_many_are_stored(
    stored: int, file: Callable[..., Path], written: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    """diffusers' converter writes 23 layers and no text projection; Stability's files have 24. Hosts use 23 of both."""
    model = tower(24)
    text = {name: t for name, t in open_clip(model).items() if stored == 24 or ".resblocks.23." not in name}
    path = written(with_text(file("sd2"), "cond_stage_model.model.", text))
    expected = embedded(model, 23)
    assert not torch.allclose(embedded(model, 22), expected, atol=0.05)
    torch.testing.assert_close(load(path).encode(PROMPTS).hidden, expected, rtol=1e-4, atol=1e-4)
    converted(path, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 23
    torch.testing.assert_close(load(tmp_path / "folder").encode(PROMPTS).hidden, expected, rtol=1e-4, atol=1e-4)
    converted(tmp_path / "folder", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert {name.split(".")[4] for name in back if ".resblocks." in name} == {str(i) for i in range(24)}
    assert all(torch.equal(back[n], t) for n, t in load_file(path).items() if n in back and ".resblocks.23." not in n)
    torch.testing.assert_close(
        load(tmp_path / "back.safetensors").encode(PROMPTS).hidden, expected, rtol=1e-4, atol=1e-4
    )


def test_sd2_folder_with_24_text_layers_is_no_single_file(file: Callable[..., Path], tmp_path: Path) -> None:
    """diffusers uses all that a folder holds, and hosts 23 of a file."""
    converted(file("sd2"), tmp_path / "folder")
    tower(24).save_pretrained(tmp_path / "folder" / "text_encoder")
    with pytest.raises(ModelError, match="uses 24 layers, but hosts use 23"):
        converted(tmp_path / "folder", tmp_path / "x.safetensors")


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."])
def test_sd2_text_encoder_under_the_names_of_transformers_is_read(
    prefix: str, file: Callable[..., Path], written: Callable[[Tensors], Path]
) -> None:
    model = tower(23)
    path = written(with_text(file("sd2"), prefix, state_of(model)))
    assert verdict(path) == "salun can erase from it"
    torch.testing.assert_close(load(path).encode(PROMPTS).hidden, embedded(model, 23), rtol=1e-4, atol=1e-4)


def test_sd2_text_encoder_under_the_names_of_sgm_is_read(
    file: Callable[..., Path], written: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    model = tower(24)
    path = written(with_text(file("sd2"), "conditioner.embedders.0.model.", open_clip(model)))
    assert verdict(path) == "salun can erase from it"
    torch.testing.assert_close(load(path).encode(PROMPTS).hidden, embedded(model, 23), rtol=1e-4, atol=1e-4)
    converted(path, tmp_path / "folder")
    torch.testing.assert_close(
        load(tmp_path / "folder").encode(PROMPTS).hidden, embedded(model, 23), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("projection", ["transposed", "as it is", "transformers' names"])
def test_sdxl_second_text_encoder_is_that_of_transformers(
    projection: str, file: Callable[..., Path], written: Callable[[Tensors], Path]
) -> None:
    """The layer before the last without its norm, and the projected pooled text of the last."""
    model = tower(3, projection=True)
    prefix, text = "conditioner.embedders.1.model.", open_clip(model)
    tensors = {n: t for n, t in load_file(file("sdxl")).items() if not n.startswith(prefix)}
    if projection == "transposed":  # Stability's files
        text["text_projection"] = text.pop("text_projection.weight").T
    elif projection == "transformers' names":
        prefix, text = "conditioner.embedders.1.transformer.", state_of(model)
    path = written(tensors | {f"{prefix}{name}": tensor for name, tensor in text.items()})
    assert verdict(path) == "salun can erase from it"
    loaded = load(path)
    tokens = loaded.tokenizers[1](PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        due = model(tokens, output_hidden_states=True)
    seen = loaded.encode(PROMPTS)
    torch.testing.assert_close(seen.hidden[..., 64:], due.hidden_states[-2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.extra["text_embeds"], due.text_embeds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "index", "width", "stored"), [("sd1", 0, 768, 11), ("sd2", 0, 1024, 22), ("sdxl", 1, 1280, 31)]
)
def test_text_encoder_of_published_width_needs_the_layers_that_hosts_use(
    family: str, index: int, width: int, stored: int
) -> None:
    """A tower cut short would give another embedding, or another pooled text, and say nothing."""
    from salun.checkpoints.families.parts import text_config
    from salun.checkpoints.families.registry import FAMILIES

    inner = "encoder.layers.{}.mlp.fc1.weight" if family == "sd1" else "transformer.resblocks.{}.mlp.c_fc.weight"
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        **{inner.format(i): (4 * width, width) for i in range(stored)},
    }
    if family == "sd1":
        shapes["embeddings.token_embedding.weight"] = shapes.pop("token_embedding.weight")
        shapes["embeddings.position_embedding.weight"] = shapes.pop("positional_embedding")
    with pytest.raises(ModelError, match=f"stores {stored} layers, where (12|23 or 24|32) are expected"):
        text_config(shapes, FAMILIES[family].text[index])
    shapes[inner.format(stored)] = (4 * width, width)
    assert text_config(shapes, FAMILIES[family].text[index])["num_hidden_layers"] == stored + 1


@pytest.mark.parametrize(("old", "what"), [("cond_stage_model.", "text encoder"), ("first_stage_model.", "VAE")])
def test_part_under_unknown_names_is_not_called_missing(
    old: str, what: str, file: Callable[..., Path], written: Callable[[Tensors], Path]
) -> None:
    path = written({name.replace(old, "part."): tensor for name, tensor in load_file(file("sd1")).items()})
    with pytest.raises(ModelError, match=rf"no {what} under known names \(part\..* components"):
        load(path)


# -- VAE --------------------------------------------------------------------------------------------------------------

NEWER = {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLDER = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


@pytest.mark.parametrize("names", [NEWER, OLDER], ids=["newer", "older"])
@pytest.mark.parametrize("matrices", [True, False])
def test_vae_attention_under_the_names_of_diffusers_is_read(
    names: dict[str, str], matrices: bool, file: Callable[..., Path], written: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    """Converters of 2023 left these names, and the weights as matrices or as convolutions."""
    tensors = {}
    for name, tensor in load_file(file("sd1")).items():
        if match := re.fullmatch(r"(first_stage_model\.\w+\.mid\.attn_1\.)(\w+)(\.\w+)", name):
            name = f"{match[1]}{names[match[2]]}{match[3]}"
            tensor = tensor[:, :, 0, 0] if matrices and tensor.dim() == 4 else tensor
        tensors[name] = tensor
    path = written(tensors)
    assert verdict(path) == "salun can erase from it"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (load(path).decode(latents) == load(file("sd1")).decode(latents)).all()
    converted(path, tmp_path / "folder")
    assert (load(tmp_path / "folder").decode(latents) == load(path).decode(latents)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mid.attn_1.strange.weight", "unexpected tensors: first_stage_model.decoder.mid.attn_1.strange.weight"),
        ("mid.attn_1.to_q.weight", "two tensors for one parameter"),
        ("up.999.block.0.conv1.weight", "lacks"),
        (f"up.{'9' * 5000}.block.0.conv1.weight", "unexpected tensors"),
    ],
)
def test_vae_tensor_without_a_place_is_rejected_in_one_line(
    name: str, message: str, file: Callable[..., Path], written: Callable[[Tensors], Path]
) -> None:
    path = written(load_file(file("sd1")) | {f"first_stage_model.decoder.{name}": torch.ones(32, 32)})
    assert message in verdict(path)
    with pytest.raises(ModelError, match=message):
        load(path)


# -- numbers in names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["9999", "9" * 30, "9" * 5000])
@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.{}.0.in_layers.2.weight",
        "model.diffusion_model.output_blocks.{}.0.in_layers.2.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.{}.norm1.weight",
        "first_stage_model.encoder.down.{}.block.0.conv1.weight",
        "first_stage_model.encoder.down.0.block.{}.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
    ],
)
def test_absurd_numbers_in_names_are_rejected_at_once(
    name: str, number: str, file: Callable[..., Path], written: Callable[[Tensors], Path]
) -> None:
    path = written(load_file(file("sd1")) | {name.format(number): torch.ones(64, 64)})
    try:
        message = verdict(path)
    except ModelError as error:
        message = str(error)
    assert message != "salun can erase from it" or ("text_model" in name and len(number) > 4)  # such a tensor is unused
    assert len(message) < 600


def test_tensors_without_entries_are_rejected(file: Callable[..., Path], written: Callable[[Tensors], Path]) -> None:
    """They take no bytes, and their other sizes would be built."""
    places = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    path = written(load_file(file("sd1")) | {places: torch.empty(10**12, 0)})
    assert "position_embedding.weight has no entries" in verdict(path)


# -- distilled UNets --------------------------------------------------------------------------------------------------

DISTILLED = {  # small SDXL UNets with the layouts of published ones; as ComfyUI lists their transformer depths
    "SSD-1B": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 2, 3],
        "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1],
    },
    "Segmind Vega": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
    },
    "KOALA-700M": {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 3]},
    "KOALA-1B": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 3]},
}


@pytest.mark.parametrize("model", DISTILLED)
def test_distilled_sdxl_is_erased_and_written(model: str, file: Callable[..., Path], tmp_path: Path) -> None:
    """Built of its shapes alone, erased, written in both layouts, and read again."""
    from diffusers import UNet2DConditionModel

    source = file("sdxl", unet=DISTILLED[model])
    assert verdict(source) == "salun can erase from it"
    loaded = load(source)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    said = loaded.predict(x, t, loaded.encode(PROMPTS[:1]))
    reference = UNet2DConditionModel(**unet_config("sdxl") | DISTILLED[model])
    reference.load_state_dict(loaded.unet.state_dict())
    conditioning = loaded.encode(PROMPTS[:1])
    due = reference.eval()(x, t, conditioning.hidden, added_cond_kwargs=dict(conditioning.extra)).sample
    torch.testing.assert_close(said, due, rtol=1e-4, atol=1e-4)
    outputs = [f"{tmp_path}/x.safetensors", f"{tmp_path}/folder/"]
    run = salun.erase(loaded, "golf ball", outputs=outputs, run_dir=tmp_path / "run", **{**QUICK, "lr": 1e-2})
    assert run.delta.changed
    run.apply()
    erased = loaded.predict(x, t, loaded.encode(PROMPTS[:1]))
    assert not torch.allclose(erased, said)
    for output in outputs:
        again = load(output)
        torch.testing.assert_close(again.predict(x, t, again.encode(PROMPTS[:1])), erased, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(weight, again.parameters()[name]) for name, weight in loaded.parameters().items())
    back = load_file(converted(tmp_path / "folder", tmp_path / "back.safetensors"))
    assert all(torch.equal(back[name], tensor) for name, tensor in load_file(outputs[0]).items() if name in back)
    assert sum(name.startswith("model.diffusion_model.") for name in back) == len(loaded.stored)


# -- what a single file cannot hold -----------------------------------------------------------------------------------


def test_single_file_of_a_model_with_its_own_noise_schedule_says_what_it_lacks(tmp_path: Path) -> None:
    """Hosts would sample it by the schedule of its family."""
    options = {**QUICK, "resolution": None, "run_dir": tmp_path / "run"}
    run = salun.erase("shapes", "circle", outputs=[f"{tmp_path}/x.safetensors", f"{tmp_path}/x/"], **options)
    (note,) = [note for note in run.record.notes if "noise schedule" in note]
    assert note.startswith(f"{tmp_path}/x.safetensors: a single file holds no noise schedule")


def test_single_file_of_a_model_with_the_usual_noise_schedule_needs_no_note(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    folder = converted(file("sd1"), tmp_path / "folder")
    run = salun.erase(
        str(folder), "golf ball", outputs=[f"{tmp_path}/x.safetensors"], run_dir=tmp_path / "run", **QUICK
    )
    assert not [note for note in run.record.notes if "noise schedule" in note]
