"""Single files: recognized by names and shapes, read lazily, copied with only the changed tensors replaced."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salun.checkpoints import keymap, patch, safetensors_io
from salun.checkpoints.diffusers_folder import weights_of
from salun.checkpoints.families.sd2 import GUESS_KEY
from salun.checkpoints.hashing import base_hash
from salun.checkpoints.single_file import CheckpointContents, open_unet
from salun.delta.delta import Delta
from salun.diagnostics.inspect import inspect
from salun.errors import ModelError
from salun.masking.mask import Mask
from tools import checkpoints

Maker = Callable[..., Path]


def dtypes(found: CheckpointContents) -> dict[str, int]:
    """How many of the UNet's tensors are of each dtype."""
    return dict(Counter(found.unet.entry(name).dtype for name in found.unet))


METADATA = {"modelspec.title": "a stranger's, with „quotes“", "z": "1", "a": "2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A checkpoint made by these arguments, once for all tests: not to be written to."""
    folder, known = tmp_path_factory.mktemp("checkpoints"), dict[str, Path]()

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in known:
            known[key] = checkpoints.make(folder / f"{len(known)}.safetensors", family, **options)
        return known[key]

    return make


@pytest.fixture(scope="module")
def source(made: Maker) -> Path:
    """An SD 1 checkpoint with everything that real ones hold."""
    return made("sd1", ema=True, dtype="mixed", metadata=METADATA)


def tiny(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """A file that holds tensors of these names and hardly any bytes."""
    save_file({name: torch.zeros(2, 2) for name in names}, path, metadata)
    return path


# -- what a file is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "encoders"), [("sd1", 1), ("sd2", 1), ("sdxl", 2)])
def test_each_family_is_recognised(family: str, encoders: int, made: Maker) -> None:
    found = CheckpointContents.of(made(family))
    assert found.family.name == family
    assert found.has_vae
    assert found.text == (True,) * encoders
    assert found.ema == []
    assert set(found.others) == {name for name in checkpoints.extra_buffers(family) if "." not in name} | (
        {"denoiser.sigmas"} if family == "sdxl" else set()
    )
    assert dtypes(found) == {"F16": len(found.unet)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
def test_dtypes_are_counted(dtype: str, made: Maker) -> None:
    found = CheckpointContents.of(made("sd1", dtype=dtype))
    one = sum(len(found.unet.entry(name).shape) == 1 for name in found.unet)
    expected = {"fp32": {"F32": 286}, "bf16": {"BF16": 286}, "mixed": {"F32": one, "F16": 286 - one}}
    assert dtypes(found) == expected[dtype]


def test_missing_parts_and_ema_copies_are_listed(made: Maker) -> None:
    bare = CheckpointContents.of(made("sd1", vae=False, text=False, buffers=False))
    assert (bare.has_vae, bare.text, bare.ema, bare.others) == (False, (False,), [], [])
    averaged = CheckpointContents.of(made("sd1", ema=True))
    assert len(averaged.ema) == len(averaged.unet) + 2
    assert "model_ema.diffusion_modelinput_blocks00weight" in averaged.ema
    assert not set(averaged.ema) & set(averaged.others)
    assert base_hash(averaged.unet) == base_hash(bare.unet)


def test_a_file_without_its_second_encoder_is_recognised(made: Maker, tmp_path: Path) -> None:
    whole, path = made("sdxl"), tmp_path / "half.safetensors"
    second = [n for n in safetensors_io.read_header(whole).names if n.startswith("conditioner.embedders.1.")]
    safetensors_io.rewrite(whole, path, {}, {}, dropped=second)
    assert CheckpointContents.of(path).text == (True, False)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("word", "stated"),
    [("v", "v_prediction"), ("V_Prediction", "v_prediction"), ("epsilon", "epsilon"), ("eps", "epsilon")],
)
def test_metadata_declare_the_prediction_type(family: str, word: str, stated: str, made: Maker, tmp_path: Path) -> None:
    """Before all marks and guesses."""
    other = "epsilon" if stated == "v_prediction" else "v_prediction"
    path = tmp_path / "x.safetensors"
    safetensors_io.rewrite(made(family, prediction=other), path, {}, {"modelspec.prediction_type": word})
    assert CheckpointContents.of(path).prediction == (stated, "its metadata")


def test_marks_show_the_prediction_type_and_the_schedule(made: Maker) -> None:
    marked = CheckpointContents.of(made("sdxl", prediction="v_prediction", marks=("ztsnr",)))
    assert marked.prediction == ("v_prediction", "its v_pred mark")
    assert marked.zero_snr
    assert {"v_pred", "ztsnr"} <= set(marked.others)
    plain = CheckpointContents.of(made("sdxl"))
    assert plain.prediction == ("epsilon", "the default of its family")
    assert not plain.zero_snr


@pytest.mark.parametrize(("spread", "guess"), [(0.089, "epsilon"), (0.091, "v_prediction")])
def test_sd2s_prediction_type_is_guessed_as_comfyui_does(
    spread: float, guess: str, made: Maker, tmp_path: Path
) -> None:
    bias = torch.tensor([spread, -spread]).repeat(32).half()
    safetensors_io.rewrite(made("sd2"), tmp_path / "x.safetensors", {GUESS_KEY: bias}, {})
    kind, why = CheckpointContents.of(tmp_path / "x.safetensors").prediction
    assert kind == guess
    assert "prediction_type" in why


def test_made_checkpoints_of_sd2_are_guessed_right(made: Maker) -> None:
    for kind in ("epsilon", "v_prediction"):
        assert CheckpointContents.of(made("sd2", prediction=kind)).prediction[0] == kind
    kind, why = CheckpointContents.of(made("sd2", unet={"layers_per_block": 1})).prediction
    assert (kind, "the default" in why) == ("epsilon", True)


SDXL_OF_WIDTH = {"text": False, "vae": False}
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("sd1", {"unet": {"in_channels": 9}}, "is an inpainting model"),
    ("sd2", {"unet": {"in_channels": 9}}, "is an inpainting model"),
    ("sdxl", {"unet": {"in_channels": 9}}, "is an inpainting model"),
    ("sd1", {"unet": {"in_channels": 8}}, "InstructPix2Pix"),
    ("sd2", {"unet": {"in_channels": 5}}, "is a depth model"),
    ("sd2", {"unet": {"in_channels": 7}}, "is a model with further inputs"),
    ("sdxl", {"unet": {"cross_attention_dim": 1280}, **SDXL_OF_WIDTH}, "is an SDXL refiner"),
    ("sdxl", {"unet": {"cross_attention_dim": 1024}, **SDXL_OF_WIDTH}, "is an unCLIP model"),
]


@pytest.mark.parametrize(("family", "options", "message"), OTHERS, ids=[message for *_, message in OTHERS])
def test_models_of_other_kinds_are_rejected_by_name(
    family: str, options: dict[str, Any], message: str, made: Maker
) -> None:
    path = made(family, **options)
    with pytest.raises(ModelError, match=message) as refusal:
        CheckpointContents.of(path)
    assert str(path) in str(refusal.value)


STRANGERS = {
    "a LoRA": [
        ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model.alpha"],  # kohya
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],  # peft
        ["unet.down_blocks.0.attentions.0.processor.to_q_lora.up.weight"],  # diffusers' earlier ways
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_linear_layer.down.weight"],
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_up.weight"],
        ["lycoris_down_blocks_0_attentions_0_proj_in.lokr_w1"],
        ["lycoris_down_blocks_0_attentions_0_proj_in.hada_w1_a"],
        ["diffusion_model.input_blocks.1.1.proj_in.oft_blocks"],
    ],
    "a Stable Diffusion 3 model": [
        ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "first_stage_model.decoder.conv_in.bias"]
    ],
    "a Flux model": [
        ["double_blocks.0.img_attn.qkv.weight"],
        ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    ],
    "a Flux or Stable Diffusion 3 transformer": [
        ["transformer_blocks.0.attn.norm_added_k.weight"],
        ["transformer_blocks.0.attn.add_k_proj.weight"],
    ],
    "a ControlNet": [
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        ["input_hint_block.0.weight", "input_blocks.0.0.weight"],
    ],
    "a textual inversion": [["emb_params"], ["clip_l", "clip_g"]],
    "a VAE alone": [
        ["encoder.conv_in.weight", "decoder.conv_in.weight"],
        ["first_stage_model.encoder.conv_in.weight"],
    ],
    "a text encoder alone": [
        ["text_model.encoder.layers.0.self_attn.k_proj.weight"],
        ["transformer.resblocks.0.attn.in_proj_weight", "positional_embedding"],
        ["cond_stage_model.transformer.text_model.final_layer_norm.bias"],
    ],
    "a UNet alone": [
        ["input_blocks.0.0.weight", "out.2.weight"],
        ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    ],
    r"an EDM model \(Playground, CosXL\)": [
        ["edm_mean", "edm_std", "model.diffusion_model.input_blocks.0.0.weight"],
        ["edm_vpred.sigma_max", "model.diffusion_model.input_blocks.0.0.weight"],
    ],
    "an AnimateDiff motion module": [
        ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
    ],
    "a safetensors file without a UNet": [["weight"], ["<cat-toy>"]],
}


