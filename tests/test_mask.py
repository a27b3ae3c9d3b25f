"""The mask: exact selection, bits on disk, set operations, and refusing what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from salun.errors import MaskError
from salun.masking.mask import Mask, entries
from salun.masking.threshold import select_largest


def dense(mask: Mask) -> torch.Tensor:
    return torch.cat([mask.dense(name).flatten() for name in mask])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    density=st.floats(0.01, 1.0),
    values=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_the_largest_scores_are_selected_and_ties_go_to_the_earlier(
    sizes: list[int], density: float, values: int, seed: int
) -> None:
    """Against a stable sort of all scores together; few distinct values make ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = {f"p{i}": torch.randint(values, (n,), generator=generator) / 7 for i, n in enumerate(sizes)}
    everything = torch.cat(list(scores.values()))
    k = int(np.floor(density * len(everything)))
    if not k:
        with pytest.raises(MaskError, match="selects none"):
            Mask.from_scores(scores, density)
        return
    expected = torch.zeros(len(everything), dtype=torch.bool)
    expected[torch.argsort(everything, descending=True, stable=True)[: entries(len(everything), density)]] = True
    assert torch.equal(dense(Mask.from_scores(scores, density)), expected)


def test_selection_is_exact_across_the_chunks_it_reads_in() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(3, 50_001, generator=generator), "b": torch.rand(70_003, generator=generator)}
    scores["b"][100:40_000] = scores["a"][0, 0]  # a tie across several chunks
    everything = torch.cat([s.flatten() for s in scores.values()])
    for density in (0.001, 0.3, 0.5, 0.77):
        expected = torch.zeros(len(everything), dtype=torch.bool)
        k = entries(len(everything), density)
        expected[torch.argsort(everything, descending=True, stable=True)[:k]] = True
        assert torch.equal(dense(Mask.from_scores(scores, density)), expected)


@pytest.mark.parametrize(("total", "density", "count"), [(100, 0.29, 29), (10, "0.7", 7), (3, 0.5, 1), (7, 1, 7)])
def test_counts_are_floors_in_decimal_arithmetic(total: int, density: float, count: int) -> None:
    """0.29·100 in binary is 28.999…, which must not lose an entry."""
    assert entries(total, density) == count


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, 2, float("nan"), float("inf")])
def test_densities_out_of_range_are_refused(density: float) -> None:
    with pytest.raises(MaskError, match="density"):
        Mask.from_scores({"a": torch.rand(10)}, density)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_ranked_are_refused(bad: float) -> None:
    scores = torch.rand(10)
    scores[3] = bad
    with pytest.raises(MaskError, match="finite and not negative"):
        Mask.from_scores({"a": scores}, 0.5)


def test_threshold_zeros_and_ties_are_told() -> None:
    scores = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0])}
    found = select_largest(scores, 4)
    assert (found.threshold, found.zeros, found.ties) == (2.0, 2 / 8, 3 / 8)
    assert len(found.warnings()) == 2


@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_saved_mask_comes_back_bit_for_bit(
    shape: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mask") / "m.safetensors"
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = Mask.from_dense({"x.weight": chosen})
    mask.metadata["concept"] = "circle"
    mask.save(path)
    again = Mask.load(path)
    assert again == mask
    assert again.metadata == {"concept": "circle"}
    assert torch.equal(again.dense("x.weight"), chosen)


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    """Other programs read it: one uint8 tensor a parameter, numpy.packbits little, shapes as JSON."""
    chosen = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    Mask.from_dense({"conv.weight": chosen}).save(tmp_path / "m.safetensors")
    with safe_open(str(tmp_path / "m.safetensors"), "np") as file:
        bits = file.get_tensor("conv.weight")
        assert file.metadata()["shapes"] == '{"conv.weight":[2,5]}'
    assert bits.dtype == np.uint8
    assert bits.tolist() == np.packbits(chosen.numpy().ravel(), bitorder="little").tolist()


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    scores = {"a": torch.rand(40), "b": torch.rand(3, 3)}
    for name in ("one", "two"):
        mask = Mask.from_scores(scores, 0.5)
        Mask(mask.bits, mask.shapes, {"z": "1", "a": "2"}).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("fault", ["text", "no format", "short bits", "spare bits", "other names"])
def test_damaged_files_are_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = {"format": "salun-mask-1", "shapes": '{"a":[10]}'}
    row = torch.tensor([255, 3], dtype=torch.uint8)
    if fault == "text":
        path.write_text("not a mask", encoding="utf-8")
    elif fault == "no format":
        save_file({"a": row}, path, {"shapes": '{"a":[10]}'})
    elif fault == "short bits":
        save_file({"a": row[:1].clone()}, path, metadata)
    elif fault == "spare bits":
        save_file({"a": torch.tensor([255, 7], dtype=torch.uint8)}, path, metadata)
    else:
        save_file({"b": row}, path, metadata)
    with pytest.raises(MaskError, match=r"m\.safetensors"):
        Mask.load(path)


def test_set_operations_and_jaccard() -> None:
    a = Mask.from_dense({"x": torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)})
    b = Mask.from_dense({"x": torch.tensor([1, 0, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool)})
    assert (a | b).dense("x").tolist() == [True, True, True, False, True, False, False, False, True]
    assert (a & b).dense("x").tolist() == [True, False, False, False, True, False, False, False, False]
    assert (a - b).dense("x").tolist() == [False, True, False, False, False, False, False, False, True]
    assert a.jaccard(b) == 2 / 5
    assert (a.selected, a.total, a.density) == (4, 9, 4 / 9)


def test_full_random_and_shuffled_have_the_counts_they_promise() -> None:
    parameters = {"a": torch.zeros(13, 7), "b": torch.zeros(30)}
    assert Mask.full(parameters).selected == 121
    random = Mask.random(parameters, 0.3, seed=1)
    assert random.selected == 36
    assert random == Mask.random(parameters, 0.3, seed=1)
    assert random != Mask.random(parameters, 0.3, seed=2)
    uneven = Mask.from_scores({"a": torch.rand(13, 7), "b": 2 + torch.rand(30)}, 0.3)
    shuffled = uneven.shuffled(seed=1)
    assert shuffled.counts() == uneven.counts() == {"a": 6, "b": 30}
    assert shuffled != uneven


def test_a_mask_of_another_model_is_refused_by_name() -> None:
    mask = Mask.full({"a": torch.zeros(3), "b": torch.zeros(4), "gone": torch.zeros(1)})
    with pytest.raises(MaskError) as error:
        mask.validate({"a": torch.zeros(3), "b": torch.zeros(5), "extra": torch.zeros(2)})
    for part in ("gone", "extra", "b is [5], the mask has [4]"):
        assert part in str(error.value)
