"""Stock formats: a reader written from docs/formats.md takes every tensor of every family, and low rank is the best."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from salun.checkpoints import keymap, safetensors_io
from salun.delta import stock_formats
from salun.errors import ConfigError, ModelError

from .test_keymap import COUNTS, UNETS

FAMILIES = list(UNETS)
MATRICES = {"sd1": 282, "sd2": 282, "sdxl": 794}  # linears and convolutions
ROUND = 2.0**-11  # half a float16's last place, relative
TINY = 2.0**-25  # half of float16's smallest number
STATES: dict[str, dict[str, Tensor]] = {}


def state(family: str) -> dict[str, Tensor]:
    """A UNet of the family with all its tensors, but narrow; text is as wide as the family's."""
    if family not in STATES:
        from diffusers import UNet2DConditionModel

        widths = (32, 64, 96) if family == "sdxl" else (32, 64, 96, 96)
        with torch.device("meta"):
            unet = UNet2DConditionModel(**{**UNETS[family], "block_out_channels": widths, "attention_head_dim": 8})
        generator = torch.Generator().manual_seed(0)
        STATES[family] = {
            name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in unet.state_dict().items()
        }
    return STATES[family]


def moved(base: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Differences of an erasure's size."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


# -- a reader, from docs/formats.md -----------------------------------------------------------------------------------


def modules_of_a1111(names: list[str]) -> dict[str, str]:
    """Underscored LDM name of a module → its diffusers name."""
    return {
        theirs.removeprefix(keymap.UNET).rpartition(".")[0].replace(".", "_"): ours.rpartition(".")[0]
        for ours, theirs in keymap.unet_to_ldm(names).items()
    }


def place_in_a1111(key: str) -> str:
    """The underscored LDM name that A1111 makes of a key: three places a level, whatever the model; else as it is."""
    ends = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    inner = {
        "norm1": "in_layers_0",
        "conv1": "in_layers_2",
        "time_emb_proj": "emb_layers_1",
        "norm2": "out_layers_0",
        "conv2": "out_layers_3",
        "conv_shortcut": "skip_connection",
    }
    bare = key.removeprefix("lora_unet_")
    if bare in ends:
        return ends[bare]
    if found := re.fullmatch(r"time_embedding_linear_(\d)", bare):
        return f"time_embed_{2 * int(found[1]) - 2}"
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(.+)", bare):
        return f"middle_block_{1 if found[1] == 'attentions' else 2 * int(found[2])}_{inner.get(found[3], found[3])}"
    if found := re.fullmatch(r"(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", bare):
        row, start = ("input_blocks", 1) if found[1] == "down" else ("output_blocks", 0)
        place, slot = start + 3 * int(found[2]) + int(found[4]), int(found[3] == "attentions")
        return f"{row}_{place}_{slot}_{inner.get(found[5], found[5])}"
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", bare):
        return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", bare):
        return f"output_blocks_{2 + 3 * int(found[1])}_{1 if found[1] == '0' else 2}_conv"
    return bare


def apply(file: Mapping[str, Tensor], base: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """The base with a stock file at a strength, in float64. Raises if a host would leave a tensor of the file out."""
    result = {name: tensor.double() for name, tensor in base.items()}
    by_place = modules_of_a1111(list(base))
    by_either = {**by_place, **{module.replace(".", "_"): module for module in by_place.values()}}  # ComfyUI, Forge
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.items():
        key, _, part = name.partition(".")
        parts.setdefault(key, {})[part] = tensor.double()
    for key, part in parts.items():
        module = by_place[place_in_a1111(key)]
        assert by_either[key.removeprefix("lora_unet_")] == module
        weight = result[f"{module}.weight"]
        if "lora_up.weight" in part:
            assert set(part) == {"lora_up.weight", "lora_down.weight", "alpha"}
            up, down = part["lora_up.weight"], part["lora_down.weight"]
            assert up.dim() == down.dim() == weight.dim() and up.shape[2:] == (1,) * (weight.dim() - 2)
            scale = part["alpha"].item() / down.shape[0]
            weight += strength * scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        else:
            assert set(part) in ({"diff"}, {"diff", "diff_b"})  # A1111 refuses the file if a .diff_b has no .diff
            assert part["diff"].shape == weight.shape
            weight += strength * part["diff"]
            if "diff_b" in part:
                result[f"{module}.bias"] += strength * part["diff_b"]
    return result


# -- names and full differences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [-0.5, 0.5, 1.0])
def test_a_full_difference_changes_every_tensor_as_it_should(family: str, strength: float) -> None:
    base = state(family)
    new = moved(base)
    file = stock_formats.full_difference(base, new)
    assert len(file) == len(base) == COUNTS[family]
    assert {tensor.dtype for tensor in file.values()} == {torch.float16}
    got = apply(file, base, strength)
    for name, tensor in base.items():
        difference = new[name].double() - tensor.double()
        off = (got[name] - tensor.double() - strength * difference).abs()
        assert (off <= abs(strength) * (ROUND * difference.abs() + TINY)).all(), name  # float16 rounds each difference


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.002, 0.1, 0.6]), family=st.sampled_from(FAMILIES))
@settings(max_examples=30, deadline=None)
def test_tensors_that_did_not_change_stay_bit_exact(seed: int, share: float, family: str) -> None:
    base = state(family)
    generator = torch.Generator().manual_seed(seed)
    chosen = {"conv_in.bias"} | {name for name in base if torch.rand((), generator=generator) < share}
    new = moved({name: base[name] for name in base if name in chosen}, seed)
    got = apply(stock_formats.full_difference(base, new), base, 1.0)
    for name, tensor in base.items():
        assert torch.equal(got[name], tensor.double()) == (name not in chosen), name