@pytest.mark.parametrize(
    ("kind", "names"), [(kind, names) for kind, files in STRANGERS.items() for names in files], ids=str
)
def test_unsupported_files_are_named(kind: str, names: list[str], tmp_path: Path) -> None:
    path = tiny(tmp_path / "stranger.safetensors", *names)
    with pytest.raises(ModelError, match=rf"stranger\.safetensors is {kind}"):
        open_unet(path)


def test_a_lora_that_a_complete_checkpoint_carries_along_does_not_make_it_one(source: Path, tmp_path: Path) -> None:
    tensors = dict(safetensors_io.tensors(source))
    safetensors_io.write(tmp_path / "both.safetensors", {**tensors, "lora_te_x.alpha": torch.ones(1)})
    assert list(open_unet(tmp_path / "both.safetensors")) == list(open_unet(source))


def test_inspect_names_what_only_looks_like_a_unet(tmp_path: Path) -> None:
    for names in (STRANGERS["a ControlNet"][1], STRANGERS["a LoRA"][-1], STRANGERS["a LoRA"][3]):
        path = tiny(tmp_path / "stranger.safetensors", *names)
        with pytest.raises(ModelError, match=r"is a (ControlNet|LoRA)"):
            inspect(str(path))
    alone = tiny(tmp_path / "alone.safetensors", *STRANGERS["a UNet alone"][1])
    assert inspect(str(alone))["kind"] == "UNet weights (diffusers names)"


