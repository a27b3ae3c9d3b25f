"""The sparse delta: exact in both directions, dialled by a strength, and refused where it does not belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salun.errors import ConfigError, ModelError
from salun.formats.delta import Delta
from salun.formats.hashing import base_hash

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {4: torch.int32, 2: torch.int16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def any_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bit patterns: NaN, infinities, −0 and subnormals among them."""
    width = dtype.itemsize
    planes = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    return planes.view(-1).view(dtype).view(shape)


def pair(seed: int, dtype: torch.dtype, share: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {"w": any_bits(generator, (7, 13), dtype), "same": any_bits(generator, (5,), dtype)}
    other = any_bits(generator, (7, 13), dtype)
    chosen = torch.rand(7, 13, generator=generator) < share
    return base, {"w": torch.where(chosen, bits(other), bits(base["w"])).view(dtype), "same": base["same"].clone()}


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]))
@settings(max_examples=60)
def test_apply_and_undo_are_exact_to_the_bit(
    seed: int, dtype: torch.dtype, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, new = pair(seed, dtype, share)
    path = tmp_path_factory.mktemp("delta") / "x.salun.safetensors"
    Delta.between(base, new, {"concept": "circle"}).save(path)
    delta = Delta.load(path)
    assert delta.metadata == {"concept": "circle"}
    applied = {**base, **delta.apply(base)}
    undone = {**new, **delta.undo(new)}
    for name in base:
        assert torch.equal(bits(applied[name]), bits(new[name]))
        assert torch.equal(bits(undone[name]), bits(base[name]))
    assert delta.changed == int((bits(base["w"]) != bits(new["w"])).sum())


def test_minus_zero_is_a_change() -> None:
    base, new = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, -0.0, 0.0])}
    delta = Delta.between(base, new)
    assert delta.changed == 1
    assert torch.signbit(delta.apply(base)["w"]).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_strengths_go_part_of_the_way(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, generator=generator).to(dtype)}
    new = {"w": base["w"].clone()}
    new["w"][::3] += 1
    delta = Delta.between(base, new)
    for strength in (-0.5, 0.25, 0.5, 1.5):
        expected = (base["w"].float() + strength * (new["w"].float() - base["w"].float())).to(dtype)
        expected = torch.where(base["w"] == new["w"], base["w"], expected)
        assert torch.equal(delta.apply(base, strength)["w"], expected)
    assert torch.equal(delta.apply(base, 0.0)["w"], base["w"])
    assert torch.equal(delta.apply(base, 1.0)["w"], new["w"])


@pytest.mark.parametrize("strength", [-0.6, 1.6, float("nan")])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    base = {"w": torch.zeros(3)}
    with pytest.raises(ConfigError, match="strength"):
        Delta.between(base, {"w": torch.ones(3)}).apply(base, strength)


def test_another_base_is_refused_with_both_hashes() -> None:
    base, new, other = {"w": torch.zeros(3)}, {"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)}
    delta = Delta.between(base, new)
    with pytest.raises(ModelError) as error:
        delta.apply(other)
    assert base_hash(base)[:12] in str(error.value)
    assert base_hash(other)[:12] in str(error.value)
    with pytest.raises(ModelError, match="another erased model"):
        delta.undo(base)
    with pytest.raises(ModelError, match="in another dtype"):
        delta.apply({"w": base["w"].half()})


def test_inputs_are_not_touched() -> None:
    base, new = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    Delta.between(base, new).apply(base)
    assert base["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("other", [{"v": torch.ones(3)}, {"w": torch.ones(4)}, {"w": torch.ones(3).half()}])
def test_models_that_do_not_pair_up_are_refused(other: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"[vw]"):
        Delta.between({"w": torch.zeros(3)}, other)


def test_equal_deltas_are_equal_files_and_few_changes_are_small(tmp_path: Path) -> None:
    base = {"w": torch.zeros(100_000)}
    few = {"w": base["w"].clone()}
    few["w"][[3, 777, 99_999]] = 1
    for name in ("one", "two"):
        Delta.between(base, few).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size < 2_000


@pytest.mark.parametrize("fault", ["format", "index", "order", "bits", "xor", "dtype", "shape", "missing"])
def test_damaged_files_are_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.salun.safetensors"
    base = {"w": torch.zeros(500)}
    new = {"w": base["w"].clone()}
    new["w"][: 400 if fault == "bits" else 2] = 1
    Delta.between(base, new).save(path)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata())
    items = load_file(path)
    if fault == "format":
        del metadata["format"]
    elif fault == "index":
        items["w.where"] = torch.tensor([0, 0, 0, 0, 244, 1, 0, 0], dtype=torch.uint8)  # entry 500 of 500
    elif fault == "order":
        items["w.where"] = items["w.where"].view(2, 4).flip(0).reshape(-1).contiguous()
    elif fault == "bits":
        items["w.where"] = items["w.where"][:-1].clone()
    elif fault == "xor":
        items["w.xor"] = items["w.xor"][:-1].clone()
    elif fault == "dtype":
        metadata["tensors"] = metadata["tensors"].replace("F32", "F33")
    elif fault == "shape":
        metadata["tensors"] = metadata["tensors"].replace("500", "-5")
    else:
        del items["w.xor"]
    save_file(items, path, metadata)
    with pytest.raises(ModelError, match="delta"):
        Delta.load(path)