def test_a_bias_that_changed_alone_gets_a_weight_of_zeros_as_well() -> None:
    base = {"conv_in.weight": torch.randn(4, 2, 3, 3), "conv_in.bias": torch.zeros(4)}
    file = stock_formats.full_difference(base, {"conv_in.bias": torch.ones(4)})
    assert file["lora_unet_conv_in.diff_b"].tolist() == [1, 1, 1, 1]
    assert torch.equal(file["lora_unet_conv_in.diff"], torch.zeros(4, 2, 3, 3, dtype=torch.float16))


def test_names_are_the_ones_that_hosts_know() -> None:
    old = stock_formats.module_keys(state("sd1"))
    assert old["down_blocks.0.attentions.0.proj_in.weight"] == "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert old["mid_block.resnets.1.norm2.bias"] == "lora_unet_mid_block_resnets_1_norm2"
    assert old["conv_norm_out.weight"] == "lora_unet_out_0"
    assert stock_formats.module_keys(state("sd2")) == old
    new = stock_formats.module_keys(state("sdxl"))
    assert new["add_embedding.linear_2.bias"] == "lora_unet_label_emb_0_2"
    assert new["up_blocks.0.upsamplers.0.conv.weight"] == "lora_unet_output_blocks_2_2_conv"
    assert new["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0.weight"] == (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0"
    )


@pytest.mark.parametrize(
    ("family", "version"), [("sd1", None), ("sd2", ("ss_v2", "True")), ("sdxl", ("ss_base_model_version", "sdxl_"))]
)
def test_metadata_show_the_family(family: str, version: tuple[str, str] | None, tmp_path: Path) -> None:
    base = state(family)
    file, _ = stock_formats.low_rank(base, moved(base), rank=1)
    path = tmp_path / "x.lora.safetensors"
    safetensors_io.write(path, file, stock_formats.host_metadata(base))
    assert all(torch.equal(tensor, file[name]) for name, tensor in load_file(path).items())
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata()
    if version is None:
        assert "ss_v2" not in metadata and not metadata["ss_base_model_version"].startswith("sdxl_")
    else:
        assert metadata[version[0]].startswith(version[1])