def test_saluns_own_files_are_no_models(source: Path, tmp_path: Path) -> None:
    weights = {"conv_in.weight": torch.zeros(2, 2)}
    Mask.full(weights).save(tmp_path / "mask.safetensors")
    Delta.between(weights, {"conv_in.weight": torch.ones(2, 2)}).save(tmp_path / "x.salun.safetensors")
    for name, kind in (("mask", "a mask"), ("x.salun", "a delta")):
        with pytest.raises(ModelError, match=f"is {kind} written by salun, not a model"):
            CheckpointContents.of(tmp_path / f"{name}.safetensors")


def without(source: Path, path: Path, *names: str) -> Path:
    safetensors_io.rewrite(source, path, {}, {}, dropped=[keymap.UNET + name for name in names])
    return path


def test_incomplete_unet_is_rejected(source: Path, tmp_path: Path) -> None:
    for end in ("input_blocks.0.0.weight", "out.2.weight"):
        with pytest.raises(ModelError, match=rf"lacks model\.diffusion_model\.{end}"):
            CheckpointContents.of(without(source, tmp_path / f"{end}.safetensors", end))
    shapes = {name.removeprefix(keymap.UNET): name for name in CheckpointContents.of(source).header.names}
    deaf = [name for name in shapes if ".attn2." in name]
    with pytest.raises(ModelError, match="no cross-attention"):
        CheckpointContents.of(without(source, tmp_path / "y.safetensors", *deaf))


@pytest.mark.parametrize(
    "name",
    [
        "strange.weight",
        "input_blocks.1.0.strange.weight",
        "input_blocks.00.0.op.weight",  # a sampler before the first layer
        f"input_blocks.{'9' * 5000}.0.in_layers.0.weight",
    ],
)
def test_foreign_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = tiny(tmp_path / "x.safetensors", f"{keymap.UNET}input_blocks.0.0.weight", keymap.UNET + name)
    with pytest.raises(ModelError, match=r"x\.safetensors has a tensor that no Stable Diffusion UNet has") as refusal:
        CheckpointContents.of(path)
    assert len(str(refusal.value)) < 1000


def test_two_tensors_for_one_parameter_are_rejected(tmp_path: Path) -> None:
    names = [f"{keymap.UNET}input_blocks.{place}.0.in_layers.0.weight" for place in ("1", "01")]
    with pytest.raises(ModelError, match=r"two tensors for one parameter: down_blocks\.0\.resnets\.0\.norm1\.weight"):
        CheckpointContents.of(tiny(tmp_path / "x.safetensors", *names))