class Lazy(Mapping[str, Tensor]):
    """Tensors that count how often each is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_the_base_is_read_lazily() -> None:
    whole = state("sd1")
    new = moved({name: tensor for name, tensor in whole.items() if "attn2" in name})
    for write in (stock_formats.full_difference, lambda b, c: stock_formats.low_rank(b, c, rank=1)):
        base = Lazy(whole)
        write(base, new)
        assert base.reads == {name: int(name in new) for name in whole}


# -- low rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_whole_difference_of_every_matrix(family: str) -> None:
    base = state(family)
    new = moved(base)
    file, account = stock_formats.low_rank(base, new, rank=100_000)
    got = apply(file, base, 0.5)
    held = [name for name in base if name not in account.left_out]
    assert len(file) / 3 == len(held) == MATRICES[family]
    for name, tensor in base.items():
        difference = new[name].double() - tensor.double()
        if name not in held:
            assert torch.equal(got[name], tensor.double())
            continue
        key = stock_formats.module_keys(base)[name]
        up, down = (file[f"{key}.lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
        # float16 rounds every entry of both factors, so that each product of the sum is off by two roundings
        bound = (2.1 * ROUND * up.abs() @ down.abs() + TINY * (up.abs().sum(1, True) + down.abs().sum(0))).view(
            tensor.shape
        )
        assert ((got[name] - tensor.double() - 0.5 * difference).abs() <= 0.5 * bound).all(), name


SHAPES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (12, 20),  # wide
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (30, 7),  # tall
    "mid_block.resnets.0.conv1.weight": (9, 5, 3, 3),
    "time_embedding.linear_1.weight": (11, 11),
}


def pair(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return base, {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


def product(file: Mapping[str, Tensor], key: str) -> Tensor:
    return file[f"{key}.lora_up.weight"].flatten(1) @ file[f"{key}.lora_down.weight"].flatten(1)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 13))
@settings(max_examples=40, deadline=None)
def test_a_rank_gives_the_nearest_matrix_of_that_rank(seed: int, rank: int) -> None:
    base, new = pair(seed)
    file, account = stock_formats.low_rank(base, new, rank=rank, dtype=torch.float64)
    for name, key in stock_formats.module_keys(base).items():
        difference = (new[name] - base[name]).flatten(1)
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        # 1e-9: the Gram matrix holds squares, so that float64's 1e-16 is 1e-8 of the largest value at the very worst
        torch.testing.assert_close(product(file, key), best, rtol=0, atol=1e-9 * float(s[0]))
        kept = account.layers[name]
        assert kept.ranks == (min(rank, len(s)),) == (file[f"{key}.alpha"].item(),)
        assert kept.energy == pytest.approx(float(s.square().sum()), rel=1e-12)
        assert kept.fraction == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-12)


@given(seed=st.integers(0, 10_000), energy=st.floats(0.001, 1.0))
@settings(max_examples=40, deadline=None)
def test_an_energy_gives_the_least_rank_that_holds_it(seed: int, energy: float) -> None:
    base, new = pair(seed)
    _, account = stock_formats.low_rank(base, new, energy=energy)
    for name in base:
        share = torch.linalg.svdvals((new[name] - base[name]).flatten(1)).square().cumsum(0)
        share /= share[-1].clone()
        (r,) = account.layers[name].ranks
        assert share[r - 1] >= energy - 1e-12
        assert r == 1 or share[r - 2] < energy + 1e-12  # one rank less would not do


def test_a_difference_of_low_rank_takes_no_more_than_that() -> None:
    generator = torch.Generator().manual_seed(0)
    tall, wide = torch.randn(40, 2, generator=generator).double(), torch.randn(2, 30, generator=generator).double()
    base, new = {"conv_in.weight": torch.zeros(40, 30)}, {"conv_in.weight": tall @ wide}
    for asked in ({"rank": 16}, {"energy": 1.0}):
        file, account = stock_formats.low_rank(base, new, **asked)
        assert account.total.ranks == (2,)
        assert file["lora_unet_conv_in.lora_down.weight"].shape == (2, 30)
        assert account.total.fraction == pytest.approx(1.0)


def test_norms_and_biases_count_as_lost_and_are_reported() -> None:
    base = {
        "mid_block.resnets.0.conv1.weight": torch.zeros(4, 2, 3, 3),
        "mid_block.resnets.0.conv1.bias": torch.zeros(4),
        "conv_norm_out.weight": torch.zeros(8),
    }
    new = {
        "mid_block.resnets.0.conv1.weight": torch.ones(4, 2, 3, 3),  # rank 1, energy 72
        "mid_block.resnets.0.conv1.bias": torch.full((4,), 3.0),  # energy 36
        "conv_norm_out.weight": torch.full((8,), 0.5),  # energy 2
    }
    file, account = stock_formats.low_rank(base, new, rank=1)
    assert len(file) == 3
    assert account.left_out == ["mid_block.resnets.0.conv1.bias", "conv_norm_out.weight"]
    assert account.total.energy == pytest.approx(110)
    assert account.total.fraction == pytest.approx(72 / 110)
    groups = account.groups
    assert groups["mid_block resnet"].fraction == pytest.approx(72 / 108)
    assert groups["outside norm"] == stock_formats.EnergyKept(2.0, 0.0, ())
    record = account.as_json()
    assert record["ranks"] == [1, 1] and record["groups"]["outside norm"] == {"kept": 0.0, "ranks": None}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "down_blocks.1 attn1"),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.bias", "up_blocks.2 attn2"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", "mid_block feed-forward"),
        ("mid_block.attentions.0.transformer_blocks.0.norm2.weight", "mid_block norm"),
        ("mid_block.attentions.0.proj_in.weight", "mid_block other"),
        ("down_blocks.0.resnets.1.conv_shortcut.weight", "down_blocks.0 resnet"),
        ("down_blocks.0.resnets.1.time_emb_proj.weight", "down_blocks.0 time"),
        ("down_blocks.0.downsamplers.0.conv.weight", "down_blocks.0 other"),
        ("add_embedding.linear_1.weight", "outside time"),
        ("conv_norm_out.bias", "outside norm"),
        ("conv_in.weight", "outside other"),
    ],
)
def test_parameters_are_grouped_by_block_and_kind(name: str, group: str) -> None:
    assert stock_formats.group_of(name) == group


# -- what is refused --------------------------------------------------------------------------------------------------

LAYER = "conv_in.weight"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 4, "energy": 0.9}, "either a rank or an energy"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.01}, "energy is 1.01"),
        ({"energy": float("nan")}, "energy is nan"),
    ],
)
def test_a_rank_or_energy_out_of_range_is_rejected(asked: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        stock_formats.low_rank({LAYER: torch.zeros(4, 2)}, {LAYER: torch.ones(4, 2)}, **asked)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "models are equal"),
        ({LAYER: torch.zeros(4, 2)}, "models are equal"),
        ({"conv_out.weight": torch.ones(4, 2)}, "has no conv_out.weight"),
        ({LAYER: torch.ones(4, 3)}, r"\[4, 2\] in the base and \[4, 3\]"),
        ({LAYER: torch.full((4, 2), float("nan"))}, "not finite"),
        ({LAYER: torch.full((4, 2), float("inf"))}, "not finite"),
        ({LAYER: torch.full((4, 2), 1e10)}, "1e.10, too large for torch.float16"),
    ],
)
def test_differences_that_no_file_can_hold_are_rejected(changed: dict[str, Tensor], says: str) -> None:
    base = {LAYER: torch.zeros(4, 2)}
    with pytest.raises(ModelError, match=says):
        stock_formats.full_difference(base, changed)
    if "too large" not in says:
        with pytest.raises(ModelError, match=says):
            stock_formats.low_rank(base, changed, rank=1)


def test_a_difference_too_large_for_float16_fits_a_wider_type() -> None:
    base, new = {LAYER: torch.zeros(4, 2)}, {LAYER: torch.full((4, 2), 1e5)}
    assert stock_formats.full_difference(base, new, torch.float32)["lora_unet_conv_in.diff"].max() == 1e5
    with pytest.raises(ModelError, match=r"1e.05, too large"):
        stock_formats.full_difference(base, new)


def test_a_low_rank_factor_too_large_for_float16_is_rejected() -> None:
    with pytest.raises(ModelError, match="too large for"):
        stock_formats.low_rank({LAYER: torch.zeros(4, 2)}, {LAYER: torch.full((4, 2), 1e12)}, rank=1)


def test_low_rank_of_norms_and_biases_alone_is_rejected() -> None:
    with pytest.raises(ModelError, match="Write the full difference"):
        stock_formats.low_rank({"conv_in.bias": torch.zeros(4)}, {"conv_in.bias": torch.ones(4)}, rank=1)