@pytest.mark.parametrize("shape", [[], [4], [4, 4], [1] * 5])
@pytest.mark.parametrize("name", ["input_blocks.0.0.weight", "out.2.weight"])
def test_ends_of_another_rank_are_rejected(name: str, shape: list[int], source: Path, tmp_path: Path) -> None:
    content = {n: t for n, t in load_file(source).items() if n.startswith(keymap.UNET)}
    content[keymap.UNET + name] = torch.zeros(shape)
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"{name} of shape"):
        CheckpointContents.of(tmp_path / "x.safetensors")


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_and_a_folder_of_the_same_weights_look_alike(family: str, made: Maker, tmp_path: Path) -> None:
    """The folder is written by diffusers, whole and in pieces."""
    from diffusers import UNet2DConditionModel

    single = open_unet(made(family, dtype="fp32"))
    unet = UNet2DConditionModel(**checkpoints.unet_config(family))
    unet.load_state_dict(dict(single))
    for name, size in (("whole", "5GB"), ("pieces", "4MB")):
        unet.save_pretrained(tmp_path / name / "unet", max_shard_size=size)
        folder = open_unet(tmp_path / name)
        assert set(folder) == set(single) == set(unet.state_dict())
        assert (len(folder.files) > 1) == (name == "pieces")
        assert base_hash(folder) == base_hash(single)
        assert (folder.single, single.single) == (False, True)
        for tensor in folder:
            assert folder.entry(tensor).shape == single.entry(tensor).shape
    assert open_unet(made(family, dtype="fp32")).metadata == {}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.fp16.safetensors"]),
        (["model.non_ema.safetensors"], ["model.non_ema.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"],
            ["model.fp16-00001-of-00001.safetensors"],
        ),
        (["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json", "model.safetensors"],
         ["model.safetensors"]),
    ],
)  # fmt: skip
def test_a_part_is_read_from_its_files_of_no_variant_or_of_one(
    there: list[str], taken: list[str], tmp_path: Path
) -> None:
    part = tmp_path / "text_encoder"
    part.mkdir()
    for name in there:
        shards = {str(i): n for i, n in enumerate(n for n in there if "-of-" in n)}
        (part / name).write_text(json.dumps({"weight_map": shards}) if name.endswith(".json") else "")
    assert [file.name for file in weights_of(part).files] == taken


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            ["model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
            "in one file and in",
        ),
        (["model.safetensors.index.json"], "is incomplete"),
        (["model-00001-of-00001.safetensors"], "no safetensors weights"),
        (["pytorch_model.bin"], "pickled weights are not read"),
    ],
)
def test_a_part_whose_weights_are_not_clear_is_rejected(there: list[str], message: str, tmp_path: Path) -> None:
    part = tmp_path / "text_encoder"
    part.mkdir()
    for name in there:
        (part / name).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ModelError, match=message):
        weights_of(part)


def test_tensors_are_read_when_asked_for(source: Path) -> None:
    tracemalloc.start()
    try:
        unet = CheckpointContents.of(source).unet
        largest = max(unet, key=lambda name: unet.entry(name).end - unet.entry(name).start)
        tensor = unet[largest]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensor.nbytes < peak < source.stat().st_size / 4


def bump(path: Path) -> None:
    """A later time of change, which a coarse clock may not give by itself."""
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1_000_000_000))


def touch_a_weight(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    bump(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)  # same size, same time
    os.replace(other, path)


MEDDLING = [touch_a_weight, cut, swap, Path.unlink]


@pytest.mark.parametrize("meddle", MEDDLING)
def test_file_modified_after_opening_is_an_error(meddle: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(source, tmp_path / "x.safetensors"))
    unet = open_unet(path)
    meddle(path)
    with pytest.raises(ModelError, match=r"x\.safetensors (was modified|cannot be read)"):
        dict(unet)


# -- writing ----------------------------------------------------------------------------------------------------------

CHANGED = ["conv_in.weight", "mid_block.resnets.0.norm1.bias", "mid_block.attentions.0.proj_out.weight"]


def changes(path: Path, names: list[str] = CHANGED) -> dict[str, torch.Tensor]:
    unet = open_unet(path)
    return {name: unet[name] + 1 for name in names}


def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → dtype, shape and bytes, in the order of the bytes."""
    raw = path.read_bytes()
    return {n: (e.dtype, e.shape, raw[e.start : e.end]) for n, e in safetensors_io.read_header(path).entries.items()}


@pytest.mark.parametrize("keep_ema", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("sd1", "mixed"), ("sd2", "bf16"), ("sdxl", "fp16")])
def test_a_copy_differs_in_the_changed_tensors_alone(
    family: str, dtype: str, keep_ema: bool, made: Maker, tmp_path: Path
) -> None:
    source, target = made(family, dtype=dtype, ema=True, metadata=METADATA), tmp_path / "deeper" / "out.safetensors"
    stored, before = open_unet(source), source.read_bytes()
    patch.write_patched(stored, target, changes(source), {"salun.concept": "circle"}, keep_ema=keep_ema)
    old, new = content(source), content(target)
    left = {name for name in old if name.startswith("model_ema.")}
    assert left
    expected = [name for name in old if keep_ema or name not in left]
    assert list(new) == expected
    assert safetensors_io.read_header(target).listed == [
        n for n in safetensors_io.read_header(source).listed if n in set(expected)
    ]
    moved = {stored.name_in_file(name) for name in CHANGED}
    for name in expected:
        assert new[name][:2] == old[name][:2]
        assert (new[name][2] == old[name][2]) == (name not in moved), name
    assert safetensors_io.read_header(target).metadata == {**METADATA, "salun.concept": "circle"}
    reread = open_unet(target)
    for name, tensor in changes(source).items():
        assert torch.equal(reread[name], tensor)
    assert source.read_bytes() == before
    assert set(load_file(target)) == set(expected)


def test_nothing_changed_is_the_same_tensors(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    patch.write_patched(open_unet(source), target, {}, {}, keep_ema=True)
    assert content(target) == content(source)
    patch.write_patched(open_unet(target), tmp_path / "again.safetensors", {}, {}, keep_ema=True)
    assert (tmp_path / "again.safetensors").read_bytes() == target.read_bytes()


def test_names_keep_their_order_where_the_bytes_have_another(source: Path, tmp_path: Path) -> None:
    """A header may list tensors in any order."""
    raw = source.read_bytes()
    start = safetensors_io.read_header(source).data_start
    header = list(json.loads(raw[8:start]).items())
    random.Random(0).shuffle(header)
    text = json.dumps(dict(header)).encode()
    shuffled = tmp_path / "in.safetensors"
    shuffled.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    assert content(shuffled) == content(source)
    listed = [name for name, _ in header if name != "__metadata__"]
    assert safetensors_io.read_header(shuffled).listed == listed
    patch.write_patched(open_unet(shuffled), tmp_path / "out.safetensors", changes(source), {}, keep_ema=True)
    assert safetensors_io.read_header(tmp_path / "out.safetensors").listed == listed
    assert list(content(tmp_path / "out.safetensors")) == list(content(source))


@pytest.mark.parametrize("way", ["itself", "symlink", "hard link"])
def test_the_source_is_never_the_target(way: str, source: Path, tmp_path: Path) -> None:
    path = target = Path(shutil.copy(source, tmp_path / "x.safetensors"))
    if way != "itself":
        target = tmp_path / "link.safetensors"
        (target.symlink_to if way == "symlink" else target.hardlink_to)(path)
    with pytest.raises(ModelError, match=r"is the source itself\. Write to another name"):
        patch.write_patched(open_unet(path), target, changes(path), {})
    assert path.read_bytes() == source.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {path.name, target.name}


def untouched(folder: Path) -> None:
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "x.safetensors"} == {
        "out.safetensors": b"old"
    }


@pytest.mark.parametrize("meddle", MEDDLING)
def test_a_source_that_has_changed_gives_no_copy(meddle: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(source, tmp_path / "x.safetensors"))
    (tmp_path / "out.safetensors").write_bytes(b"old")
    stored, changed = open_unet(path), changes(path)
    meddle(path)
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        patch.write_patched(stored, tmp_path / "out.safetensors", changed, {})
    untouched(tmp_path)


def test_tensors_that_do_not_fit_give_no_copy(source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(source, tmp_path / "x.safetensors"))
    (tmp_path / "out.safetensors").write_bytes(b"old")
    tensor = open_unet(path)["conv_in.weight"]
    for wrong in (tensor.double(), tensor[:1]):
        with pytest.raises(ModelError, match=r"input_blocks\.0\.0\.weight is F16 \[32, 4, 3, 3\] in .*, not"):
            patch.write_patched(open_unet(path), tmp_path / "out.safetensors", {"conv_in.weight": wrong}, {})
    untouched(tmp_path)


def test_a_disk_without_room_gives_no_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(source, tmp_path / "x.safetensors"))
    (tmp_path / "out.safetensors").write_bytes(b"old")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(100, 90, 10))
    with pytest.raises(ModelError, match=r"out\.safetensors needs [\d,]+ bytes, but its disk has 10 free"):
        patch.write_patched(open_unet(path), tmp_path / "out.safetensors", changes(path), {})
    untouched(tmp_path)


def test_folder_at_the_target_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"out\.safetensors cannot be written"):
        patch.write_patched(open_unet(source), tmp_path / "out.safetensors", changes(source), {})
    assert [p.name for p in tmp_path.rglob("*")] == ["out.safetensors"]
